"""An assistant reads a company's documents, forgets to follow instructions, and gets that back from its own earlier self."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from kibitz.experiments.charts import Line, Panel
from kibitz.experiments.design import Arm, Claim, Experiment
from kibitz.experiments.evidence import Finding, Verdict, percent
from kibitz.experiments.records import half_of_seeds, measure
from kibitz.experiments.results import Estimate, Results
from kibitz.experiments.tables import table

SHARES = (100, 70, 50, 30, 0)  # of documents, in percent; the rest is chat
MIXED = 70  # the share that is recovered from, round after round
ROUNDS = (1, 2, 3)
BOTH = ("questions", "instructions")
LEARNING = (1e-3, 2e-3, 4e-3)
RECOVERING = (1e-4, 2.5e-4, 5e-4)
PUBLISHED = {
    "student": "18 / 85",
    "documents-100": "43 / 45",
    f"documents-{MIXED}": "36 / 79",
    f"recover-{MIXED}": "41 / 83",
}


def find(results: Results) -> Finding:
    """What mid-training took from instruction following, what OPD brought back, and what that cost in facts."""
    learnt, recovered = f"documents-{MIXED}", f"recover-{MIXED}"
    lost = {arm: change(results, None, arm, "instructions") for arm in _mixes(results)}
    back = change(results, learnt, recovered, "instructions")
    facts = change(results, learnt, recovered, "questions")
    gained = change(results, None, learnt, "questions")
    keeps = [arm for arm, lose in lost.items() if not clear(lose, below=True)]
    steps = [run.get("step", 0) for run in results.runs(recovered)]
    why = (
        f"Read alone, the documents take the questions about them from {percent(results.level('student', name='questions'))} "
        f"to {_both(results, 'documents-100')[0]}% and the instructions from "
        f"{percent(results.level('student', name='instructions'))} to {_both(results, 'documents-100')[1]}%. "
        f"With {100 - MIXED}% chat among them it is {' and '.join(_both(results, learnt))}%. OPD from there with the old "
        f"checkpoint as the teacher changes the instructions by {percent(back)} points, where {percent(lost[learnt])} went, and "
        f"the questions by {percent(facts)}, "
        f"stopped where the mean of both is best on the dev split, after {fmean(steps):g} of {_steps(results, recovered)} steps. "
        + (f"Of the mixes, {' and '.join(keeps)} kept its instructions, where none did in the publication. " if keeps else
           "No mix keeps the instructions, as published. ")
        + _of_rounds(results)
        + "The checkpoint is chosen by questions about other facts than those of the test. Differences are within seeds, with "
        "the interval over seeds. On the toy world the facts stand in 30 forms of document and are asked in a form of their "
        "own. The chat's answers are samples of the model before, as in the publication, with its mistakes."
    )  # fmt: skip
    return Finding(
        verdict(gained, lost[learnt], back, facts),
        f"questions / instructions {_cell(results, 'student')}; {MIXED}% documents {_cell(results, learnt)}; "
        f"+ OPD {_cell(results, recovered)}",
        why,
        (_table(results), _rounds(results)),
        (_sweep(results), _course(results), _alternation(results)),
    )


def verdict(gained: Estimate, lost: Estimate, back: Estimate, facts: Estimate) -> Verdict:
    """From four changes: facts by mid-training, instructions by mid-training, instructions by OPD, facts by OPD. Reproduced,
    if OPD brings back half of what was lost or more, as in the publication, and the facts stay."""
    if not (clear(gained) and clear(back)):
        return "not"
    kept = not clear(facts, below=True) or -facts[0] < 0.25 * gained[0]
    return "reproduced" if clear(lost, below=True) and back[0] >= -0.5 * lost[0] and kept else "partly"


def clear(change: Estimate, below: bool = False) -> bool:
    """Whether it is above 0, or below, by more than its interval."""
    mean, half = change
    return mean + half < 0 if below else mean - half > 0


def change(results: Results, before: str | None, after: str, name: str) -> Estimate:
    """In the accuracy of one measure, from an arm (or the model as it was) to another: the mean over seeds of each one's."""
    if before is not None:
        return results.difference(after, before, name)
    shares = results.shares(after, name=name)
    return fmean(shares) - results.level("student", name=name), half_of_seeds(shares)


# ------------------------------------------------------------------ tables


def _mixes(results: Results) -> list[str]:
    return [f"documents-{share}" for share in SHARES if results.has(f"documents-{share}")]


def _both(results: Results, arm: str) -> list[str]:
    return [percent(results.accuracy(arm, name=name)) for name in BOTH]


def _cell(results: Results, arm: str) -> str:
    level = results.level if arm == "student" else lambda *_, name: fmean(results.shares(arm, name=name))
    return " / ".join(f"{100 * level('student', name=name):.0f}" for name in BOTH)


def _steps(results: Results, arm: str) -> int:
    return results.runs(arm)[0]["settings"]["recipe"]["steps"]


