"""A real language model with a fifth of its layers cut out: who heals it, its own mistakes or the whole model's text?"""

import json
from collections.abc import Mapping, Sequence
from math import sqrt
from pathlib import Path
from statistics import fmean, variance
from typing import Any

import torch

from kibitz.config import ModelConfig
from kibitz.evaluate.statistics import t_quantile
from kibitz.experiments import real
from kibitz.experiments.charts import Panel
from kibitz.experiments.design import OF_ARM, Arm, Experiment
from kibitz.experiments.evidence import Finding, Verdict
from kibitz.experiments.records import Record, half_of_seeds, read
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
NUM_READ = 24  # test prompts on which everybody is compared, prompt by prompt
SHOWN = 3  # of them, whose greedy answers by everybody are kept
AT_TOKENS = "@tokens"
"""Behind the name of an arm that takes more steps than OPD: its checkpoint after as many tokens as OPD learns from."""
Texts = Sequence[Mapping[str, float]]
"""Of each prompt the sums over the tokens of one text: `tokens`, `reverse_kl`, `forward_kl`, `agreed`."""


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
    """Everybody on the same held-out prompts: how far from the teacher on the text that each writes itself and on the
    teacher's, short questions, and a few greedy answers."""
    rows, max_tokens = real.instructions()["test"][-NUM_READ:], study.untrained().rollout.max_tokens
    asked = _rows(Path(study.made("made:facts")) / "test.jsonl")
    teacher = _loaded(study.place("teacher", seed))
    written = real.samples(teacher, rows, max_tokens, seed)
    found: Record = {"prompts": [row["prompt"] for row in rows[:SHOWN]], "own": {}, "theirs": {}, "facts": {}}
    found["num_facts"] = len(asked)
    found["texts"] = {"teacher": _said(teacher, rows[:SHOWN], max_tokens)}
    for name, place in _places(study, seed).items():
        model = _loaded(place)
        found["own"][name] = real.distances(model, teacher, real.samples(model, rows, max_tokens, seed))
        if name.endswith(AT_TOKENS):
            continue
        found["theirs"][name] = real.distances(model, teacher, written)
        found["facts"][name] = real.num_right(model, asked)
        found["texts"][name] = _said(model, rows[:SHOWN], max_tokens)
    return found


def _places(study: Any, seed: int) -> dict[str, str]:
    """The student before, each arm's last checkpoint, and that of STEPS where an arm took more."""
    found = {"student": study.place("student", seed)}
    for arm in study.experiment.arms:
        found[arm.name] = study.place(f"{OF_ARM}{arm.name}", seed)
        earlier = Path(found[arm.name]).with_name(f"step-{STEPS:06d}")
        if earlier.is_dir() and earlier != Path(found[arm.name]):
            found[arm.name + AT_TOKENS] = str(earlier)
    return found


def _said(model: LanguageModel, rows: Sequence[Mapping[str, Any]], max_tokens: int) -> list[str]:
    return [real.text_of(model, rollout) for rollout in real.answers(model, rows, max_tokens)]


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _loaded(name: str) -> LanguageModel:
    return load_model(ModelConfig(model=name), "model", torch.device("cpu"))


# ------------------------------------------------------------------ what it says


