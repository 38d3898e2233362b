"""What servers and teachers tell of a step, and when who was at work."""

from typing import Any

from kibitz.engines import Engine
from kibitz.ledger import Ledger
from kibitz.teachers import Teacher

WRITES, SCORES, LEARNS = "student_sampling", "teacher_scoring", "student_training"


def told(engine: Engine, teacher: Teacher | None, ledger: Ledger) -> dict[str, Any]:
    """Numbers for a step's row. `timeline`, where there are servers, has the times at which each of them and the trainer
    worked, in seconds since 1970: what it leaves open, they waited."""
    row = engine.metrics() | ({} if teacher is None else teacher.metrics())
    busy = {phase: spans for phase in (WRITES, SCORES) if (spans := row.pop(f"{phase}_busy", None)) is not None}
    if busy:
        row["timeline"] = {SCORES: _spans(ledger, "scoring"), LEARNS: _spans(ledger, "training")} | busy
    return row


def _spans(ledger: Ledger, phase: str) -> list[list[float]]:
    """When this process was in a phase. It scores if the teacher is in it."""
    return [[round(start, 3), round(end, 3)] for name, start, end in ledger.spans if name == phase]
