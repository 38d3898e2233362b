"""An assistant reads a company's documents, forgets to follow instructions, and gets that back from its own earlier self."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from kibitz.experiments.charts import Line, Panel
from kibitz.experiments.design import TOY, Arm, Experiment, merged
from kibitz.experiments.evidence import Finding, Verdict
from kibitz.experiments.records import half_of_seeds, measure
from kibitz.experiments.results import Results
from kibitz.experiments.shapes import lines
from kibitz.experiments.statistics import Estimate

SHARES = (100, 70, 50, 30, 0)  # of documents, in percent; the rest is chat
MIXED = 70  # the share that is recovered from, round after round
ROUNDS = (1, 2, 3)
BOTH = ("questions", "instructions")
LEARNING = (1e-3, 2e-3, 4e-3)
RECOVERING = (1e-4, 2.5e-4, 5e-4)
PUBLISHED = {
    "documents-100": "43 / 45",
    f"documents-{MIXED}": "36 / 79",
    f"recover-{MIXED}": "41 / 83",
}


def find(results: Results) -> Finding:
    """Measure the loss of instruction following in mid-training, its recovery by OPD, and the facts lost in the recovery."""
    learnt, recovered = f"documents-{MIXED}", f"recover-{MIXED}"
    abouts = {arm.name: arm.about for arm in results.experiment.arms}
    mixes = [name for share in SHARES if results.has(name := f"documents-{share}")]
    lost = {arm: change(results, None, arm, "instructions") for arm in mixes}
    back, facts = (change(results, learnt, recovered, name) for name in ("instructions", "questions"))
    names = [name for name in results.experiment.measures if name.startswith("questions")]
    chains = [_chain(results, recovering=True), _chain(results, recovering=False)]
    numbers = {
        "student": {name: results.level("student", name=name) for name in BOTH},
        "alone": levels(results, "documents-100", BOTH),
        "learnt": levels(results, learnt, BOTH),
        "recovered": levels(results, recovered, BOTH),
        "documents": MIXED,
        "lost": lost,
        "taken": lost[learnt],
        "back": back,
        "facts": facts,
        "stopped": fmean(run.get("step", 0) for run in results.runs(recovered)),
        "steps": results.runs(recovered)[0]["settings"]["recipe"]["steps"],
        "rows": [(abouts[arm], levels(results, arm, BOTH), PUBLISHED.get(arm, "–"))
                 for arm in (*mixes, "recover-100", recovered) if results.has(arm)],
        "rounds": len(ROUNDS),
        "sets": names,
        "ends": [levels(results, chain[-1], (*names, "instructions")) for chain in chains],
        "chain": [(abouts[arm], levels(results, arm, (*names, "instructions"))) for arm in (*chains[0], *chains[1][1:])],
    }  # fmt: skip
    return Finding(
        verdict(change(results, None, learnt, "questions"), lost[learnt], back, facts),
        numbers,
        (_sweep(results, mixes), _course(results), _alternation(results, *chains)),
    )


def levels(results: Results, arm: str, names: Sequence[str]) -> dict[str, Estimate]:
    return {name: results.accuracy(arm, name=name) for name in names}


def _chain(results: Results, recovering: bool) -> list[str]:
    """The arms of the rounds one after another, of those that were run: learn, recover, learn and so on; or without the
    recoveries."""
    names = [f"documents-{MIXED}", *(f"straight-{number}" for number in ROUNDS[1:])]
    if recovering:
        later = [name for number in ROUNDS[1:] for name in (f"learn-{number}", f"recover-learn-{number}")]
        names = [f"documents-{MIXED}", f"recover-{MIXED}", *later]
    return [name for name in names if results.has(name)]


def verdict(gained: Estimate, lost: Estimate, back: Estimate, facts: Estimate) -> Verdict:
    """Judge four changes: facts by mid-training, instructions by mid-training, instructions by OPD, facts by OPD. Reproduced if
    OPD recovers at least half of what was lost, as in the publication, and the facts stay."""
    if not (clear(gained) and clear(back)):
        return "not"
    kept = not clear(facts, below=True) or -facts[0] < 0.25 * gained[0]
    return "reproduced" if clear(lost, below=True) and back[0] >= -0.5 * lost[0] and kept else "partly"


def clear(change: Estimate, below: bool = False) -> bool:
    """Return True if the change is above 0 (or below) by more than its interval."""
    mean, half = change
    return mean + half < 0 if below else mean - half > 0


def change(results: Results, before: str | None, after: str, name: str) -> Estimate:
    """In the accuracy of one measure, from an arm (or the model as it was) to another: the mean over seeds of each one's."""
    if before is not None:
        return results.difference(after, before, name)
    shares = results.shares(after, name=name)
    return fmean(shares) - results.level("student", name=name), half_of_seeds(shares)


# ------------------------------------------------------------------ plots


def _sweep(results: Results, mixes: Sequence[str]) -> Panel:
    by_share = {
        name: {float(arm.rpartition("-")[2]): results.accuracy(arm, name=name) for arm in mixes} for name in BOTH
    }
    before = {f"{name} before": results.level("student", name=name) for name in BOTH}
    return Panel("what is read", "documents, % of the mix", "accuracy", lines(by_share), before)


