"""What a run wants shown beside tables and curves: pictures and texts, as `shown.json` of its folder names them.

A list of sections with `title`, `words` and, each where there is one, `image` (the name of an SVG or PNG in the folder), `text`
(shown as it is) and `lines` (a list of sentences).
"""

import base64
import json
from pathlib import Path
from typing import Any

from kibitz.report.formats import safe_lines

KINDS = {".svg": "image/svg+xml", ".png": "image/png"}
MOST_BYTES = 4_000_000
NAME = "shown.json"


def read_shown(folder: Path, notices: list[str]) -> list[dict[str, Any]]:
    """The sections, with pictures as data; what is unreadable is left out, and a notice says so."""
    path = folder / NAME
    if not path.is_file():
        return []
    try:
        tree = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except ValueError:
        tree = None
    if not isinstance(tree, list):
        notices.append(f"{NAME} cannot be read and was left out.")
        return []
    return [_section(folder, row, notices) for row in tree if isinstance(row, dict)]


def _section(folder: Path, row: dict[str, Any], notices: list[str]) -> dict[str, Any]:
    lines = row.get("lines")
    return {
        "title": safe_lines(str(row.get("title") or "")),
        "words": safe_lines(str(row.get("words") or "")),
        "text": safe_lines(str(row.get("text") or "")),
        "lines": [safe_lines(str(line)) for line in lines] if isinstance(lines, list) else [],
        "image": _data(folder, str(row["image"]), notices) if row.get("image") else "",
    }


def _data(folder: Path, name: str, notices: list[str]) -> str:
    """The picture as a data URI: in a page a picture runs no script, also not an SVG."""
    path = folder / Path(name).name
    if path.suffix not in KINDS or not path.is_file() or path.stat().st_size > MOST_BYTES:
        notices.append(f"The picture {safe_lines(name)} is missing, or is none that can be shown.")
        return ""
    return f"data:{KINDS[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"
