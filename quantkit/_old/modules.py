"""``quantkit.modules`` of version 0.1."""

from quantkit.core.moved import moved

__getattr__ = moved("quantkit.modules", "quantkit.model.modules")
