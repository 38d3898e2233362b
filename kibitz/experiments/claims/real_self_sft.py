"""A real model is fine-tuned on its own samples, at three rates; and learns by OPD from a teacher that equals it."""

from collections.abc import Mapping
from typing import Any

from kibitz.experiments import real
from kibitz.experiments.design import Arm, Experiment
from kibitz.experiments.evidence import Finding, Verdict
from kibitz.experiments.results import NotRun, Results, steps
from kibitz.experiments.shapes import compared
from kibitz.experiments.statistics import Estimate, apart

RATES = {"low": 2e-5, "middle": 1e-4, "high": 5e-4}
METHODS: Mapping[str, Mapping[str, Any]] = {"self-sft": {"type": "sft", "source": "student"}, "opd": {"type": "opd"}}
ABOUTS = {
    "self-sft": "SFT on samples of the model as it is at each step",
    "opd": "OPD with its own start as the teacher",
}
OPD_AT = ("high",)  # where self-SFT suffers most
AWAY = 0.05  # nats a token: farther from the start than noise puts a model whose teacher is the start
STEPS = 8


def find(results: Results) -> Finding:
    """How far each run went from the model that it began with, and what that did to its answers."""
    own = [name for level in RATES if results.has(name := f"self-sft-{level}")]
    taught = [name for level in OPD_AT if results.has(name := f"opd-{level}")]
    if not own or not taught:
        raise NotRun("self-sft-high" if not own else "opd-high")
    names, start = [*own, *taught], results.level("student", "greedy", "facts")
    moved = {name: results.mean(name, lambda run: run["test"]["reverse_kl"]) for name in names}
    facts = {name: results.accuracy(name, "greedy", "facts") for name in names}
    first = results.runs(names[0])[0]
    numbers = {
        "start": start,
        "moved": moved,
        "facts": facts,
        "rates": {name: results.rate(name) for name in names},
        "abouts": {name: ABOUTS[name.rpartition("-")[0]] for name in names},
        "cut_off": {name: results.mean(name, lambda run: run["test"]["cut_off"]) for name in names},
        "cut_off_before": results.model("student")["cut_off"],
        "steps": steps(first),
        "rollout": first["settings"]["recipe"]["rollout"],
        "seeds": {name: len(results.runs(name)) for name in names},
        "num_facts": first["test"]["measures"]["facts"]["num_prompts"],
        "num_prompts": first["test"]["num_prompts"],
    }
    worse = {name: apart((start, 0.0), facts[name]) for name in names}
    panel = compared(
        "after training on oneself", "reverse KL to the start, nats", names, {"distance": moved}, percent=False
    )
    return Finding(verdict(moved, worse, own, taught), numbers, (panel,))


def verdict(moved: Mapping[str, Estimate], worse: Mapping[str, bool], own: list[str], taught: list[str]) -> Verdict:
    """Reproduced if every run of self-SFT answers fewer questions than before by more than its interval, and OPD does not;
    partly if self-SFT at any rate goes away from its start, and OPD does not; else not."""
    if any(moved[name][0] > AWAY or worse[name] for name in taught):
        return "not"
    if all(worse[name] for name in own):
        return "reproduced"
    return "partly" if any(moved[name][0] > AWAY for name in own) else "not"


def _arms() -> tuple[Arm, ...]:
    found = []
    for method, changes in METHODS.items():
        for level, rate in RATES.items():
            if method != "opd" or level in OPD_AT:
                found.append(
                    Arm(f"{method}-{level}", f"{ABOUTS[method]}; {level} rate", {"method": changes}, rates=(rate,))
                )
    return tuple(found)


EXPERIMENT = Experiment(
    name="real-self-sft",
    question="What becomes of a real model that is fine-tuned on its own samples, and of one that learns from its equal by OPD?",
    world="",
    recipe={
        "rollout": {"prompts_per_step": 8, "samples_per_prompt": 1, "max_tokens": 32},
        "optim": {"schedule": "constant", "warmup_steps": 1},
        "steps": STEPS,
        "threads": 1,
        "device": "cpu",
    },
    arms=_arms(),
    rates=tuple(RATES.values()),
    extensions=0,
    dev_problems=4,  # they choose nothing: each arm has one rate
    test_problems=40,
    seeds=1,
    quick_arms=("self-sft-high", "opd-high"),
    models={"student": "made:itself", "teacher": "made:whole"},
    data={
        "prompts": {"prompts": "made:prompts"},
        "facts": {"prompts": "made:facts", "grader": "constraints_strict"},
    },
    measures={"divergence": "prompts", "facts": "facts"},
    made={"itself": real.itself, "whole": real.whole, "prompts": real.prompts, "facts": real.facts},
    outside=True,
    find=find,
)
