"""Texts from outside: files that are read up to a size, and messages in which nothing moves the cursor of a terminal.

Every error, every report and all that is logged goes through :func:`printable`, since names and values in it may be those of a
file that a stranger wrote.
"""

from __future__ import annotations

import logging
from pathlib import Path

LONGEST = 4000
"""Characters of a message. Longer ones are of values from a file, and hide what they say."""


def printable(text: str) -> str:
    """``text`` with everything as an escape that is no character to be seen, but for spaces and ends of lines."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii") for c in text)


def shortened(text: str) -> str:
    """``text`` without its middle, if it is longer than :data:`LONGEST`."""
    if len(text) <= LONGEST:
        return text
    return f"{text[: LONGEST // 2]} ... ({len(text) - LONGEST} characters) ... {text[-LONGEST // 2 :]}"


def read_text(file: Path, most: int, error: type[Exception]) -> str:
    """What a text file in UTF-8 holds.

    Args:
        file: a plain file, or a link to one.
        most: bytes that an honest file does not exceed.
        error: raised where it is no such file; not where there is none, which is an OSError.
    """
    if file.exists() and not file.is_file():
        raise error(f"{file} is no plain file: refused")
    if file.stat().st_size > most:
        raise error(f"{file} is larger than {most >> 20} MiB: refused")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as fault:
        raise error(f"{file} is no text in UTF-8 ({fault.reason} at byte {fault.start})") from None


def _as_text(record: logging.LogRecord) -> bool:
    record.msg, record.args = printable(record.getMessage()), None
    return True


logging.getLogger("quantkit").addFilter(_as_text)
