"""Fine-tuning on one's own samples degrades a model; on-policy distillation with a teacher that equals it does not."""

import math
from typing import Any

from kibitz.experiments.charts import Line, Panel, Point
from kibitz.experiments.design import TOY, Arm, Experiment
from kibitz.experiments.evidence import Finding, Verdict
from kibitz.experiments.records import half_of_seeds
from kibitz.experiments.results import Results
from kibitz.experiments.shapes import grid, turned
from kibitz.experiments.statistics import Estimate

RATES = {"adamw": (1e-4, 3e-4, 1e-3), "sgd": (0.03, 0.1, 0.3)}
LEVELS = ("low", "middle", "high")
METHODS: dict[str, dict[str, Any]] = {
    "self-sft": {"method": {"type": "sft", "source": "student"}},
    "opd": {"method": {"type": "opd"}, "teacher": {"model": "student"}},
    "opd-sampled": {"method": {"type": "opd", "support": "sampled"}, "teacher": {"model": "student"}},
}
ABOUT = {
    "self-sft": "SFT on samples of the model as it is at each step",
    "opd": "OPD, full vocabulary, with its own start as the teacher",
    "opd-sampled": "OPD on the sampled token, with its own start as the teacher",
}
ALSO = {("opd", "sgd"): ("high",), ("opd-sampled", "adamw"): ("high",), ("opd-sampled", "sgd"): ()}
"""Where only some rates are run: those at which self-SFT suffers most."""
WINDOW = 10  # steps in a point of the curve


def name_of(method: str, optimizer: str, level: str) -> str:
    return f"{method}-{optimizer}-{level}"


def find(results: Results) -> Finding:
    """Find the runs that end below the model that they began with."""
    start = results.level("student")
    pairs = [(optimizer, level) for optimizer in RATES for level in LEVELS]
    found = grid(results, pairs, METHODS, lambda pair, method: name_of(method, *pair))
    for method in ("self-sft", "opd"):
        results.runs(name_of(method, "adamw", "middle"))  # NotRun without the two that the claim is about
    by_method = turned(found)
    own = by_method.pop("self-sft")
    taught = {(method, *pair): share for method, by in by_method.items() for pair, share in by.items()}
    worst, kept = min(own, key=lambda pair: own[pair][0]), min(taught, key=lambda corner: (taught[corner][0], corner))
    degraded = [[below(share, start) for share in group.values()] for group in (own, taught)]
    numbers = {
        "start": start,
        "own": {"below": sum(degraded[0]), "of": len(own), "worst": own[worst], "optimizer": worst[0],
                "rate": results.rate(name_of("self-sft", *worst))},
        "taught": {"below": sum(degraded[1]), "of": len(taught), "worst": taught[kept], "optimizer": kept[1],
                   "rate": results.rate(name_of(*kept))},
        "rows": [(pair[0], results.rate(name_of(next(iter(cells)), *pair)), [cells.get(method) for method in METHODS])
                 for pair, cells in found.items()],
    }  # fmt: skip
    return Finding(verdict(*degraded), numbers, [_panel(results, optimizer, start) for optimizer in RATES])


def verdict(own: list[bool], taught: list[bool]) -> Verdict:
    """Judge by the pairs of optimizer and rate at which the student loses: `own` for self-SFT, `taught` for OPD."""
    if all(own) and not any(taught):
        return "reproduced"
    return "partly" if sum(own) / len(own) > sum(taught) / len(taught) else "not"


def below(share: Estimate, start: float) -> bool:
    """Return True if a run ended below the start by more than its interval."""
    return share[0] + share[1] < start


def _panel(results: Results, optimizer: str, start: float) -> Panel:
    """The share of the runs' own rollouts that was right, on the way."""
    lines = []
    for method in METHODS:
        for level in LEVELS:
            name = name_of(method, optimizer, level)
            if results.has(name):
                label = f"{method}, {results.rate(name):g}"
                lines.append(Line(label, _on_the_way(results, name), dashed=method != "self-sft"))
    return Panel(f"{optimizer}: rollouts that are right", "step", "accuracy", lines, levels={"start": start})


def _on_the_way(results: Results, arm: str) -> list[Point]:
    """The reward of the training rollouts, means over windows of steps and over seeds."""
    runs = [run["series"]["reward"] for run in results.runs(arm) if "reward" in run.get("series", {})]
    points = []
    for first in range(0, min(map(len, runs), default=0), WINDOW):
        means = [math.fsum(part) / len(part) for part in (run[first : first + WINDOW] for run in runs)]
        points.append((first + WINDOW / 2, math.fsum(means) / len(means), half_of_seeds(means)))
    return points


def _arms() -> tuple[Arm, ...]:
    arms = []
    for method, changes in METHODS.items():
        for optimizer, rates in RATES.items():
            for level, rate in zip(LEVELS, rates, strict=True):
                if level not in ALSO.get((method, optimizer), LEVELS):
                    continue
                arms.append(
                    Arm(
                        name_of(method, optimizer, level),
                        f"{ABOUT[method]}; {optimizer}, {level} rate",
                        {**changes, "optim": {"name": optimizer}},
                        rates=(rate,),
                    )
                )
    return tuple(arms)


EXPERIMENT = Experiment(
    name="self-sft",
    question="What becomes of a model that is fine-tuned on its own samples, at several rates and by two optimizers?",
    world="assistant",
    recipe={
        **TOY,
        "steps": 100,
        "rollout": {**TOY["rollout"], "max_tokens": 32},
        "optim": {"tokens_per_micro_batch": 2048, "schedule": "linear"},
        "device": "cpu",
    },
    arms=_arms(),
    rates=RATES["adamw"],
    dev_problems=128,
    test_problems=512,
    seeds=5,
    quick_arms=("self-sft-adamw-middle", "opd-adamw-middle", "opd-sampled-adamw-high", "self-sft-sgd-middle"),
    models={"student": "assistant/student"},
    data={"prompts": {"world": "assistant-instructions"}},
    measures={"instructions": "prompts"},
    series=("reward",),
    find=find,
)
