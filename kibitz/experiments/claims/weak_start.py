"""What becomes of a student that starts weak, when it learns from its own text, and what helps it."""

import math
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from kibitz.experiments.charts import Line, Panel
from kibitz.experiments.claims.methods import NAVIGATION
from kibitz.experiments.design import Arm, Claim, Experiment
from kibitz.experiments.evidence import Finding, Verdict, percent
from kibitz.experiments.results import Estimate, NotRun, Results, gflop
from kibitz.experiments.tables import table

STEPS, WARMUP = 60, 20
PLAIN, WARM, SKD, PREFIX = "opd", "warm-opd", "skd", "prefix"
METHODS = {
    PLAIN: "plain OPD",
    WARM: "SFT warm-up, then OPD",
    SKD: "SKD, K from 4 to 1",
    PREFIX: "OPD on growing beginnings",
}
CURES = (WARM, SKD)
STARTS: Mapping[str, tuple[str, str]] = {
    "misled": ("student", "the student as it is"),
    "early": ("early", "300 steps from nothing"),
    "wrecked": ("arm:wrecked", "the student after ten steps at a rate of 0.014"),
}
"""Name -> the model's name in a recipe, and what it is."""


EARLY = Arm(
    "early",
    f"a start: {STARTS['early'][1]}, as the shipped student was made in 1200",
    {
        "student": {"model": "blank:64x3"},
        "method": {"type": "sft"},
        "steps": 300,
        "rollout": {"prompts_per_step": 32},
        "optim": {"name": "muon", "muon_lr": 2e-2, "weight_decay": 0.01, "warmup_steps": 10},
    },
    rates=(5e-3,),
    data="wide",
)


# It could calculate; a wild rate makes it write what it never wrote.
WRECKED = Arm(
    "wrecked",
    f"a start: {STARTS['wrecked'][1]}, on right solutions",
    {"method": {"type": "sft"}, "steps": 10, "optim": {"warmup_steps": 0, "schedule": "constant"}},
    rates=(1.4e-2,),
)


def _arms(start: str) -> tuple[Arm, ...]:
    model, what = STARTS[start]

    def arm(name: str, words: str, method: dict[str, Any], steps: int = STEPS, student: str = model) -> Arm:
        changes = {"method": method, "steps": steps, "student": {"model": student}}
        return Arm(f"{name}-{start}", f"{what}: {words}", changes)

    return (
        arm(PLAIN, METHODS[PLAIN], {"type": "opd"}),
        arm("warm", "SFT, the warm-up alone", {"type": "sft"}, WARMUP),
        arm(WARM, METHODS[WARM], {"type": "opd"}, STEPS - WARMUP, f"arm:warm-{start}"),
        arm(SKD, METHODS[SKD], {"type": "skd", "divergence": "reverse_kl", "accept_top_k": 4, "decay": 6}),
        arm(PREFIX, METHODS[PREFIX], {"type": "opd", "prefix_tokens": 8}),
    )


def level(results: Results, start: str) -> float:
    """The accuracy that a start has, before anything is tried on it."""
    model = STARTS[start][0]
    return results.accuracy(model.removeprefix("arm:"))[0] if model.startswith("arm:") else results.level(model)


def start_kl(results: Results, start: str) -> float:
    model = STARTS[start][0]
    if model.startswith("arm:"):
        return results.mean(model.removeprefix("arm:"), lambda run: run["test"]["reverse_kl"])[0]
    return results.model(model)["reverse_kl"]


def closed(results: Results, start: str, method: str) -> Estimate:
    """The share of the way from the start to the teacher; 0 where the start is as good."""
    here, top = level(results, start), results.level("teacher")
    end, half = results.accuracy(f"{method}-{start}")
    return ((end - here) / (top - here), half / (top - here)) if top > here else (0.0, 0.0)


