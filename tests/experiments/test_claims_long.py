"""What the experiments on several expressions in one prompt make of their records."""

import math
from dataclasses import replace

import pytest
from support.records import put, record

from kibitz.config import DataConfig
from kibitz.experiments import get, records
from kibitz.experiments.claims import episode_length, one_prompt
from kibitz.experiments.design import Subject
from kibitz.experiments.records import measure
from kibitz.experiments.results import NotRun, Results
from kibitz.experiments.study import Study

LONG, ONE = get("episode-length"), get("one-prompt")


def models(folder, names, student=0.6, teacher=1.0) -> None:
    """Both as they are, on every measure."""
    for role, share in (("student", student), ("teacher", teacher)):
        one = {
            "num_prompts": 100,
            "sampled": {"accuracy": share},
            "greedy": {"accuracy": share},
            "response_tokens": 20.0,
        }
        rows = dict.fromkeys(names, one)
        first, *others = names
        test = rows[first] | {"measures": {name: rows[name] for name in others}}
        records.write(folder / f"{role}.json", {"settings": {}, "test": test})


# ------------------------------------------------------------------ episode length


def learnt(method: str, length: int, batch: int, steps: float, seed: int = 0, flops: float = 1.0) -> dict:
    """A run that is at the target, two thirds of the way from 0.6 to 1, after so many steps: the curve goes through it
    halfway between two points, in the logarithm of the cost."""
    points = [
        {
            "step": steps * factor,
            "tokens": 100.0,
            "flops": {"all": flops * factor},
            "dev": {"sampled": {"accuracy": share}},
        }
        for factor, share in ((0.5, 0.6 + 1 / 6), (2.0, 0.6 + 1 / 6 + 0.2))
    ]
    rollout = {"prompts_per_step": batch, "samples_per_prompt": 1}
    name = f"{method}-k{length}-b{batch}"
    more = {"curve": points, "settings": {"recipe": {"rollout": rollout}}}
    return record(name, 1e-3, seed, dev=0.95, test=0.95) | more


def of_lengths(folder, rl: dict[int, float], noise: float = 1.0) -> Results:
    """RL needs `rl[length]` steps of 16 or 64 episodes, OPD always 10 of 8 or 4; `noise` is a factor of every other seed."""
    models(folder, [f"k{k}" for k in episode_length.LENGTHS])
    for length, steps in rl.items():
        cheap, dear = (8, 16) if length == 1 else (4, 64)
        for seed in range(5):
            odd = noise if seed % 2 else 1.0
            put(
                folder,
                learnt("opd", length, cheap, 10, seed),
                learnt("grpo", length, dear, steps * odd, seed, steps * odd / 10),
            )
    return Results(LONG, folder)


def test_costs_to_the_target_are_compared(tmp_path):
    found = episode_length._ratios(of_lengths(tmp_path, {1: 20, 8: 100}), 8)
    assert found is not None
    assert found["steps"][0] == pytest.approx(10)
    assert found["episodes"][0] == pytest.approx(10 * 64 / 4)
    assert found["FLOPs"][0] == pytest.approx(10)
    assert found["tokens"][0] == pytest.approx(1)
    assert all(low <= middle <= high for middle, low, high in found.values())


def test_the_cheapest_way_to_the_target_is_chosen_not_the_highest_end(tmp_path):
    models(tmp_path, [f"k{k}" for k in episode_length.LENGTHS])
    dear, cheap, never = (learnt("opd", 8, batch, steps, 0, steps) for batch, steps in ((64, 9), (8, 3), (4, 1)))
    dear["dev"]["sampled"]["accuracy"] = 0.99
    never["curve"] = never["curve"][:1]  # ends before the target
    key = records.chooser(LONG, tmp_path)
    assert sorted((dear, cheap, never), key=lambda run: key([run])) == [never, dear, cheap]
    assert key([dear, dear]) == key([dear]) > key([cheap, never | {"curve": cheap["curve"][:1] * 2}])
    put(tmp_path, dear, cheap, never)
    assert Results(LONG, tmp_path).of_family("opd-k8") == "opd-k8-b8"


@pytest.mark.parametrize(
    ("rl", "verdict"),
    [
        ({1: 20, 8: 2000}, "reproduced"),
        ({1: 20, 8: math.inf}, "reproduced"),
        ({1: 20, 8: 11}, "partly"),
        ({1: 2000, 8: 5}, "not"),
    ],
)
def test_longer_episodes_must_widen_the_gap(tmp_path, rl, verdict):
    """At 8 expressions RL's batch is 4 times as large and OPD's half, so 11 steps are more episodes and fewer FLOPs."""
    finite = {length: 1e12 if math.isinf(steps) else steps for length, steps in rl.items()}
    assert episode_length.find(of_lengths(tmp_path, finite)).verdict == verdict


def test_the_power_of_the_length():
    def power(*ratios):
        return episode_length.exponent({k: {"episodes": (r, r, r)} for k, r in zip((1, 2, 4, 8), ratios, strict=True)})

    assert power(3, 6, 12, 24) == pytest.approx(1)
    assert power(1, 2**0.5, 2, 8**0.5) == pytest.approx(0.5)
    assert power(1, 4, math.inf, 64) == pytest.approx(2)
    assert math.isnan(power(1, math.inf, math.inf, 0)), "too few lengths"


