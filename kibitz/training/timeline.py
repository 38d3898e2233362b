"""What servers and teachers tell of a step, and when who was at work."""

from typing import Any

from kibitz.engines import Engine
from kibitz.ledger import Ledger
from kibitz.parallel.ranks import Ranks
from kibitz.servers.busy import merged
from kibitz.teachers import Teacher

WRITES, SCORES, LEARNS = "student_sampling", "teacher_scoring", "student_training"


def told(engine: Engine, teacher: Teacher | None, ledger: Ledger, ranks: Ranks) -> dict[str, Any]:
    """Numbers for a step's row, once every process has called this. `timeline`, where there are servers, has the times at which
    they and at least one of the processes worked, in seconds since 1970: what it leaves open, they waited."""
    row = engine.metrics() | ({} if teacher is None else teacher.metrics())
    found = {phase: row.pop(f"{phase}_busy", None) for phase in (WRITES, SCORES)}
    busy: dict[str, Any] = {phase: spans for phase, spans in found.items() if spans is not None}
    lanes: dict[str, Any] = {SCORES: _spans(ledger, "scoring"), LEARNS: _spans(ledger, "training")} | busy
    every = ranks.gather((lanes, bool(busy)))
    if any(served for _, served in every):
        names = dict.fromkeys(name for lanes, _ in every for name in lanes)
        row["timeline"] = {name: merged([span for lanes, _ in every for span in lanes.get(name, [])]) for name in names}
    return row


def _spans(ledger: Ledger, phase: str) -> list[list[float]]:
    """When this process was in a phase. It scores if the teacher is in it."""
    return [[round(start, 3), round(end, 3)] for name, start, end in ledger.spans if name == phase]
