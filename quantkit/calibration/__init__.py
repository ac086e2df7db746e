"""Running the float model on data, and keeping what calibrators need to know of it.

Batches come from the user or from the model itself (:mod:`~quantkit.calibration.data`). One pass over them fills statistics of
each activation (:mod:`~quantkit.calibration.observe`, :mod:`~quantkit.calibration.statistics`), which are small whatever the
amount of data. Attention has a pass of its own (:mod:`~quantkit.calibration.attention`). Methods that learn need the
activations themselves: :mod:`~quantkit.calibration.blocks` takes a model apart into blocks, so that one block at a time is
enough, and :mod:`~quantkit.calibration.store` keeps finished work in a folder, so that an interrupted run can go on. Nothing in
this room changes a model, and nothing decides how a layer is quantized.
"""
