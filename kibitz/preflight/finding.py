"""The result of one check: a light, a sentence, and the numbers behind it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Light = Literal["green", "amber", "red"]
ORDER: tuple[Light, ...] = ("green", "amber", "red")


@dataclass(frozen=True)
class Finding:
    """`text` says what was found and, where the light is not green, what to write instead. `numbers` are for machines;
    `differences` are pairs of lines, the student's and the teacher's, shown side by side."""

    name: str
    light: Light
    text: str
    numbers: dict[str, Any] = field(default_factory=dict)
    differences: tuple[tuple[str, str], ...] = ()

    def as_row(self) -> dict[str, Any]:
        row: dict[str, Any] = {"name": self.name, "light": self.light, "text": self.text}
        row |= {"numbers": self.numbers} if self.numbers else {}
        return row | ({"differences": [list(pair) for pair in self.differences]} if self.differences else {})


def worst(findings: Sequence[Finding]) -> Light:
    """Return the light of the worst finding; green if there is none."""
    return ORDER[max((ORDER.index(finding.light) for finding in findings), default=0)]
