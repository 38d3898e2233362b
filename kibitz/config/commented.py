"""A recipe as YAML with the reason of each line beside it: what `kibitz init` and `kibitz score --prompts` write."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from kibitz.config import plain_yaml

WIDTH = 110
COLUMN = 36


def commented(tree: Mapping[str, Any], reasons: Mapping[str, str], head: Sequence[str]) -> str:
    """The tree as YAML; `reasons` by setting (`a.b`), behind their lines or, where they are long, above them; `head` are
    sentences on top."""
    written = [line for text in head for line in _comment(text, "")]
    for key, value in tree.items():
        if not any(name.startswith(f"{key}.") for name in reasons):
            written += _setting({key: value}, reasons.get(key, ""), "")
            continue
        written.append(f"{key}:")
        for name, inner in value.items():
            written += _setting({name: inner}, reasons.get(f"{key}.{name}", ""), "  ")
    return "\n".join(written) + "\n"


def _setting(tree: dict[str, Any], why: str, indent: str) -> list[str]:
    text = plain_yaml.dump(tree, width=1000).rstrip("\n").split("\n")
    lines, why = [indent + line for line in text], " ".join(why.split())
    if not why:
        return lines
    if len(lines) == 1 and max(COLUMN, len(lines[0]) + 2) + 2 + len(why) <= WIDTH:
        return [f"{lines[0]:<{COLUMN - 2}}  # {why}"]
    return [*_comment(why, indent), *lines]


def _comment(text: str, indent: str) -> list[str]:
    """Whatever a text holds, no line of it is more than a comment."""
    return textwrap.wrap(f"{indent}# {' '.join(text.split())}", WIDTH, subsequent_indent=f"{indent}# ")
