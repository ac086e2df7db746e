"""The pages of the documentation, and what can be read off them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def prose(text: str) -> str:
    """A page without its code blocks."""
    return FENCE.sub("", text)


def links(text: str) -> list[str]:
    """Where the links and pictures of a page lead."""
    found = re.findall(r"!?\[[^\]]*\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", prose(text))
    return [next(filter(None, groups)) for groups in found]


def examples(page: Path) -> dict[str, str]:
    """The programs on a page, by name: Python blocks that start with ``# test: NAME``. Blocks of one name are one program."""
    programs: dict[str, str] = {}
    for language, code in FENCE.findall(page.read_text(encoding="utf-8")):
        if language == "python" and (match := re.match(r"# test: (\S+)\n", code)):
            programs[match[1]] = programs.get(match[1], "") + code
    return programs
