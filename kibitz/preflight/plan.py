"""What a plan of memory is made of, and what it says."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kibitz.preflight.shapes import Shape


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, by phase of a step. `held` is occupied in all phases."""

    held: dict[str, float]
    phases: dict[str, dict[str, float]]
    rows: int = 0
    """The rollouts that are written side by side in this process."""
    chosen: dict[str, Any] = field(default_factory=dict)
    """The settings that a run chooses for itself by the memory of its GPU."""

    @property
    def peak(self) -> float:
        return sum(self.held.values()) + max(sum(parts.values()) for parts in self.phases.values())

    def as_numbers(self) -> dict[str, dict[str, float]]:
        return {"held": self.held, **self.phases}


@dataclass(frozen=True)
class Models:
    """The shapes of the models whose weights a run holds. `teachers` are those with a model of their own; the fields after it
    have the keys of a method's sections."""

    student: Shape
    teachers: Sequence[Shape] = ()
    reference: Shape | None = None
    discriminator: Shape | None = None

    @property
    def readers(self) -> list[Shape]:
        """Those that read rollouts in this process."""
        return [self.student, *self.teachers, *([] if self.reference is None else [self.reference])]