def _course(results: Results) -> Panel:
    """The recovery on the dev split, step by step."""
    runs = [run for run in results.runs(f"recover-{MIXED}") if run.get("curve")]
    lines = []
    for name in BOTH:
        points = []
        for at in range(min((len(run["curve"]) for run in runs), default=0)):
            found = [measure(run["curve"][at]["dev"], name)["sampled"]["accuracy"] for run in runs]
            points.append((float(runs[0]["curve"][at]["step"]), fmean(found), half_of_seeds(found)))
        lines.append(Line(name, points))
    return Panel("the way back (dev)", "steps of OPD", "accuracy", lines)


def _alternation(results: Results, recovering: Sequence[str], straight: Sequence[str]) -> Panel:
    series = {
        "instructions, with recovery": ("instructions", zip(range(1, 7), recovering, strict=False)),
        "instructions, without recovery": ("instructions", zip((1, 3, 5), straight, strict=False)),
        "questions of set 1": ("questions", zip(range(1, 7), recovering, strict=False)),
    }
    found = [
        Line(label, [(float(x), *results.accuracy(arm, name=name)) for x, arm in places], dashed="without" in label)
        for label, (name, places) in series.items()
    ]
    ticks = {float(place): ("recover", "learn")[place % 2] for place in range(1, 7)}
    return Panel("three rounds", "", "accuracy", found, ticks=ticks)


# ------------------------------------------------------------------ arms


def _recovery(start: str, about: str, rates: tuple[float, ...] = RECOVERING) -> Arm:
    return Arm(
        f"recover-{start.removeprefix('documents-')}",
        about,
        {
            "student": {"model": f"arm:{start}"},
            "teacher": {"model": "student"},
            "method": {"type": "opd"},
            "steps": 40,
            "rollout": {"prompts_per_step": 64},
        },
        rates=rates,
        data="chat",
        every=10,
        stop="best",
        judge=BOTH,
    )


def _reading(name: str, about: str, data: str, start: str = "student") -> Arm:
    """Chat is answered by the model as it was. One rate for the rounds that come later: the best of the first."""
    judge = ("instructions",) if data == "chat" else ("questions",)
    later = start != "student"
    changes: dict[str, Any] = {"student": {"model": f"arm:{start}"}} if later else {}
    if not data.startswith("documents-100"):
        changes |= {"teacher": {"model": "student"}, "method": {"type": "sft", "fill": "teacher"}}
    return Arm(name, about, changes, rates=LEARNING[1:2] if later else LEARNING, data=data, judge=judge)


def _arms() -> tuple[Arm, ...]:
    mixes = [
        _reading(f"documents-{s}", f"{s}% documents, {100 - s}% chat", f"documents-{s}" if s else "chat")
        for s in SHARES
    ]
    recoveries = [
        _recovery(f"documents-{s}", f"{s}% documents, then OPD from the old checkpoint") for s in (100, MIXED)
    ]
    rounds, before = [], (f"recover-{MIXED}", f"documents-{MIXED}")
    for number in ROUNDS[1:]:
        learn, straight, data = f"learn-{number}", f"straight-{number}", f"documents-{MIXED}-{number}"
        judge = (f"questions-{number}",)
        rounds += [
            replace(_reading(learn, f"round {number}: a new set of documents", data, before[0]), judge=judge),
            replace(
                _recovery(learn, f"round {number}: then OPD from the old checkpoint", RECOVERING[1:2]),
                judge=(*judge, "instructions"),
            ),
            replace(_reading(straight, f"round {number} without any OPD", data, before[1]), judge=judge),
        ]
        before = (f"recover-{learn}", straight)
    return (*mixes, *recoveries, *rounds)


def _documents(number: int, share: int) -> dict[str, Any]:
    world = "assistant-documents" if number == 1 else f"assistant-documents-{number}"
    return {"world": world, "options": {"chat": round(1 - share / 100, 2), "answered": False}}


ASSISTANT = merged(
    TOY,
    {
        "steps": 250,
        "method": {"type": "sft"},
        "rollout": {"prompts_per_step": 32, "max_tokens": 32},
        "optim": {"tokens_per_micro_batch": 2048},
        "device": "cpu",
    },
)

EXPERIMENT = Experiment(
    name="assistant",
    question="Can a model learn new facts from documents, and get back by OPD the instruction following that it lost on the way?",
    world="assistant",
    recipe=ASSISTANT,
    arms=_arms(),
    rates=LEARNING,
    extensions=1,
    dev_problems=256,
    test_problems=512,
    seeds=5,
    quick_arms=("documents-100", f"documents-{MIXED}", f"recover-{MIXED}", "learn-2"),
    models={"student": "assistant/student"},
    data={
        "chat": {"world": "assistant", "options": {"answered": False}},
        **{f"documents-{share}": _documents(1, share) for share in SHARES if share},
        **{f"documents-{MIXED}-{number}": _documents(number, MIXED) for number in ROUNDS[1:]},
        "questions": {"world": "assistant-documents"},
        **{f"questions-{number}": {"world": f"assistant-documents-{number}"} for number in ROUNDS[1:]},
        "instructions": {"world": "assistant-instructions"},
    },
    measures={name: name for name in ("questions", "instructions", *(f"questions-{number}" for number in ROUNDS[1:]))},
    find=find,
)
