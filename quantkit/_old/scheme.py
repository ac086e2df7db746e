"""``quantkit.scheme`` of version 0.1."""

from quantkit.core.moved import moved

__getattr__ = moved("quantkit.scheme", "quantkit.core.scheme")
