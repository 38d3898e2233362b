"""A real language model with a fifth of its layers cut out: who heals it, its own mistakes or the whole model's text?"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch

from kibitz.config import ModelConfig
from kibitz.experiments import real
from kibitz.experiments.charts import Panel
from kibitz.experiments.design import OF_ARM, Arm, Experiment
from kibitz.experiments.evidence import Finding, Verdict
from kibitz.experiments.records import Record, half_of_seeds, measure, read
from kibitz.experiments.results import NotRun, Results, gflop
from kibitz.experiments.shapes import compared
from kibitz.experiments.statistics import Estimate
from kibitz.models import LanguageModel, load_model

STEPS = 8
EQUAL_FLOPS = 10  # steps of SFT, which needs no teacher's scores, for the FLOPs of STEPS of OPD
EVERY = 8
SHORT = 4  # steps of the runs by which rates are chosen
METHODS: Mapping[str, Mapping[str, Any]] = {
    "opd": {"type": "opd"},
    "kd": {"type": "gkd", "on_policy": 0, "source": "teacher", "divergence": "forward_kl"},
    "sft": {"type": "sft", "source": "teacher"},
}
ABOUTS = {
    "opd": "reverse KL on the student's text",
    "kd": "forward KL on the teacher's text",
    "sft": "cross-entropy on the teacher's text",
}
RIVALS = ("kd", "sft")
NUM_READ = 16  # test prompts whose answers by the teacher are read for the agreement
SHOWN = 3  # of them, whose answers by everybody are kept


def short(name: str) -> Arm:
    """The run by which a rate is chosen."""
    changes = {"method": METHODS[name], "steps": SHORT, "optim": {"warmup_steps": 1}}
    return Arm(f"{name}-short", f"{ABOUTS[name]}, {SHORT} steps", changes, measures=("divergence",))


def whole(name: str) -> Arm:
    steps = EQUAL_FLOPS if name == "sft" else STEPS
    changes = {"method": METHODS[name], "steps": steps}
    return Arm(name, ABOUTS[name], changes, every=EVERY, measures=("divergence",), rate_of=f"{name}-short")


# ------------------------------------------------------------------ what is looked at


def probe(study: Any, seed: int) -> Record:
    """Top-1 agreement on the teacher's greedy answers, and a few answers by everybody."""
    rows = real.instructions()["test"][-NUM_READ:]
    max_tokens = study.untrained().rollout.max_tokens
    teacher = _loaded(study.place("teacher", seed))
    texts = real.answers(teacher, rows, max_tokens)
    found: Record = {
        "prompts": [row["prompt"] for row in rows[:SHOWN]],
        "agreement": {},
        "texts": {"teacher": [real.text_of(teacher, rollout) for rollout in texts[:SHOWN]]},
    }
    del teacher
    places = {"student": "student", **{arm.name: f"{OF_ARM}{arm.name}" for arm in study.experiment.arms}}
    for name, place in places.items():
        model = _loaded(study.place(place, seed))
        found["agreement"][name] = real.agreement(model, texts)
        found["texts"][name] = [
            real.text_of(model, rollout) for rollout in real.answers(model, rows[:SHOWN], max_tokens)
        ]
    return found


def _loaded(name: str) -> LanguageModel:
    return load_model(ModelConfig(model=name), "model", torch.device("cpu"))


# ------------------------------------------------------------------ what it says


def find(results: Results) -> Finding:
    """Reverse KL to the whole model at equal tokens, on the dev prompts, and at equal FLOPs, on the test prompts."""
    names = [name for name in METHODS if results.has(name)]
    if names[:1] != ["opd"] or len(names) < 2:
        raise NotRun("opd")
    before = results.model("student")
    tokens = {name: at_step(results, name, STEPS) for name in names}
    flops = {name: results.mean(name, lambda run: run["test"]["reverse_kl"]) for name in names}
    probes = probes_of(results)
    numbers = {
        "before": before["reverse_kl"],
        "cut_off_before": before["cut_off"],
        "tokens": tokens,
        "flops": flops,
        "steps": {name: results.runs(name)[0]["settings"]["recipe"]["steps"] for name in names},
        "rates": {name: results.rate(name) for name in names},
        "seeds": {name: len(results.runs(name)) for name in names},
        "tflop": {name: results.mean(name, gflop)[0] / 1e3 for name in names},
        "cut_off": {name: results.mean(name, lambda run: run["test"]["cut_off"]) for name in names},
        "teacher_cut_off": results.model("teacher")["cut_off"],
        "facts": {"student": results.level("student", "greedy", "facts"), **{name: _facts(results, name) for name in names}},
        "num_facts": measure(before, "facts")["num_prompts"],
        "num_prompts": before["num_prompts"],
        "short": {name: {run["lr"]: run["dev"]["reverse_kl"] for run in results.made(f"{name}-short")} for name in METHODS},
        "short_steps": SHORT,
        "cut": read(results.folder / "cut.json"),
        "agreement": {name: _over(probes, name) for name in ("student", *names) if probes},
        "said": [
            (prompt, [probes[0]["texts"][name][place] for name in ("teacher", "student", *names)])
            for place, prompt in enumerate(probes[0]["prompts"] if probes else ())
        ],
        "abouts": ABOUTS,
    }  # fmt: skip
    return Finding(
        verdict(tokens, flops, min(numbers["seeds"].values())), numbers, (_panel(names, tokens, flops, before),)
    )


