"""``quantkit.sites`` of version 0.1."""

from quantkit.core.moved import moved

__getattr__ = moved("quantkit.sites", "quantkit.core.sites")
