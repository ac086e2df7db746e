"""``python -m quantkit`` is ``quantkit``."""

from quantkit.cli import run

run()
