"""Calibrators that learn by gradient descent.

Most calibrators compute their answer from statistics. Those in this folder run blocks of the model again and again and follow a
gradient, so they need more than one file: :mod:`~quantkit.calibrators.learned.omniquant` is the algorithm,
:mod:`~quantkit.calibrators.learned.layers` holds the copies of a block that round and learn, and
:mod:`~quantkit.calibrators.learned.rounding` passes gradients through rounding. What they need from outside of calibrators, a
model as a chain of blocks and a folder for finished work, is in :mod:`quantkit.calibration`.
"""
