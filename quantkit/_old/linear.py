"""``quantkit.linear`` of version 0.1."""

from quantkit.core.moved import moved

__getattr__ = moved("quantkit.linear", "quantkit.layers.linear")