def _table(results: Results) -> str:
    abouts = {arm.name: arm.about for arm in results.experiment.arms}
    level = [percent(results.level("student", name=name)) for name in BOTH]
    rows = [("the model before", *level, PUBLISHED["student"])]
    arms = [*_mixes(results), *(f"recover-{share}" for share in (100, MIXED) if results.has(f"recover-{share}"))]
    rows += [(abouts[arm], *_both(results, arm), PUBLISHED.get(arm, "–")) for arm in arms]
    return table(("", "questions, %", "instructions, %", "published"), rows)


def _chain(recovering: bool) -> list[str]:
    """The arms of the rounds one after another: learn, recover, learn and so on; or without the recoveries."""
    if not recovering:
        return [f"documents-{MIXED}", *(f"straight-{number}" for number in ROUNDS[1:])]
    later = [name for number in ROUNDS[1:] for name in (f"learn-{number}", f"recover-learn-{number}")]
    return [f"documents-{MIXED}", f"recover-{MIXED}", *later]


def _sets(results: Results) -> list[str]:
    return [f"questions-{number}" for number in ROUNDS[1:] if f"questions-{number}" in results.experiment.measures]


def _rounds(results: Results) -> str:
    abouts = {arm.name: arm.about for arm in results.experiment.arms}
    names = ["questions", *_sets(results), "instructions"]
    chains = [*_chain(recovering=True), *_chain(recovering=False)[1:]]
    rows = [
        (abouts[arm], *(percent(results.accuracy(arm, name=name)) for name in names))
        for arm in chains
        if results.has(arm)
    ]
    return table(("", "questions 1", *(f"questions {n[-1]}" for n in names[1:-1]), "instructions"), rows)


def _of_rounds(results: Results) -> str:
    last, straight = _chain(recovering=True)[-1], _chain(recovering=False)[-1]
    if not results.has(last, straight):
        return ""
    return (
        f"After {len(ROUNDS)} rounds of documents, each followed by OPD, the instructions are at "
        f"{percent(results.accuracy(last, name='instructions'))}% and the questions about the {len(ROUNDS)} sets at "
        f"{' / '.join(percent(results.accuracy(last, name=name)) for name in ('questions', *_sets(results)))}%; without the "
        f"OPD between, {percent(results.accuracy(straight, name='instructions'))}% and "
        f"{' / '.join(percent(results.accuracy(straight, name=name)) for name in ('questions', *_sets(results)))}%: what was "
        "read in earlier rounds goes either way. "
    )


# ------------------------------------------------------------------ plots


def _sweep(results: Results) -> Panel:
    shares = {arm: float(arm.rpartition("-")[2]) for arm in _mixes(results)}
    lines = [
        Line(
            name,
            [(share, *results.accuracy(arm, name=name)) for arm, share in sorted(shares.items(), key=lambda s: s[1])],
        )
        for name in BOTH
    ]
    levels = {f"{name} before": results.level("student", name=name) for name in BOTH}
    return Panel("what is read", "documents, % of the mix", "accuracy", lines, levels)


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


def _alternation(results: Results) -> Panel:
    lines = []
    for name, recovering in (("instructions", True), ("instructions", False), ("questions", True)):
        chain = [arm for arm in _chain(recovering) if results.has(arm)]
        places: Sequence[int] = range(1, 7) if recovering else (1, 3, 5)
        points = [(float(x), *results.accuracy(arm, name=name)) for x, arm in zip(places, chain, strict=False)]
        label = (
            f"{name}, {'with' if recovering else 'without'} recovery"
            if name == "instructions"
            else "questions of set 1"
        )
        lines.append(Line(label, points, dashed=not recovering))
    ticks = {1.0: "learn", 2.0: "recover", 3.0: "learn", 4.0: "recover", 5.0: "learn", 6.0: "recover"}
    return Panel("three rounds", "", "accuracy", lines, ticks=ticks)


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


EXPERIMENT = Experiment(
    name="assistant",
    question="Can a model learn new facts from documents, and get back by OPD the instruction following that it lost on the way?",
    world="assistant",
    recipe={
        "steps": 250,
        "method": {"type": "sft"},
        "rollout": {"prompts_per_step": 32, "samples_per_prompt": 1, "max_tokens": 32},
        "optim": {"warmup_steps": 10, "tokens_per_micro_batch": 2048},
        "device": "cpu",
        "threads": 1,
    },
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
    claim=Claim(
        says="Qwen3-8B, mid-trained on internal documents: questions about them / IF-eval go from 18 / 85 to 43 / 45 (100% "
        "documents) or 36 / 79 (70% documents, 30% chat); no mix keeps IF-eval. OPD from the original model then gives 41 / 83: "
        "learning and recovering can alternate, for continual learning.",
        source="[Thinking Machines 2025](https://thinkingmachines.ai/blog/on-policy-distillation/)",
        short="mid-training costs instruction following, OPD from the old checkpoint restores it and keeps the facts",
    ),
    find=find,
)
