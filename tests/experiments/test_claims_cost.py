"""What accuracy costs, the line through SFT's sizes, RL distilled back: findings on made-up records of known ratios."""

from collections.abc import Callable
from math import inf, isfinite, log2

import pytest
from support.records import put, record

from kibitz.experiments import budgets, records
from kibitz.experiments.claims import cost, distil_back, sft_law
from kibitz.experiments.design import Experiment
from kibitz.experiments.results import NotRun, Results

FLOPS = {  # of one rollout, so that 18x the rollouts cost SFT 18x, 9x and 30x
    "opd": {"student_training": 1.0, "teacher_scoring": 1.0},
    "sft": {"student_training": 1.0, "teacher_sampling": 7 / 3},
    "grpo": {"student_training": 2.0},
}


def climbing(rollouts: float) -> float:
    """Log-linear: 5 points a doubling."""
    return 0.4 + 0.05 * log2(rollouts / 80)


def runs(experiment: Experiment, folder, ladders: dict[str, Callable[[float], float]]) -> Results:
    """Two equal seeds of the first batch of each budget, a million problems, and accuracy as a function of the rollouts."""
    for role, share in {"student": 0.2, "teacher": 0.95}.items():
        records.write(folder / f"{role}.json", {"settings": {}, "test": record("x", 1, 0, share, share)["test"]})
    families = set()
    for arm in experiment.arms:
        name, _, rollouts = arm.family.rpartition("-")
        if name not in ladders or arm.family in families:
            continue
        families.add(arm.family)
        kind, num = arm.changes["method"]["type"], int(rollouts)
        for seed in (0, 1):
            share = ladders[name](num)
            more = {
                "settings": {"recipe": {key: arm.changes[key] for key in ("steps", "rollout")}},
                "flops": {phase: num * value for phase, value in FLOPS[kind].items()},
                "tokens": num,
                "cpu_seconds": num,
                "series": {"loss": [0.5, 0.125]},
            }
            one = record(arm.name, 1e-3, seed, share, share, **more)
            one["test"]["num_prompts"] = 1_000_000
            put(folder, one)
    return Results(experiment, folder)


def dearer(times: float) -> Callable[[float], float]:
    return lambda rollouts: climbing(rollouts / times)


# ------------------------------------------------------------------ budgets


@pytest.mark.parametrize(
    "experiment", [cost.EXPERIMENT, sft_law.EXPERIMENT, distil_back.EXPERIMENT], ids=lambda e: e.name
)
def test_all_batches_of_a_budget_write_the_same_number_of_rollouts(experiment):
    for arm in experiment.arms:
        rollout = arm.changes["rollout"]
        written = arm.changes["steps"] * rollout["prompts_per_step"] * rollout["samples_per_prompt"]
        assert written == int(arm.family.rpartition("-")[2])
        assert arm.changes["optim"]["warmup_steps"] <= arm.changes["steps"] / 4


def test_a_ladder_takes_the_batch_that_the_dev_split_chose(tmp_path):
    size = {"settings": {"recipe": {"steps": 10, "rollout": {"prompts_per_step": 8, "samples_per_prompt": 1}}}}
    put(tmp_path, record("opd-80-b4", 1e-3, 0, dev=0.9, test=0.5, **size))
    put(tmp_path, record("opd-80-b8", 1e-3, 0, dev=0.8, test=0.7, **size))
    results = Results(cost.EXPERIMENT, tmp_path)
    assert budgets.rungs(results, "opd") == ["opd-80-b4"]
    assert budgets.curve(results, "opd", lambda run: 3.0) == {3.0: [0.5]}
    with pytest.raises(NotRun, match="sft"):
        budgets.rungs(results, "sft")


def test_of_two_budgets_at_one_cost_the_better_counts(tmp_path):
    results = runs(cost.EXPERIMENT, tmp_path, {"opd": climbing})
    assert budgets.curve(results, "opd", lambda run: 1.0) == {1.0: [pytest.approx(climbing(1280))] * 2}


def test_below_its_lowest_budget_a_ladder_may_cost_anything_less(tmp_path):
    results = runs(cost.EXPERIMENT, tmp_path, {"opd": climbing, "grpo": dearer(10)})
    first = budgets.cheapest(results, "grpo")
    assert first == pytest.approx(climbing(160))
    assert budgets.ratio(results, "grpo", "opd", cost.ROLLOUTS.count, first)[1] > 9
    middle, low, high = budgets.ratio(results, "grpo", "opd", cost.ROLLOUTS.count, first - 0.01)
    assert low == 0.0 and 10 < middle < high


# ------------------------------------------------------------------ cost


