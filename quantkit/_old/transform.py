"""``quantkit.transform`` of version 0.1."""

from quantkit.core.moved import moved

__getattr__ = moved("quantkit.transform", "quantkit.core.transform", "quantkit.core.rotation")
