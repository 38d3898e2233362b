"""The rules of `rpd` and `trees` on made-up records: a verdict turns when the numbers turn."""

import json
from math import inf

import pytest
from typer.testing import CliRunner

from kibitz.cli import app
from kibitz.experiments import EXPERIMENTS
from kibitz.experiments.claims import rpd, trees
from kibitz.experiments.records import write
from kibitz.experiments.results import NotRun, Results

FINALS = {"ppo": -800.0, "bc": -400.0, "opd": -400.0, "rpd": -300.0, "rpd-anneal": -310.0}
LEVEL = -400.0


def put(folder, env: str, arm: str, rate: float, seed: int, final: float) -> None:
    """A run whose curve rises evenly from -1000 to its end."""
    curve = [[1000 * i, -1000 + (final + 1000) * i / 10] for i in range(11)]
    row = {
        "policy": arm,
        "env": env,
        "lr": rate,
        "seed": seed,
        "curve": curve,
        "steps": 10_000,
        "gflop": 1.0,
        "settings": {},
    }
    write(folder / f"{env}-{arm}-{rate:g}-{seed}.json", {**row, "final": {"mean": final + seed}})


def records(folder, finals: dict[str, float] = FINALS, seeds: int = 3) -> Results:
    for env in rpd.ENVS:
        made = {"policy": "teacher", "env": env, "seed": 1000, "lr": 1e-3, "steps": 5000, "final": {"mean": LEVEL}}
        write(folder / f"{env}-teacher.json", {**made, "settings": {}})
        for seed in range(seeds):
            again = {
                "policy": "teacher again",
                "env": env,
                "seed": seed,
                "level": LEVEL,
                "final": {"mean": LEVEL + seed},
            }
            write(folder / f"{env}-teacher-{seed}.json", {**again, "settings": {}})
            for arm, final in finals.items():
                put(folder, env, arm, 1e-3, seed, final)
        for arm, final in finals.items():
            put(folder, env, arm, 3e-3, 0, final - 50)
    return Results(EXPERIMENTS["rpd"], folder)


def test_refined_distillation_that_passes_its_teacher_sooner_is_reproduced(tmp_path):
    found = rpd.find(records(tmp_path))
    assert found.verdict == "reproduced"
    env = found.numbers["envs"]["pendulum"]
    assert env["best"] == "rpd" and env["above"] == (100.0, 0.0) and env["arms"]["ppo"]["num_reached"] == 0
    assert env["arms"]["rpd"]["rate"] == 1e-3, "the rate that was better during training"
    assert env["sooner"][0] == pytest.approx(10_000 / 9000)


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"rpd": -420.0, "rpd-anneal": -420.0, "opd": -300.0, "ppo": -300.0}, "not"),
        ({"opd": -290.0}, "partly"),
        ({"ppo": -200.0}, "partly"),
    ],
)
def test_the_verdict_turns_with_the_numbers(tmp_path, changes, verdict):
    assert rpd.find(records(tmp_path, FINALS | changes)).verdict == verdict


def test_a_level_is_reached_at_the_first_evaluation_that_is_there():
    assert rpd.reaches([[0, -9.0], [10, -5.0], [20, -6.0]], -5.0) == 10
    assert rpd.reaches([[0, -9.0]], -5.0) == inf


def test_what_was_not_run_is_named(tmp_path):
    with pytest.raises(NotRun, match="pendulum-teacher"):
        rpd.find(Results(EXPERIMENTS["rpd"], tmp_path))


def tree_records(folder, cartpole: float, loops: dict[str, float]) -> Results:
    for env in trees.TEACHERS:
        made = {"policy": "teacher", "env": env, "seed": 1000, "final": {"mean": 500.0}, "settings": {}}
        write(folder / f"{env}-teacher.json", made)
    for seed in range(3):
        for name in trees.STUDENTS:
            put_tree(folder, "cartpole", name, seed, cartpole, 3)
        for loop, final in loops.items():
            for depth in (1, 2):
                put_tree(folder, "acrobot", f"{loop} {depth}", seed, final + depth, depth)
    return Results(EXPERIMENTS["trees"], folder)


def put_tree(folder, env: str, name: str, seed: int, final: float, depth: int) -> None:
    row = {
        "policy": name,
        "env": env,
        "seed": seed,
        "settings": {"student": {"depth": depth}},
        "leaves": 4,
        "depth": depth,
    }
    more = {"agreement_on_own_states": 0.9, "rules": "action 0", "exported": {"mean": final}, "final": {"mean": final}}
    more["validation"] = final - depth  # of two students that play alike the smaller one is chosen
    write(folder / f"{env}-{name.replace(' ', '-')}-{seed}.json", row | more)


