"""Kernels: the products of operands, on whatever device they are.

- :mod:`.reference` defines every operation in plain PyTorch: clear, exact and slow. All else equals it.
- :mod:`.table` says what a backend is, which ones there are, and which one runs what.
- :mod:`.plain` is the reference as a backend; :mod:`.cpu` and :mod:`.gpu` are those that are fast.
- :mod:`.linear` is the door for layers.

Nothing here knows a module: a backend takes an :class:`~quantkit.core.operand.Operand`.
"""

from quantkit.core.moved import moved

__getattr__ = moved("quantkit.ops", "quantkit.ops.table")  # until the next version
