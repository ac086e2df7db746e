"""``quantkit.numerics`` of version 0.1."""

from quantkit.core.moved import moved

__getattr__ = moved("quantkit.numerics", "quantkit.core.numerics", "quantkit.core.groups", "quantkit.core.weights")
