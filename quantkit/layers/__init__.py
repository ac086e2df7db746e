"""The modules that quantization puts into a model.

A quantized model is the model that it was, with other modules in some places. :class:`quantkit.layers.linear.W8A8Linear` takes
the place of a linear, holds its codes and scales, and asks :mod:`quantkit.ops` for the product.
:class:`quantkit.layers.attention.AttentionQuantizer` is added to a module that calls attention, and rounds what that reads.
Modules hold state, and move, copy and save it as modules of torch do; what the numbers mean is written in :mod:`quantkit.core`,
and how they are computed in :mod:`quantkit.ops`.
"""