def verdict(shares: Mapping[str, Mapping[str, Estimate]]) -> Verdict:
    """`shares`: start -> method -> the share of its way that it goes, the strongest start first. The claim has two halves: plain
    OPD goes less of its way from a weak start than from the strongest, and a cure goes further there. Reproduced: both hold
    at every weaker start, by the interval of the difference; partly: one of them at one of them."""
    strongest, *weaker = shares
    bad = [above(shares[strongest][PLAIN], shares[start][PLAIN]) for start in weaker]
    cured = [
        any(above(shares[start][cure], shares[start][PLAIN]) for cure in CURES if cure in shares[start])
        for start in weaker
    ]
    return "reproduced" if all(bad) and all(cured) else "partly" if any(bad) or any(cured) else "not"


def above(one: Estimate, other: Estimate) -> bool:
    return one[0] - other[0] > math.hypot(one[1], other[1])


def find(results: Results) -> Finding:
    """End against start, for each method, and how much of the text the teacher wrote."""
    starts = [start for start in STARTS if results.has(f"{PLAIN}-{start}")]
    if len(starts) < 2:
        raise NotRun(f"{PLAIN}-{next(start for start in STARTS if start not in starts)}")
    starts.sort(key=lambda start: -level(results, start))
    ends = {
        start: {m: results.accuracy(f"{m}-{start}") for m in METHODS if results.has(f"{m}-{start}")} for start in starts
    }
    rows = [
        (
            STARTS[start][1], percent(level(results, start)), f"{start_kl(results, start):.2f}", METHODS[method], percent(found),
            percent(closed(results, start, method)), f"{_cost(results, start, method):.0f}",
            _written(results, start, method),
        )
        for start in starts for method, found in ends[start].items()
    ]  # fmt: skip
    head = ("start", "its accuracy, %", "its reverse KL", "what is done", "accuracy, %", "of the way to the teacher, %", "GFLOP",
            "the teacher writes, first to last step, %")  # fmt: skip
    shares = {start: {m: closed(results, start, m) for m in found} for start, found in ends.items()}
    weakest = starts[-1]
    best = max(ends[weakest], key=lambda method: ends[weakest][method][0])
    return Finding(
        verdict(shares),
        f"from {percent(level(results, weakest))}: plain OPD {percent(ends[weakest][PLAIN])}, "
        f"best {METHODS[best]} {percent(ends[weakest][best])}; from {percent(level(results, starts[0]))}: plain OPD "
        f"{percent(ends[starts[0]][PLAIN])}",
        _why(results, ends),
        (table(head, rows),),
        _panels(results, ends),
    )


def _cost(results: Results, start: str, method: str) -> float:
    """GFLOP of student and teacher, the warm-up's too."""
    spent = results.mean(f"{method}-{start}", gflop)[0]
    return spent + (results.mean(f"warm-{start}", gflop)[0] if method == WARM else 0.0)


def written(results: Results, start: str) -> list[float]:
    """The share of SKD's tokens that the teacher wrote, of each step; a mean over seeds. One less it is accepted."""
    runs = [run["series"]["teacher_written"] for run in results.runs(f"{SKD}-{start}")]
    return [fmean(shares) for shares in zip(*runs, strict=True)]


def _written(results: Results, start: str, method: str) -> str:
    if method != SKD:
        return "–"
    shares = written(results, start)
    return f"{percent(shares[0])} → {percent(shares[-1])}"


def _why(results: Results, ends: Mapping[str, Mapping[str, Estimate]]) -> str:
    plain = "; ".join(
        f"from {percent(level(results, start))} to {percent(found[PLAIN])} "
        f"({percent(closed(results, start, PLAIN)[0])}% of the way to the teacher)"
        for start, found in ends.items()
    )
    best = "; ".join(
        f"{METHODS[m]} {percent(found[m][0])} from {percent(level(results, start))}"
        for start, found in ends.items()
        for m in [max(found, key=lambda method: found[method][0])]
    )
    told = " ".join(_against_plain(results, ends, method) for method in METHODS if method != PLAIN)
    return (
        f"All have {STEPS} steps and the same number of rollouts, the warm-up's included. Plain OPD goes {plain}. {told} The "
        f"best at each start: {best}. {_elsewhere(results)}What differs from the published setting: toy "
        f"models, {STEPS} steps, and one of the starts made by a rate that is far too high."
    )