def test_equal_episodes_and_equal_tokens_are_looked_up_by_their_batches(tmp_path):
    results = of_lengths(tmp_path, {1: 20, 8: 100})
    assert episode_length._pair(results, 8, 64) is None  # OPD was not run with 64
    put(tmp_path, learnt("opd", 8, 64, 25))
    found = episode_length._pair(Results(LONG, tmp_path), 8, 64)
    assert found is not None
    rl, opd = found
    assert (rl["steps"], opd["steps"]) == (pytest.approx(100), pytest.approx(25))
    rows = [row for row in episode_length._equals(Results(LONG, tmp_path)) if row["k"] == 8]
    assert [(row["what"], row["over"]["steps"]) for row in rows] == [("episodes", "4.0x")]


def test_the_families_hold_every_batch_and_the_fixed_ones_are_among_them():
    for length in episode_length.LENGTHS:
        for method in episode_length.METHODS:
            batches = [arm.name.rpartition("-b")[2] for arm in LONG.arms if arm.family == f"{method}-k{length}"]
            assert {"64", str(64 // length)} - {"32"} <= set(batches)  # at two expressions they are nearly the same
    rollouts = [arm.changes["rollout"] for arm in LONG.arms if arm.name.startswith("grpo")]
    assert all(rollout["samples_per_prompt"] == 8 for rollout in rollouts)
    assert all(arm.changes["steps"] % arm.every == 0 for arm in LONG.arms)


def test_an_arm_is_measured_on_its_own_length_by_the_share_and_trained_by_all_or_nothing(tmp_path, monkeypatch):
    study = Study(replace(LONG, dev_problems=1000), Subject.of(LONG), tmp_path, tmp_path)
    arm = LONG.arm("grpo-k4-b16")
    recipe = study.recipe(arm, 1e-3, 0)
    assert (recipe.data.world, recipe.data.options) == ("arithmetic-long-4", {"reward": "all"})
    asked: list[DataConfig] = []

    def evaluate(*_, data, **__):
        asked.append(data)
        return {"num_prompts": data.limit}

    monkeypatch.setattr("kibitz.experiments.study.evaluate_model", evaluate)
    study._evaluate("x", "dev", recipe, arm, 0)
    assert [(d.world, d.options, d.limit, d.split) for d in asked] == [
        ("arithmetic-long-4", {"reward": "share"}, 256 // 4, "dev")
    ]
    study._evaluate("x", "dev", recipe, None, 0)
    assert [d.world for d in asked[1:]] == [f"arithmetic-long-{k}" for k in (1, 2, 4, 8)]


# ------------------------------------------------------------------ one prompt


def of_counts(folder, shares: dict[str, float]) -> Results:
    models(folder, list(one_prompt.LENGTHS), student=0.6, teacher=1.0)
    recipe = {"steps": 20, "rollout": {"prompts_per_step": 1, "samples_per_prompt": 256}}
    for name, share in shares.items():
        for seed in range(5):
            wobble = 0.002 * (seed - 2)
            row = record(name, 1e-3, seed, dev=share, test=share + wobble)
            row["test"]["num_prompts"] = 10_000
            put(folder, row | {"settings": {"recipe": recipe}})
    return Results(ONE, folder)


def test_the_way_is_a_share_of_the_gap(tmp_path):
    results = of_counts(tmp_path, {"short-1": 0.7, "short-all": 0.5})
    assert one_prompt.way(results, "short-1", "short")[0] == pytest.approx(0.25)
    assert one_prompt.way(results, "short-all", "short")[0] == pytest.approx(-0.25)
    of_seeds = 2.776 * (0.002 * 2.5**0.5) / 5**0.5
    of_the_student = 1.96 * (0.6 * 0.4 / measure(results.model("student"), "short")["num_prompts"]) ** 0.5
    half = math.hypot(of_seeds, of_the_student)
    assert one_prompt.way(results, "short-1", "short")[1] == pytest.approx(half / 0.4, rel=1e-3)


@pytest.mark.parametrize(("one", "verdict"), [(0.95, "reproduced"), (0.7, "partly"), (0.6, "not"), (0.5, "not")])
def test_one_prompt_must_bring_most_of_what_all_bring(tmp_path, one, verdict):
    assert one_prompt.find(of_counts(tmp_path, {"short-1": one, "short-all": 0.98})).verdict == verdict


def test_from_how_many_on(tmp_path):
    shares = {"short-1": 0.58, "short-4": 0.7, "short-16": 0.93, "short-64": 0.96, "short-all": 0.98}
    found = one_prompt.find(of_counts(tmp_path, shares)).numbers
    assert found["helps"] == {"short": [4, 16, 64]} and found["enough"] == {"short": [16, 64]}


def test_a_step_answers_as_many_expressions_however_many_prompts_there_are():
    for arm in ONE.arms:
        rollout, kind = arm.changes["rollout"], arm.name.partition("-")[0]
        answers = rollout["prompts_per_step"] * rollout["samples_per_prompt"] * one_prompt.LENGTHS[kind]
        assert answers == one_prompt.SAMPLES
        # The same prompt twice in a step would be answered the same twice.
        assert rollout["prompts_per_step"] <= arm.changes.get("data", {}).get("limit", math.inf)


def test_without_runs_there_is_no_finding(tmp_path):
    for module, experiment in ((episode_length, LONG), (one_prompt, ONE)):
        with pytest.raises(NotRun):
            module.find(Results(experiment, tmp_path))
