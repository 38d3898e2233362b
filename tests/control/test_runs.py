"""Whole runs: they go on bit for bit, write what the report reads, and refuse what cannot be in a sentence."""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml
from support.paths import ROOT
from typer.testing import CliRunner

pytest.importorskip("stable_baselines3")

import support.two_states  # noqa: F401  # registers the environment

from kibitz import report
from kibitz.cli import app
from kibitz.config import RecipeError, load_as
from kibitz.control import distil, rpd, strip
from kibitz.control.environments import make, shape_of
from kibitz.control.folder import newest
from kibitz.control.recipe import DistilRecipe, EnvConfig, RPDRecipe
from kibitz.files import Lock

ORACLE = {"python": "support.two_states:oracle", "trust": True, "samples": 2, "noise": 0.1}


def rpd_recipe(output: Path, **changes) -> dict:
    tree = {
        "env": {"id": "support.two_states:TwoStates-v0", "num_envs": 2},
        "teacher": {"python": "support.two_states:oracle", "trust": True, "noise": 0.1},
        "method": {"type": "rpd", "weight": 0.5, "anneal": 0.5},
        "ppo": {"num_steps": 16, "batch": 16, "epochs": 2, "hidden": [8]},
        "steps": 192, "eval": {"every": 2, "episodes": 4, "last": 6, "frames": 0}, "output": str(output),
    }  # fmt: skip
    return {**tree, **changes}


def distil_recipe(output: Path, **changes) -> dict:
    tree = {
        "env": {"id": "support.two_states:TwoStates-v0"}, "teacher": ORACLE, "student": {"type": "tree", "depth": 1},
        "method": {"type": "viper", "iterations": 4, "steps": 20, "validation": 4},
        "eval": {"last": 8, "frames": 0}, "output": str(output),
    }  # fmt: skip
    return {**tree, **changes}


