"""``quantkit.errors`` of version 0.1."""

from quantkit.core.moved import moved

__getattr__ = moved("quantkit.errors", "quantkit.core.errors")
