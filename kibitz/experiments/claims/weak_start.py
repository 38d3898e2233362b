"""A student that starts weak and learns from its own text: its outcome, and remedies."""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from kibitz.experiments.charts import Line, Panel
from kibitz.experiments.claims.methods import NAVIGATION
from kibitz.experiments.design import TOY, Arm, Experiment
from kibitz.experiments.evidence import Finding, Verdict
from kibitz.experiments.results import NotRun, Results, gflop
from kibitz.experiments.shapes import Grid, grid
from kibitz.experiments.statistics import Estimate, apart, share_of_way

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
    return share_of_way(here, results.accuracy(f"{method}-{start}"), top) if top > here else (0.0, 0.0)


def verdict(shares: Mapping[str, Mapping[str, Estimate]]) -> Verdict:
    """`shares`: start -> method -> the share of its way that it goes, the strongest start first. The claim has two halves: plain
    OPD goes less of its way from a weak start than from the strongest, and a cure goes further there. Reproduced: both hold
    at every weaker start, by the interval of the difference; partly: one of them at one of them."""
    strongest, *weaker = shares
    bad = [apart(shares[strongest][PLAIN], shares[start][PLAIN]) for start in weaker]
    cured = [
        any(apart(shares[start][cure], shares[start][PLAIN]) for cure in CURES if cure in shares[start])
        for start in weaker
    ]
    return "reproduced" if all(bad) and all(cured) else "partly" if any(bad) or any(cured) else "not"


def find(results: Results) -> Finding:
    """End against start, for each method, and how much of the text the teacher wrote."""
    starts = [start for start in STARTS if results.has(f"{PLAIN}-{start}")]
    if len(starts) < 2:
        raise NotRun(f"{PLAIN}-{next(start for start in STARTS if start not in starts)}")
    before = {start: level(results, start) for start in starts}
    ends = grid(
        results, sorted(starts, key=lambda start: -before[start]), METHODS, lambda start, method: f"{method}-{start}"
    )
    shares = {start: {method: closed(results, start, method) for method in by} for start, by in ends.items()}
    weakest, strongest = list(ends)[-1], next(iter(ends))
    best = {start: max(by, key=lambda method: by[method][0]) for start, by in ends.items()}
    numbers = {
        "steps": STEPS,
        "before": before,
        "ends": ends,
        "shares": shares,
        "methods": METHODS,
        "plain": PLAIN,
        "apart": {method: _against_plain(ends, method, before) for method in METHODS if method != PLAIN},
        "best": best,
        "weakest": weakest,
        "strongest": strongest,
        "walks": _elsewhere(results),
        "rows": [
            {"start": STARTS[start][1], "before": before[start], "kl": start_kl(results, start), "method": METHODS[method],
             "end": end, "way": shares[start][method], "gflop": _cost(results, start, method),
             "written": [row[at] for row in [written(results, start)] for at in (0, -1)] if method == SKD else None}
            for start, by in ends.items() for method, end in by.items()
        ],
    }  # fmt: skip
    return Finding(verdict(shares), numbers, _panels(results, ends, before))


def _cost(results: Results, start: str, method: str) -> float:
    """GFLOP of student and teacher, the warm-up's too."""
    spent = results.mean(f"{method}-{start}", gflop)[0]
    return spent + (results.mean(f"warm-{start}", gflop)[0] if method == WARM else 0.0)


def written(results: Results, start: str) -> list[float]:
    """The share of SKD's tokens that the teacher wrote, of each step; a mean over seeds. One less it is accepted."""
    runs = [run["series"]["teacher_written"] for run in results.runs(f"{SKD}-{start}")]
    return [fmean(shares) for shares in zip(*runs, strict=True)]


def _elsewhere(results: Results) -> dict[str, Any] | None:
    """The same question where `methods-navigation` was run: a student that goes astray has to come back."""
    walks = Results(NAVIGATION, results.folder.parent / NAVIGATION.home)
    pairs = {"reverse": ("opd", "skd-k2-rkl"), "forward": ("opd-fkl", "skd-k2-fkl")}
    if not all(walks.has(*pair) for pair in pairs.values()):
        return None
    found = {kl: [walks.accuracy(arm) for arm in pair] for kl, pair in pairs.items()}
    return {"student": walks.level("student"), "name": NAVIGATION.name, **found}


def _against_plain(ends: Grid, method: str, before: Mapping[str, float]) -> dict[str, list[float]]:
    """The starts, by their accuracy, from which a method ends above plain OPD and below it, by the interval."""
    both = [(before[start], by[method], by[PLAIN]) for start, by in ends.items() if method in by]
    return {
        "above": [start for start, this, plain in both if apart(this, plain)],
        "below": [start for start, this, plain in both if apart(plain, this)],
    }


def _panels(results: Results, ends: Grid, before: Mapping[str, float]) -> tuple[Panel, ...]:
    places = {start: float(place) for place, start in enumerate(ends)}
    found = [
        Line(words, [(places[start] + shift, *by[method]) for start, by in ends.items() if method in by], joined=False)
        for shift, (method, words) in zip((-0.15, -0.05, 0.05, 0.15), METHODS.items(), strict=True)
    ]
    found.append(Line("before", [(places[start], before[start], 0.0) for start in ends], joined=False))
    helped = {start: written(results, start) for start, by in ends.items() if SKD in by}
    return (
        Panel("where a start leads", "start", "accuracy at the end", found, {"teacher": results.level("teacher")},
              ticks={place: start for start, place in places.items()}),
        Panel("SKD: how much the teacher writes", "step", "tokens of the teacher's",
              [Line(start, [(step, share, 0.0) for step, share in enumerate(shares, 1)]) for start, shares in helped.items()]),
    )  # fmt: skip


EXPERIMENT = Experiment(
    name="weak-start",
    question="How does a student fare that starts weak and learns from its own text, and what cures it?",
    world="arithmetic",
    recipe=TOY,
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
    find=find,
)
