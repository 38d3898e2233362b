"""The pages of the documentation, and the code that stands on them."""

import re
from collections.abc import Iterator

from support.paths import ROOT

DOCS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
PAGES = ("README.md", "recipes/README.md", *DOCS)
FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"`([^`\n]+)`")


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def fences(text: str, language: str) -> list[str]:
    """The blocks of one language on a page; `""` stands for those that name none."""
    return [match["text"] for match in FENCE.finditer(text) if match["language"] == language]


def spans(text: str) -> Iterator[str]:
    """Code within sentences."""
    yield from SPAN.findall(FENCE.sub("", text))