def at_step(results: Results, arm: str, step: int) -> Estimate:
    """The reverse KL on the dev prompts at a checkpoint, the mean over seeds with the interval of seeds."""
    found = [point["dev"]["reverse_kl"] for run in results.runs(arm) for point in run["curve"] if point["step"] == step]
    if not found:
        raise NotRun(f"{arm} at step {step}")
    return fmean(found), half_of_seeds(found)


def verdict(tokens: Mapping[str, Estimate], flops: Mapping[str, Estimate], seeds: int) -> Verdict:
    """Reproduced if OPD ends nearer to the teacher than each rival by more than both intervals, at equal tokens and at equal
    FLOPs; partly if it is nearer in the mean, or if an arm has one seed and so no interval; else not."""
    both = [(by["opd"], by[name]) for by in (tokens, flops) for name in RIVALS if name in by]
    if seeds > 1 and all(ours[0] + ours[1] < theirs[0] - theirs[1] for ours, theirs in both):
        return "reproduced"
    return "partly" if all(ours[0] < theirs[0] for ours, theirs in both) else "not"


def probes_of(results: Results) -> list[Record]:
    """What was looked at; nothing, while some arm has no run yet."""
    try:
        return results.probes()
    except NotRun:
        return []


def _facts(results: Results, name: str) -> Estimate | None:
    """The share of the questions that an arm answers rightly, where it was asked them."""
    asked = all("facts" in run["test"].get("measures", {}) for run in results.runs(name))
    return results.accuracy(name, "greedy", "facts") if asked else None


def _over(probes: Sequence[Record], name: str) -> Estimate:
    found = [record["agreement"][name] for record in probes]
    return fmean(found), half_of_seeds(found)


def _panel(
    names: Sequence[str], tokens: Mapping[str, Estimate], flops: Mapping[str, Estimate], before: Record
) -> Panel:
    """The distance to the teacher of every arm, at equal tokens and at equal FLOPs."""
    series = {"equal tokens (dev)": tokens, "equal FLOPs (test)": flops}
    levels = {"the student before (test)": before["reverse_kl"]}
    return compared("healing", "reverse KL to the whole model, nats", names, series, levels=levels, percent=False)


EXPERIMENT = Experiment(
    name="real-heal",
    question="A real model lost a fifth of its layers: does it come back by OPD, or by the text and scores of the whole one?",
    world="",
    recipe={
        "rollout": {"prompts_per_step": 8, "samples_per_prompt": 1, "max_tokens": 40},
        "optim": {"schedule": "constant", "warmup_steps": 2},
        "steps": STEPS,
        "threads": 1,
        "device": "cpu",
    },
    arms=tuple(whole(name) for name in METHODS),
    makers=tuple(short(name) for name in METHODS),
    rates=(5e-5, 1e-4, 2e-4),
    extensions=0,
    dev_problems=16,
    test_problems=40,
    seeds=2,
    quick_arms=("opd", "sft"),
    models={"student": "made:cut", "teacher": "made:whole"},
    data={
        "prompts": {"prompts": "made:prompts"},
        "facts": {"prompts": "made:facts", "grader": "constraints_strict"},
    },
    measures={"divergence": "prompts", "facts": "facts"},
    made={"cut": real.cut, "whole": real.whole, "prompts": real.prompts, "facts": real.facts},
    outside=True,
    probe=probe,
    find=None,  # until its runs are there
)
