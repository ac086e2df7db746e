"""Finding sites by watching a forward pass, with no knowledge of any architecture."""

from quantkit.discovery.discover import discover
from quantkit.discovery.equivalence import Equivalence, verify_equivalence

__all__ = ["Equivalence", "discover", "verify_equivalence"]