def without_clock(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


class Killed(Exception):
    pass


class Killer:
    """A progress that ends the run at an iteration, between a row and the checkpoint that would hold it."""

    def __init__(self, at: int):
        self.at = at

    def start(self, recipe, first_step):
        pass

    def step(self, row):
        if row["step"] >= self.at:
            raise Killed

    def evaluated(self, row):
        pass


CASES = {"rpd": (rpd, RPDRecipe, rpd_recipe, 96), "distil": (distil, DistilRecipe, distil_recipe, 3)}


@pytest.mark.parametrize("name", CASES)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(name, tmp_path):
    loop, kind, tree, at = CASES[name]
    whole = loop.run(load_as(kind, tree(tmp_path / "whole")))
    recipe = load_as(kind, tree(tmp_path / "stopped"))
    with pytest.raises(Killed):
        loop.run(recipe, progress=Killer(at))
    stopped = loop.run(recipe, resume=True)
    assert without_clock(stopped.metrics) == without_clock(whole.metrics)
    assert stopped.evals == whole.evals
    assert loop.run(recipe, resume=True).evals == whole.evals, "a run that has ended stays as it is"
    policy = "policy.py" if name == "distil" else f"checkpoints/{newest(whole.folder).name}/policy.zip"
    if name == "distil":
        assert (stopped.folder / policy).read_text() == (whole.folder / policy).read_text()


@pytest.mark.parametrize("name", CASES)
def test_a_folder_has_one_writer_and_says_how_each_part_ended(name, tmp_path):
    loop, kind, tree, at = CASES[name]
    recipe, folder = load_as(kind, tree(tmp_path / "run")), tmp_path / "run"
    with pytest.raises(Killed):
        loop.run(recipe, progress=Killer(at))
    ended = json.loads((folder / "run.json").read_text())
    assert (ended["status"], ended["ended_by"]) == ("failed", "Killed") and not (folder / "run.lock").exists()
    kept = newest(folder)
    shutil.copytree(kept, kept.with_name(f"{kept.name}.bak"))  # somebody's copy is no checkpoint
    other = Lock(folder)
    other.take()
    with pytest.raises(RecipeError, match=f"process {os.getpid()} on .* is writing"):
        loop.run(recipe, resume=True)
    other.release()
    loop.run(recipe, resume=True)
    whole = json.loads((folder / "run.json").read_text())
    assert (whole["status"], [part["ended_by"] for part in whole["parts"]]) == ("finished", ["Killed"])
    assert whole["seconds"] > whole["parts"][0]["seconds"] > 0
    assert newest(folder).with_name(f"{kept.name}.bak").is_dir()


def test_it_stops_where_the_return_is_enough(tmp_path):
    run = rpd.run(load_as(RPDRecipe, rpd_recipe(tmp_path / "run", stop_at=-1.0)))
    assert run.evals[-1]["step"] == 64 and len(run.metrics) == 2


def test_its_policy_is_a_teacher_and_a_plain_file_of_stable_baselines3(tmp_path):
    from stable_baselines3 import PPO

    run = rpd.run(load_as(RPDRecipe, rpd_recipe(tmp_path / "first")))
    second = rpd_recipe(tmp_path / "second", teacher={"run": str(run.folder)}, method={"type": "opd", "loss": "kl"})
    assert rpd.run(load_as(RPDRecipe, second)).metrics[-1]["teacher_term"] >= 0
    names = PPO.load(newest(run.folder) / "policy.zip", device="cpu").policy.state_dict()
    assert "mlp_extractor.policy_net.0.weight" in names


def test_a_readable_student_solves_two_states_and_is_a_teacher_if_trusted(tmp_path):
    run = distil.run(load_as(DistilRecipe, distil_recipe(tmp_path / "tree")))
    info = json.loads((run.folder / "run.json").read_text())
    assert run.evals[-1]["return"]["mean"] == 1.0 and info["agreement_on_own_states"] > 0.8  # the teacher errs at times
    assert info["depth"] == 1 and info["leaves"] == 2
    for trust, words in ((False, "is a program"), (True, None)):
        tree = rpd_recipe(
            tmp_path / f"{trust}", teacher={"run": str(run.folder), "trust": trust}, method={"type": "opd"}
        )
        if words:
            with pytest.raises(ValueError, match=words):
                rpd.run(load_as(RPDRecipe, tree))
        else:
            assert rpd.run(load_as(RPDRecipe, tree)).metrics[0]["teacher_term"] > 0


def test_a_failing_teacher_ends_the_run_and_what_was_done_stays(tmp_path):
    tree = rpd_recipe(tmp_path / "run", teacher={"python": "support.two_states:tiring", "trust": True, "cache": False})
    with pytest.raises(ValueError, match="the teacher support.two_states:tiring failed: RuntimeError: enough"):
        rpd.run(load_as(RPDRecipe, tree))
    assert (tmp_path / "run" / "recipe.yaml").is_file()


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        (RPDRecipe, {"method": {"type": "ppo"}}, "leave teacher out, or write method.type: rpd"),
        (RPDRecipe, {"method": {"type": "ppo", "loss": "mse"}}, "ppo hears no teacher: leave out loss"),
        (RPDRecipe, {"teacher": None}, "method rpd needs a teacher"),
        (RPDRecipe, {"ppo": {"num_steps": 10, "batch": 7}}, "ppo.batch 7 does not divide the 20 steps"),
        (RPDRecipe, {"ppo": {"lrr": 1}}, "unknown key ppo.lrr: did you mean lr"),
        (RPDRecipe, {"env": {"id": "X", "sparse_info": "d"}}, "write sparse_above"),
        (DistilRecipe, {"student": {"type": "linear", "depth": 3}}, "depth is a setting of tree"),
        (DistilRecipe, {"method": {"type": "vipr"}}, "method.type: input should be 'bc', 'dagger' or 'viper'"),
    ],
)
def test_a_recipe_that_cannot_be_has_a_sentence(kind, changes, words):
    tree = rpd_recipe(Path("x"), **changes) if kind is RPDRecipe else distil_recipe(Path("x"), **changes)
    with pytest.raises(RecipeError, match=words):
        load_as(kind, tree)


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"id": "Nowhere-v0"}, "env.id: Nowhere-v0 cannot be made.*One of another package is named with it"),
        ({"id": "CartPole-v1", "options": {"gravitas": 1}}, "cannot be made"),
        ({"id": "Blackjack-v1"}, "plays with vectors of numbers only"),
    ],
)
def test_an_environment_that_cannot_be_played_has_a_sentence(env, words):
    with pytest.raises(ValueError, match=words):
        make(EnvConfig(**env))


def test_sparse_reward_is_one_where_the_dense_one_is_enough():
    sparse, dense = make(EnvConfig(id="Pendulum-v1", sparse_above=-5.0)), make(EnvConfig(id="Pendulum-v1"))
    sparse.reset(seed=0), dense.reset(seed=0)
    steps = [(sparse.step([2.0])[1], dense.step([2.0])[1]) for _ in range(50)]
    assert [one for one, _ in steps] == [float(reward >= -5.0) for _, reward in steps] and {0.0, 1.0} == {
        s for s, _ in steps
    }
    odd = make(EnvConfig(id="Pendulum-v1", sparse_above=0.0, sparse_info="distance"))
    odd.reset(seed=0)
    with pytest.raises(ValueError, match="no 'distance'; it has nothing"):
        odd.step([0.0])


def test_an_environment_with_a_goal_is_seen_as_one_vector_and_pays_as_it_does():
    """As robots with a goal are: achieved, desired, seen, in the order of their names."""
    env = make(EnvConfig(id="support.two_states:Goal-v0"))
    seen, _ = env.reset(seed=3)
    assert shape_of(env, "Goal-v0").num_observed == 3 and seen.tolist() == [1.0 - seen[1], seen[1], seen[1]]
    assert env.step(1 - int(seen[1]))[1] == 0.0 and env.step(int(seen[1]))[1] == -1.0


