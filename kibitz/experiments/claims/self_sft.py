"""Fine-tuning on one's own samples degrades a model; on-policy distillation with a teacher that equals it does not."""

import math
from typing import Any

from kibitz.experiments.charts import Line, Panel, Point
from kibitz.experiments.design import Arm, Claim, Experiment
from kibitz.experiments.evidence import Finding, Verdict, percent
from kibitz.experiments.records import half_of_seeds
from kibitz.experiments.results import Estimate, Results
from kibitz.experiments.tables import table

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
    """Which runs end below the model that they began with."""
    start = results.level("student")
    found = {
        (method, optimizer, level): results.accuracy(name_of(method, optimizer, level))
        for method in METHODS
        for optimizer in RATES
        for level in LEVELS
        if results.has(name_of(method, optimizer, level))
    }
    own = {corner: below(share, start) for corner, share in found.items() if corner[0] == "self-sft"}
    taught = {corner: below(share, start) for corner, share in found.items() if corner[0] != "self-sft"}
    results.runs(name_of("self-sft", "adamw", "middle"))  # NotRun without the two that the claim is about
    results.runs(name_of("opd", "adamw", "middle"))
    worst, kept = (min((found[c][0], c) for c in group) for group in (own, taught))
    why = (
        f"The model follows {percent(start)}% of held-out instructions at the start. Self-SFT ends below that, beyond its "
        f"interval, in {sum(own.values())} of {len(own)} pairs of optimizer and learning rate, OPD towards its own start "
        f"in {sum(taught.values())} of {len(taught)}. The worst of self-SFT is {percent(worst[0])}% ({told(results, worst[1])}), "
        f"the worst of OPD {percent(kept[0])}% ({told(results, kept[1])}). "
        + (
            "It is not any rate above 0 that degrades: a random walk has to be fast or long enough to show. "
            if any(own.values()) and not all(own.values())
            else ""
        )
        + "Nothing is to be learnt from one's own samples: their expected gradient is zero, and an optimizer walks with the "
        "noise that is left. OPD's gradient on the full vocabulary is zero itself as long as the model is its teacher, and "
        "points back as soon as it is not. Published with an 8B model and Adam; here all learning rates fall linearly to 0."
    )
    return Finding(
        verdict(list(own.values()), list(taught.values())),
        f"{percent(start)} at the start; self-SFT down to {percent(worst[0])}, OPD never below {percent(kept[0])}",
        why,
        (_table(results, found),),
        tuple(_panel(results, optimizer, start) for optimizer in RATES),
    )


def verdict(own: list[bool], taught: list[bool]) -> Verdict:
    """From which pairs of optimizer and rate lose, for self-SFT and for OPD."""
    if all(own) and not any(taught):
        return "reproduced"
    return "partly" if sum(own) / len(own) > sum(taught) / len(taught) else "not"


def below(share: Estimate, start: float) -> bool:
    """Whether it ended below the start by more than its interval."""
    return share[0] + share[1] < start


def told(results: Results, corner: tuple[str, str, str]) -> str:
    return f"{corner[1]}, {results.rate(name_of(*corner)):g}"


def _table(results: Results, found: dict[tuple[str, str, str], Estimate]) -> str:
    rows = []
    for optimizer in RATES:
        for level in LEVELS:
            here = {m: found[m, optimizer, level] for m in METHODS if (m, optimizer, level) in found}
            if here:
                rate = results.rate(name_of(next(iter(here)), optimizer, level))
                cells = [percent(here[m]) if m in here else "–" for m in METHODS]
                rows.append((optimizer, f"{rate:g}", percent(results.level("student")), *cells))
    return table(("optimizer", "rate", "start", "self-SFT", "OPD, full", "OPD, sampled token"), rows)


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
        "steps": 100,
        "rollout": {"prompts_per_step": 64, "samples_per_prompt": 1, "max_tokens": 32},
        "optim": {"tokens_per_micro_batch": 2048, "schedule": "linear"},
        "device": "cpu",
        "threads": 1,
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
    claim=Claim(
        says="SFT on a model's own samples degrades instruction following at any practical learning rate, although the samples "
        "come from the model itself; on-policy distillation, whose teacher stays fixed, does not.",
        source="[Thinking Machines 2025](https://thinkingmachines.ai/blog/on-policy-distillation/)",
        short="SFT on own samples degrades; OPD with a fixed teacher does not",
    ),
    find=find,
)
