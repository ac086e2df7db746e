"""``python -m quantkit`` is ``quantkit``."""

from quantkit.cli.app import run

run()