@pytest.mark.parametrize(
    ("sft", "rl", "verdict"),
    [(18, 10, "reproduced"), (18, 8, "partly"), (1.5, 10, "partly"), (0.5, 10, "not")],
    ids=["as published", "RL is cheaper", "SFT is cheaper", "OPD is dearer"],
)
def test_sft_is_counted_in_three_ways(tmp_path, sft, rl, verdict):
    ladders = {"opd": climbing, "opd-sampled": dearer(2), "sft": dearer(sft), "grpo": dearer(rl)}
    found = cost.find(runs(cost.EXPERIMENT, tmp_path, ladders))
    assert found.verdict == verdict
    at = found.numbers["at"]
    for way, ratio in (("student", sft), ("given", sft / 2), ("paid", sft * 5 / 3)):
        assert at[way]["sft"][0] == pytest.approx(ratio, abs=0.06)
    assert at["seconds"]["grpo"][0] == pytest.approx(rl, abs=0.06)
    assert at["paid"]["opd-sampled"][0] == pytest.approx(2.0, abs=0.06)


def test_the_target_is_one_that_all_reach(tmp_path):
    """RL levels off at 0.5: its cost there is finite, and nobody is asked for more."""
    ladders = {"opd": climbing, "sft": dearer(9), "grpo": lambda rollouts: min(0.5, climbing(rollouts / 10))}
    found = cost.find(runs(cost.EXPERIMENT, tmp_path, ladders))
    assert found.numbers["highest"] == pytest.approx(0.499, abs=1e-3)
    assert all(isfinite(ratio[0]) for by in found.numbers["at"].values() for ratio in by.values())


def test_where_a_method_does_not_surpass_the_student_there_is_no_price(tmp_path):
    found = cost.find(
        runs(cost.EXPERIMENT, tmp_path, {"opd": climbing, "sft": dearer(9), "grpo": lambda rollouts: 0.2})
    )
    assert found.verdict == "not" and found.numbers["at"]["paid"]["grpo"] is None
    assert found.numbers["best"]["opd"][0] == pytest.approx(climbing(1280))


# ------------------------------------------------------------------ SFT


@pytest.mark.parametrize(
    ("slope", "bend", "verdict"),
    [(0.02, 0.0, "reproduced"), (0.02, 0.03, "partly"), (0.05, 0.0, "partly"), (-0.01, 0.0, "not")],
    ids=["a line", "a line that bends", "too cheap", "it harms"],
)
def test_the_line_is_held_against_sizes_that_it_was_not_fitted_on(tmp_path, slope, bend, verdict):
    largest = max(cost.BUDGETS["sft"])

    def accuracy(size: float) -> float:
        return 0.6 + slope * log2(size / 320) - bend * (size == largest)

    found = sft_law.find(runs(sft_law.EXPERIMENT, tmp_path, {"sft": accuracy}))
    assert found.verdict == verdict
    assert found.numbers["slope"][0] == pytest.approx(slope)
    if slope > 0:
        assert found.numbers["factor"][0] == pytest.approx(2 ** (0.1 / slope))
    assert found.numbers["checks"][-1].holds == (bend == 0)
    assert found.numbers["sizes"][largest][0] == pytest.approx(accuracy(largest))


def test_a_flat_line_reaches_nothing():
    assert sft_law.growth([(320, 0.7), (640, 0.7)], 0.1) == inf
    assert sft_law.growth([(320, 0.7), (640, 0.8)], 0.1) == pytest.approx(2.0)
    assert sft_law.foretold([(320, 0.7), (640, 0.8)], 2560) == pytest.approx(1.0)


# ------------------------------------------------------------------ distil back


@pytest.mark.parametrize(("short", "verdict"), [(60, "reproduced"), (5, "partly")], ids=["as published", "dearer"])
def test_steps_and_compute_of_the_way_back(tmp_path, short, verdict):
    """RL needs ten times the rollouts, of 2 FLOPs each; OPD pays 2 as well, with its teacher's reading."""
    ladders = {"grpo": dearer(10), "back": climbing, "short": dearer(10 / short)}
    found = distil_back.find(runs(distil_back.EXPERIMENT, tmp_path, ladders))
    assert found.verdict == verdict
    at = found.numbers["at"]
    assert at["back"]["steps"][0] > 1
    assert at["back"]["rollouts"][0] == pytest.approx(10, rel=0.05)
    assert at["short"]["paid"][0] == pytest.approx(short, rel=0.05)
    assert (found.numbers["kl_before"], found.numbers["kl_after"]) == (0.5, 0.125)
    assert len(found.numbers["gains"]) < len(distil_back.PARTS), (
        "RL's lowest budget is above the least part of its gain"
    )


def test_no_fewer_steps_is_no_reproduction():
    assert distil_back.verdict((1.2, 0.9, 1.5), (60.0, 40.0, 90.0)) == "not"
    assert distil_back.verdict((1.2, 1.1, 1.5), (60.0, 40.0, 90.0)) == "partly"