def _elsewhere(results: Results) -> str:
    """The same question where `methods-navigation` was run: a student that goes astray has to come back."""
    walks = Results(NAVIGATION, results.folder.parent / NAVIGATION.home)
    pairs = {"reverse": ("opd", "skd-k2-rkl"), "forward": ("opd-fkl", "skd-k2-fkl")}
    if not all(walks.has(*pair) for pair in pairs.values()):
        return ""
    told = "; ".join(
        f"with {kl} KL {percent(walks.accuracy(plain))} by plain OPD and {percent(walks.accuracy(skd))} by SKD with K=2"
        for kl, (plain, skd) in pairs.items()
    )
    return f"In the world navigation, from a start of {percent(walks.level('student'))} (`{NAVIGATION.name}`): {told}. "


def _against_plain(results: Results, ends: Mapping[str, Mapping[str, Estimate]], method: str) -> str:
    both = {start: (found[method], found[PLAIN]) for start, found in ends.items() if method in found}
    parts = [
        f"{where} plain OPD from {', '.join(starts)}"
        for where, starts in (
            ("above", [percent(level(results, start)) for start, (this, plain) in both.items() if above(this, plain)]),
            ("below", [percent(level(results, start)) for start, (this, plain) in both.items() if above(plain, this)]),
        )
        if starts
    ]
    return f"{METHODS[method]}: {' and '.join(parts) or 'not told apart from plain OPD anywhere'}."


def _panels(results: Results, ends: Mapping[str, Mapping[str, Estimate]]) -> tuple[Panel, ...]:
    lines = [
        Line(
            words,
            [(x + shift, *found[method]) for x, found in enumerate(ends.values()) if method in found],
            joined=False,
        )
        for shift, (method, words) in zip((-0.15, -0.05, 0.05, 0.15), METHODS.items(), strict=True)
    ]
    before = Line("before", [(x, level(results, start), 0.0) for x, start in enumerate(ends)], joined=False)
    return (
        Panel(
            "where a start leads", "start", "accuracy at the end", [*lines, before],
            levels={"teacher": results.level("teacher")}, ticks={float(x): start for x, start in enumerate(ends)},
        ),
        Panel(
            "SKD: how much the teacher writes", "step", "tokens of the teacher's",
            [Line(start, [(step, share, 0.0) for step, share in enumerate(written(results, start), 1)])
             for start, found in ends.items() if SKD in found],
        ),
    )  # fmt: skip


EXPERIMENT = Experiment(
    name="weak-start",
    question="How does a student fare that starts weak and learns from its own text, and what cures it?",
    world="arithmetic",
    recipe={
        "rollout": {"prompts_per_step": 64, "samples_per_prompt": 1, "max_tokens": 64},
        "optim": {"warmup_steps": 10},
        "threads": 1,
    },
    models={
        "student": "arithmetic/student",
        "teacher": "arithmetic/teacher",
        "early": "arm:early",
    },
    data={"prompts": {"world": "arithmetic"}, "wide": {"world": "arithmetic-wide"}},
    makers=(EARLY,),
    arms=(WRECKED, _arms("misled")[0], *(arm for start in ("early", "wrecked") for arm in _arms(start))),
    rates=(1e-3, 2e-3),
    extensions=1,
    reference="opd-misled",
    dev_problems=256,
    seeds=5,
    series=("teacher_written",),
    quick_arms=("wrecked", "opd-misled", "opd-wrecked", "skd-wrecked"),
    claim=Claim(
        says="A student that starts weak writes bad rollouts, on which the teacher's feedback is bad; a warm-up by SFT, or text "
        "in which the teacher replaces what it finds unlikely (SKD), cures it.",
        source="[SKD](https://arxiv.org/abs/2410.11325)",
        short="a weak start makes bad rollouts and bad feedback; a warm-up or SKD cures it",
    ),
    find=find,
)