def test_a_robot_with_sparse_reward_is_played_from_a_recipe(tmp_path):
    pytest.importorskip("mujoco")
    env = {"id": "Reacher-v5", "num_envs": 2, "sparse_info": "reward_dist", "sparse_above": -0.05}
    teacher = {"python": "support.two_states:still", "trust": True}
    tree = rpd_recipe(tmp_path / "run", env=env, teacher=teacher, steps=64)
    run = rpd.run(load_as(RPDRecipe, tree))
    assert [row["split"] for row in run.evals[:2]] == ["episodes", rpd.TEACHERS]
    counts = [row["return"][key] * row["num_episodes"] for row in run.evals for key in ("mean",)]
    assert all(0 <= count <= 50 * 6 and abs(count - round(count)) < 1e-9 for count in counts)


# ------------------------------------------------------------------ what a person sees


def test_the_command_line_and_the_page(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump(distil_recipe(tmp_path / "run")))
    answer = CliRunner().invoke(app, ["control", "distil", str(recipe), "--json"])
    assert answer.exit_code == 0, answer.output
    assert json.loads(answer.stdout)["after"]["return"]["mean"] == 1.0
    again = CliRunner().invoke(app, ["control", "distil", str(recipe), "--quiet"])
    assert again.exit_code == 2 and "already holds a run" in again.stderr
    wrong = CliRunner().invoke(app, ["control", "distil", str(recipe), "seed=1", "--resume", "--quiet"])
    assert wrong.exit_code == 2 and "made with another seed" in wrong.stderr
    page = Path(json.loads(CliRunner().invoke(app, ["control", "report", str(recipe), "--json"]).stdout)["report"])
    text = page.read_text(encoding="utf-8")
    for words in (
        "VIPER of a decision tree",
        "A decision tree played",
        "Mean return of an episode",
        "if o[",
        "data:image/svg+xml",
    ):
        assert words in text, words
    assert "heat-map of tokens" not in text and "It took 4 iterations" in text and "in the same ones" in text
    assert "dotted: before" not in text, "a return has no place on a line from 0 to 100%"
    other = CliRunner().invoke(app, ["control", "rpd", str(recipe), "--quiet"])
    assert other.exit_code == 2 and "is a recipe of distil: write kibitz control distil" in other.stderr


def test_runs_stand_side_by_side_with_costs_in_steps_and_operations(tmp_path):
    folders = []
    for seed in range(2):
        tree = rpd_recipe(tmp_path / f"seed-{seed}", seed=seed)
        folders.append(rpd.run(load_as(RPDRecipe, tree)).folder)
    text = report.build(folders, tmp_path / "both.html").read_text(encoding="utf-8")
    for words in (
        "Refined policy distillation",
        "It took 192 steps",
        "Student learns",
        "weight 0.5 that falls to 0 by 50%",
    ):
        assert words in text, words


def test_the_schemas_are_of_the_recipes():
    for name, key in (("rpd", "ppo"), ("distil", "student")):
        assert key in json.loads(CliRunner().invoke(app, ["control", "schema", name]).stdout)["properties"]
    assert CliRunner().invoke(app, ["control", "schema", "rdp"]).exit_code == 2


def test_a_picture_is_a_picture(tmp_path):
    """Decoded by hand: the lines of a PNG of 2 x 3 pixels without a filter."""
    import zlib

    import numpy as np

    pixels = np.arange(18).reshape(2, 3, 3)
    file = strip.png(pixels)
    data = file[file.index(b"IDAT") + 4 : file.index(b"IEND") - 8]
    rows = np.frombuffer(zlib.decompress(data), np.uint8).reshape(2, 10)
    assert (rows[:, 0] == 0).all() and (rows[:, 1:].reshape(2, 3, 3) == pixels).all()


def test_a_picture_that_cannot_be_drawn_ends_nothing(tmp_path):
    run = distil.run(load_as(DistilRecipe, distil_recipe(tmp_path / "run", eval={"last": 2, "frames": 2})))
    shown = json.loads((run.folder / "shown.json").read_text())
    assert shown[-1]["title"] == "An episode of the student" and "ended with code 1" in shown[-1]["words"]


@pytest.mark.slow
def test_an_episode_of_cartpole_is_drawn(tmp_path):
    pytest.importorskip("pygame")
    tree = rpd_recipe(
        tmp_path / "run", env={"id": "CartPole-v1", "num_envs": 2}, method={"type": "ppo"}, teacher=None, steps=32
    )
    run = rpd.run(load_as(RPDRecipe, {**tree, "eval": {"every": 1, "episodes": 1, "last": 1, "frames": 3}}))
    shown = json.loads((run.folder / "shown.json").read_text())
    assert [row.get("image") for row in shown] == ["before.png", "after.png"], shown
    assert (run.folder / "after.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "control").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_that_come_with_it_are_read(path):
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    load_as(DistilRecipe if "student" in tree else RPDRecipe, path)
    assert tree["output"] == f"runs/{path.stem}"
