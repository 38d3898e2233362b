"""The price of writing one step ahead: does a student that learns from text of one step older weights end as well?

Servers write the next rollouts while a step is learnt (`rollout.max_staleness: 1`). The embedded engine writes the same
text, by the weights of one step earlier, without the gain in time, so that the two can be compared on many seeds. The
divergence is computed anew under the present student; a policy gradient keeps the importance ratio.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kibitz.experiments.charts import Line, Panel
from kibitz.experiments.design import TOY, Arm, Experiment, merged
from kibitz.experiments.evidence import Finding, Verdict
from kibitz.experiments.records import score
from kibitz.experiments.results import NotRun, Results
from kibitz.experiments.statistics import Estimate

FORMS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "full": ("reverse KL, full vocabulary", {"type": "opd"}),
    "sampled": ("policy gradient of the written token", {"type": "opd", "support": "sampled"}),
}
ON_POLICY, AHEAD = "on-policy", "ahead"
NARROW = 0.03
"""Half the 95% interval of a difference that says something: three points."""


def _name(form: str, when: str) -> str:
    return f"{form}-{when}"


def _arm(form: str, when: str) -> Arm:
    words, method = FORMS[form]
    text = "text of one step older weights" if when == AHEAD else "text of the weights that learn from it"
    return Arm(
        _name(form, when), f"{words}: {text}", {"method": method, "rollout": {"max_staleness": int(when == AHEAD)}}
    )


def find(results: Results) -> Finding:
    """The difference of accuracy, one step ahead minus on-policy, seed by seed, in each world and form."""
    walks = Results(NAVIGATION, results.folder.parent / NAVIGATION.home)
    worlds = {one.experiment.world: one for one in (results, walks) if one.has(*(arm.name for arm in FULL))}
    if results.experiment.world not in worlds:
        raise NotRun(FULL[0].name)
    rows = [
        _row(world, form, one)
        for form in FORMS
        for world, one in worlds.items()
        if one.has(_name(form, ON_POLICY), _name(form, AHEAD))
    ]
    differences = {(row["world"], row["form"]): row["difference"] for row in rows}
    numbers = {
        "rows": [row | {"words": FORMS[row["form"]][0]} for row in rows],
        "full": {world: differences[world, "full"] for world in worlds},
        "widest": max(half for _, half in differences.values()),
        "dev": {world: _by_rate(one) for world, one in worlds.items()},
        "told": [f"{world}, {form}" for (world, form), (mean, half) in differences.items() if abs(mean) > half],
    }
    return Finding(verdict(differences), numbers, [_panel(differences, list(worlds))])


def _row(world: str, form: str, results: Results) -> dict[str, Any]:
    on, ahead = _name(form, ON_POLICY), _name(form, AHEAD)
    return {
        "world": world,
        "form": form,
        "before": results.level("student"),
        "on_policy": results.accuracy(on),
        "ahead": results.accuracy(ahead),
        "difference": results.difference(ahead, on),
        "seeds": min(len(results.runs(arm)) for arm in (ahead, on)),
        "rates": (results.rate(on), results.rate(ahead)),
    }


def _by_rate(results: Results) -> list[tuple[float, float, float]]:
    """Each rate that both tried with the first seed, and their accuracies on the dev split: on-policy and one step ahead."""
    on, ahead = (results.sweeps[arm.name] for arm in FULL)
    return [(rate, score(on[rate]), score(ahead[rate])) for rate in sorted(on.keys() & ahead.keys())]


def verdict(differences: Mapping[Any, Estimate]) -> Verdict:
    """Not reproduced if one step ahead ends below on-policy anywhere by the interval of the difference; else reproduced if all
    intervals are narrow enough to have shown three points, and partly if they are not."""
    if any(mean < -half for mean, half in differences.values()):
        return "not"
    return "reproduced" if all(half <= NARROW for _, half in differences.values()) else "partly"


def _panel(differences: Mapping[tuple[str, str], Estimate], worlds: list[str]) -> Panel:
    places = {world: float(place) for place, world in enumerate(worlds)}
    lines = []
    for form, shift in zip(FORMS, (-0.1, 0.1), strict=True):
        points = [
            (places[w] + shift, 100 * mean, 100 * half) for (w, f), (mean, half) in differences.items() if f == form
        ]
        lines += [Line(FORMS[form][0], points, joined=False)] if points else []
    ticks = {place: world for world, place in places.items()}
    return Panel("one step ahead minus on-policy", "world", "points", lines, {"equal": 0.0}, percent=False, ticks=ticks)


FULL = tuple(_arm("full", when) for when in (ON_POLICY, AHEAD))
EXPERIMENT = Experiment(
    name="staleness",
    question="Does a student that learns from text of one step older weights end as well as on its own?",
    world="arithmetic",
    recipe=TOY,
    arms=(*FULL, *(_arm("sampled", when) for when in (ON_POLICY, AHEAD))),
    rates=(1e-3, 2e-3, 4e-3),
    reference=FULL[0].name,
    extensions=1,
    seeds=10,
    quick_arms=tuple(arm.name for arm in FULL),
    find=find,
)
NAVIGATION = replace(
    EXPERIMENT,
    name="staleness-navigation",
    question="The same in the world navigation, where a wrong step is seldom made good again.",
    world="navigation",
    recipe=merged(TOY, {"rollout": {"max_tokens": 24}, "steps": 100}),
    find=None,
)