def find(results: Results) -> Finding:
    """The reverse KL to the whole model on text of one's own, of OPD and its rivals, prompt by prompt."""
    probes = results.probes()
    names = [name for name in METHODS if results.has(name) and all(name in record["own"] for record in probes)]
    if names[:1] != ["opd"] or len(names) < 2:
        raise NotRun("opd" if names[:1] != ["opd"] else " or ".join(RIVALS))
    before, everybody = results.model("student"), ("student", *names)
    gaps = {name: gaps_of(probes, name) for name in names[1:]}
    numbers = {
        "before": before["reverse_kl"],
        "cut_off_before": before["cut_off"],
        "test": {name: results.mean(name, lambda run: run["test"]["reverse_kl"]) for name in names},
        "own": {name: mean_of(probes, "own", name) for name in everybody},
        "tokens": {name: mean_of(probes, "own", at_tokens(probes[0], name)) for name in names},
        "reading": {kind: {name: mean_of(probes, "theirs", name, kind) for name in everybody}
                    for kind in ("reverse_kl", "forward_kl", "agreed")},
        "gaps": gaps,
        "steps": {name: results.runs(name)[0]["settings"]["recipe"]["steps"] for name in names},
        "rates": {name: results.rate(name) for name in names},
        "seeds": len(probes),
        "tflop": {name: results.mean(name, gflop)[0] / 1e3 for name in names},
        "learnt": {name: results.mean(name, lambda run: run["tokens"])[0] for name in names},
        "cut_off": {name: results.mean(name, lambda run: run["test"]["cut_off"]) for name in names},
        "teacher_cut_off": results.model("teacher")["cut_off"],
        "facts": {name: fmean(record["facts"][name] / record["num_facts"] for record in probes) for name in everybody},
        "num_facts": probes[0]["num_facts"],
        "num_prompts": before["num_prompts"],
        "num_read": len(probes[0]["own"]["student"]),
        "short": {name: {run["lr"]: run["dev"]["reverse_kl"] for run in results.made(f"{name}-short")} for name in METHODS},
        "short_steps": SHORT,
        "num_dev": results.experiment.dev_problems,
        "cut": read(results.folder / "cut.json"),
        "said": [(prompt, [probes[0]["texts"][name][place] for name in ("teacher", *everybody)])
                 for place, prompt in enumerate(probes[0]["prompts"])],
        "abouts": ABOUTS,
    }  # fmt: skip
    return Finding(verdict(gaps, len(probes)), numbers, (_panel(names, numbers),))


def at_tokens(record: Record, name: str) -> str:
    """The checkpoint of an arm that learnt from as many tokens as OPD."""
    return name + AT_TOKENS if name + AT_TOKENS in record["own"] else name


def mean_of(probes: Sequence[Record], where: str, name: str, kind: str = "reverse_kl") -> Estimate:
    """A figure a token, the mean over seeds of each one's, with the interval of seeds."""
    found = [_sum(record[where][name], kind) / _sum(record[where][name], "tokens") for record in probes]
    return fmean(found), half_of_seeds(found)


def _sum(texts: Texts, kind: str) -> float:
    return sum(text[kind] for text in texts)


def gaps_of(probes: Sequence[Record], rival: str) -> dict[str, list[Estimate]]:
    """By how much a rival is farther from the teacher than OPD, in nats a token, at equal tokens and at equal FLOPs: for each
    seed the mean over prompts, each with its own text of either, and half its 95% interval."""
    found: dict[str, list[Estimate]] = {"tokens": [], "flops": []}
    for record in probes:
        ours = record["own"]["opd"]
        for by, name in (("tokens", at_tokens(record, rival)), ("flops", rival)):
            found[by].append(paired(ours, record["own"][name]))
    return found


def paired(ours: Texts, theirs: Texts) -> Estimate:
    """The mean difference of what two models' texts cost a token, prompt by prompt, with half its interval over prompts."""
    differences = [
        b["reverse_kl"] / b["tokens"] - a["reverse_kl"] / a["tokens"] for a, b in zip(ours, theirs, strict=True)
    ]
    num = len(differences)
    half = t_quantile(num - 1) * sqrt(variance(differences) / num) if num > 1 else 0.0
    return fmean(differences), half


def verdict(gaps: Mapping[str, Mapping[str, Sequence[Estimate]]], seeds: int) -> Verdict:
    """Reproduced if in every one of two seeds or more OPD is nearer to the teacher than each rival by more than the interval
    over prompts, at equal tokens and at equal FLOPs; partly if it is nearer in the mean of the seeds; else not."""
    every = [found for by in gaps.values() for found in by.values()]
    if seeds > 1 and all(mean > half for found in every for mean, half in found):
        return "reproduced"
    return "partly" if all(fmean(mean for mean, _ in found) > 0 for found in every) else "not"


def _panel(names: Sequence[str], numbers: Mapping[str, Any]) -> Panel:
    """The distance to the teacher of every arm, at equal tokens and at equal FLOPs."""
    series = {"equal tokens": numbers["tokens"], "equal FLOPs": {name: numbers["own"][name] for name in names}}
    levels = {"the student before": numbers["own"]["student"][0]}
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
    find=find,
)