@pytest.mark.parametrize(
    ("cartpole", "loops", "verdict"),
    [
        (490.0, {"bc": -120.0, "dagger": -100.0, "viper": -90.0}, "reproduced"),
        (490.0, {"bc": -100.0, "dagger": -100.0, "viper": -90.0}, "partly"),
        (400.0, {"bc": -100.0, "dagger": -100.0, "viper": -100.0}, "not"),
    ],
)
def test_trees_are_solved_or_not(tmp_path, cartpole, loops, verdict):
    found = trees.find(tree_records(tmp_path, cartpole, loops))
    assert found.verdict == verdict
    assert found.numbers["exported"] == found.numbers["exports"] == 3 * (len(trees.STUDENTS) + 2 * 3)


def test_one_seed_decides_nothing_about_gains_and_a_seed_that_is_not_whole_does_not_count(tmp_path):
    loops = {"bc": -120.0, "dagger": -100.0, "viper": -90.0}
    results = tree_records(tmp_path, 490.0, loops)
    for path in [*tmp_path.glob("acrobot-viper-2-[12].json"), *tmp_path.glob("acrobot-bc-1-2.json")]:
        path.unlink()
    found = trees.find(results)
    assert found.numbers["seeds"] == 1 and found.verdict == "partly"
    assert found.numbers["own_states"] == (20.0, 0.0)


def test_seeds_that_chose_nothing_are_the_result(tmp_path):
    """Seeds 0 to 2 prefer the constant weight; the others, in which it fails, decide."""
    results = records(tmp_path, seeds=6)
    for env in rpd.ENVS:
        for seed in range(rpd.CHOOSING, 6):
            put(tmp_path, env, "rpd", 1e-3, seed, -600.0)
    found = rpd.find(results)
    env = found.numbers["envs"]["acrobot"]
    assert found.numbers["fresh"] and env["best"] == "rpd" and env["seeds"] == 3 and env["above"] == (-200.0, 0.0)
    assert found.verdict == "not"


def test_seeds_that_choose_need_the_refined_policies_alone(tmp_path):
    results = records(tmp_path, seeds=6)
    for path in [*tmp_path.glob("*-opd-*-[12].json"), *tmp_path.glob("*-ppo-*-[12].json")]:
        path.unlink()
    for env in rpd.ENVS:
        for seed in (1, 2):
            put(tmp_path, env, "rpd-anneal", 1e-3, seed, -200.0)
    found = rpd.find(results).numbers
    assert found["envs"]["acrobot"]["best"] == "rpd-anneal" and found["seeds"] == [3, 3, 3]


def test_what_was_heard_is_told_apart(tmp_path):
    """Two seeds of each; without the teacher's entropy, or without one of the two, nothing is said."""
    results = records(tmp_path)
    assert rpd.find(results).numbers["why"] is None
    made = {"policy": "teacher", "env": "acrobot", "seed": 1000, "lr": 1e-3, "steps": 5000, "final": {"mean": LEVEL}}
    write(tmp_path / "acrobot-teacher.json", {**made, "settings": {}, "sampled": {"mean": -350.0, "entropy": 1.07}})
    for heard, final, entropy in (("distribution", -500.0, 0.9), ("action", -120.0, 0.3)):
        for seed in (3, 4):
            row = {
                "policy": f"why: {heard}",
                "env": "acrobot",
                "seed": seed,
                "settings": {},
                "final": {"mean": final + seed},
            }
            write(tmp_path / f"why-{heard}-{seed}.json", {**row, "sampled": {"mean": -150.0, "entropy": entropy}})
    why = rpd.find(results).numbers["why"]
    assert (why["distribution"]["final"][0], why["distribution"]["least"]) == (-496.5, -497.0)
    assert (
        why["action"]["sampled"] == (-150.0, 0.0)
        and why["action"]["entropy"] == 0.3
        and why["teacher"]["entropy"] == 1.07
    )
    (tmp_path / "why-action-3.json").unlink(), (tmp_path / "why-action-4.json").unlink()
    assert rpd.find(results).numbers["why"] is None


def test_they_take_no_language_models():
    answer = CliRunner().invoke(app, ["reproduce", "rpd", "--student", "x", "--quiet"])
    assert answer.exit_code == 2 and "rpd plays policies and has no language model" in answer.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rpd", "trees"])
def test_the_command_runs_quickly_and_what_was_run_is_not_run_again(name, monkeypatch, tmp_path):
    pytest.importorskip("stable_baselines3")
    monkeypatch.chdir(tmp_path)
    first = CliRunner().invoke(app, ["reproduce", name, "--quick", "--json"])
    assert first.exit_code == 0, first.output
    files = sorted((tmp_path / "runs" / "quick" / name).glob("*.json"))
    before = {path: path.stat().st_mtime_ns for path in files}
    assert json.loads(files[0].read_text())["commit"]
    assert CliRunner().invoke(app, ["reproduce", name, "--quick", "--json"]).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in files} == before
