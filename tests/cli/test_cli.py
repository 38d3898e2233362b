"""The command line as a person meets it: results, mistakes in one sentence, Ctrl-C."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from support.cli import assert_refused, kibitz_says

import kibitz

PROMPTS = ["1+2*3", "(4-1)*2", "7*8-5", "9-(2+3)", "6*6*6", "5+(2*3)"]
SMALL_RUN = {
    "rollout": {"prompts_per_step": 3, "samples_per_prompt": 2, "max_tokens": 8},
    "eval": {"every": 0, "num_prompts": 4, "heatmaps": 2},
    "save": {"every": 0},
    "threads": 1,
    "steps": 2,
}


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text, "answer": "7"}) + "\n" for text in PROMPTS), encoding="utf-8")
    return path


@pytest.fixture
def recipe(tmp_path, small_models, prompts) -> Path:
    """A run of two steps on random models and a file of prompts."""
    tree = {
        "student": {"model": str(small_models / "student")},
        "teacher": {"model": str(small_models / "teacher")},
        "data": {"prompts": str(prompts), "grader": "exact"},
        "output": str(tmp_path / "run"),
        **SMALL_RUN,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(tree), encoding="utf-8")  # JSON is YAML
    return path


# ------------------------------------------------------------------ the line itself


def test_version():
    answer = kibitz_says("--version")
    assert (answer.exit_code, answer.stdout) == (0, f"kibitz {kibitz.__version__}\n")


@pytest.mark.parametrize(
    "command",
    ["demo", "init", "train", "watch", "eval", "score", "export", "report", "worlds", "control", "recipes", "schema"],
)
def test_every_command_explains_itself(command):
    assert f" {command} " in kibitz_says("--help").stdout
    assert kibitz_says(command, "--help").exit_code == 0


@pytest.mark.parametrize(("typed", "meant"), [("trian", "train"), ("demmo", "demo"), ("scor", "score")])
def test_a_mistyped_command_meets_the_nearest(typed, meant):
    answer = kibitz_says(typed)
    assert answer.exit_code == 2
    assert f"Did you mean '{meant}'?" in answer.stderr


def test_a_mistyped_command_of_worlds_too():
    answer = kibitz_says("worlds", "shw")
    assert answer.exit_code == 2
    assert "Did you mean 'show'?" in answer.stderr


# ------------------------------------------------------------------ worlds and schema


def test_worlds_are_listed():
    assert "order of operations" in kibitz_says("worlds").stdout
    listed = json.loads(kibitz_says("worlds", "--json").stdout)
    assert [world["name"] for world in listed["worlds"]] == list(kibitz.worlds.WORLDS)


def test_worlds_show_problems_with_right_solutions():
    shown = json.loads(kibitz_says("--json", "worlds", "show", "arithmetic", "--count", 3).stdout)
    world = kibitz.worlds.get("arithmetic")
    assert [world.grade(row, row["response"]) for row in shown["rows"]] == [1.0, 1.0, 1.0]
    assert shown["rows"][0]["prompt"] in kibitz_says("worlds", "show", "arithmetic").stdout


@pytest.mark.parametrize("args", [("show",), ("make",)])
def test_a_world_that_is_not_there(args):
    assert_refused(kibitz_says("worlds", *args, "arithmatic"), "no world 'arithmatic'", "did you mean 'arithmetic'")


def test_schema_is_printed_and_written(tmp_path):
    path = tmp_path / "deep" / "schema.json"
    assert kibitz_says("schema", "--output", path).exit_code == 0
    assert path.read_text(encoding="utf-8") == kibitz_says("schema").stdout
    assert json.loads(path.read_text(encoding="utf-8")) == json.loads(json.dumps(kibitz.config.json_schema()))


def test_recipes_are_listed_and_printed():
    listed = json.loads(kibitz_says("recipes", "--json").stdout)["recipes"]
    assert "lora-24gb" in [recipe["name"] for recipe in listed]
    for recipe in listed:
        printed = kibitz_says("recipes", recipe["name"]).stdout
        assert printed.startswith(f"# {recipe['title']}\n")
        assert kibitz.load_recipe(yaml.safe_load(printed)).student.model
    assert_refused(kibitz_says("recipes", "lora"), "no recipe 'lora'", "lora-24gb")


# ------------------------------------------------------------------ train, report, eval


def test_train_on_prompts_of_a_file(recipe, tmp_path):
    from transformers import AutoModelForCausalLM

    answer = kibitz_says("train", recipe, "steps=3", "--json")
    assert answer.exit_code == 0, answer.output
    result = json.loads(answer.stdout)
    assert result["steps"] == 3
    assert result["last_step"]["reverse_kl"] > 0
    assert (tmp_path / "run" / "recipe.yaml").is_file()
    assert Path(result["report"]).is_file()
    assert AutoModelForCausalLM.from_pretrained(result["checkpoint"]).config.num_hidden_layers == 2

    answer = kibitz_says("report", tmp_path / "run", "--output", tmp_path / "page.html")
    assert (answer.exit_code, answer.stdout) == (0, f"{tmp_path / 'page.html'}\n")
    assert "<html" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_train_says_where_things_are(recipe, tmp_path):
    quiet = kibitz_says("train", recipe, "--quiet")
    assert quiet.exit_code == 0, quiet.output
    assert quiet.stderr == ""
    assert str(tmp_path / "run" / "report.html") in quiet.stdout
    assert "What it cost" in quiet.stdout


def test_progress_stays_off_stdout(recipe):
    answer = kibitz_says("train", recipe)
    assert "step 2/2" in answer.stderr
    assert "step 2/2" not in answer.stdout


def test_eval_measures_a_model(small_models, prompts):
    args = ["eval", small_models / "student", "--teacher", small_models / "teacher", "--prompts", prompts]
    settings = ["data.grader=exact", "rollout.max_tokens=6", "eval.num_prompts=4", "eval.samples=2"]
    row = json.loads(kibitz_says(*args, *settings, "--json").stdout)
    assert row["num_prompts"] == 4
    assert row["reverse_kl"] > 0
    assert set(row["pass_at_k"]) == {"1", "2"}
    assert "Reverse KL" in kibitz_says(*args, *settings).stdout


def test_eval_takes_a_run_for_its_last_checkpoint(recipe, prompts, tmp_path):
    assert kibitz_says("train", recipe, "steps=1").exit_code == 0
    args = ["--prompts", prompts, "data.grader=exact", "rollout.max_tokens=6", "--json"]
    of_run = json.loads(kibitz_says("eval", tmp_path / "run", *args).stdout)
    of_checkpoint = json.loads(kibitz_says("eval", tmp_path / "run" / "checkpoints" / "step-000001", *args).stdout)
    assert of_run["sampled"] == of_checkpoint["sampled"]
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert_refused(kibitz_says("eval", tmp_path / "run", *args), "no checkpoint")


def test_eval_on_a_world_and_against_itself():
    student = kibitz.worlds.get("arithmetic").checkpoint("student")
    args = ["--world", "arithmetic", "eval.num_prompts=32", "--json"]
    row = json.loads(kibitz_says("eval", student, "--teacher", student, *args).stdout)
    assert row["split"] == "dev"
    assert row["sampled"]["num"] == 32
    assert abs(row["reverse_kl"]) < 1e-6


# ------------------------------------------------------------------ score


def test_score_finds_the_fork():
    """`5+(2*3)` reads `5+6`: at the 2 the teacher disagrees, and for `=7` after it there is hardly a penalty left."""
    answer = kibitz_says("score", "--prompt", "5+(2*3)", "--response", "5+2=7", "--json")
    (row,) = json.loads(answer.stdout)["rollouts"]
    penalty = [token["student_logp"] - token["teacher_logp"] for token in row["tokens"]]
    assert [token["text"] for token in row["tokens"]] == list("5+2=7")
    assert row["fork"] == 2
    assert penalty[2] == max(penalty) > 1
    assert kibitz_says("score", "--prompt", "5+(2*3)", "--response", "5+2=7").stdout.strip()


def test_score_lets_the_student_write_and_writes_the_page(tmp_path):
    page = tmp_path / "deep" / "page.html"
    args = ["score", "--prompt", "1+2*3", "--prompt", "4*4-1", "--html", page, "--json"]
    result = json.loads(kibitz_says(*args).stdout)
    assert [row["prompt"] for row in result["rollouts"]] == ["1+2*3", "4*4-1"]
    assert result == json.loads(kibitz_says(*args).stdout), "the same seed writes the same"
    assert "<html" in page.read_text(encoding="utf-8")


def test_no_text_reaches_the_terminal_as_a_command():
    """Neither escape sequences nor rich markup: the world's tokenizer knows none of it, but the prompt is shown."""
    answer = kibitz_says("score", "--prompt", "1+\x1b[31m[red]2\x07", "--response", "3")
    assert answer.exit_code == 0, answer.output
    assert "\x1b" not in answer.stdout
    assert "\x07" not in answer.stdout
    assert "[red]" in answer.stdout


# ------------------------------------------------------------------ mistakes


def test_missing_model(recipe, tmp_path):
    assert_refused(kibitz_says("train", recipe, f"student.model={tmp_path}/nowhere"), "student.model", "nowhere")


def test_a_folder_that_is_no_model(recipe, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "README.md").write_text("notes")
    assert_refused(kibitz_says("train", recipe, f"teacher.model={tmp_path}/notes"), "teacher.model", "notes")


def test_a_broken_line_is_named(recipe, prompts):
    prompts.write_text('{"prompt": "1+1", "answer": "2"}\n{"prompt": "2+\n', encoding="utf-8")
    assert_refused(kibitz_says("train", recipe), prompts, "line 2")


def test_no_prompts(recipe, prompts):
    prompts.write_text("\n\n", encoding="utf-8")
    assert_refused(kibitz_says("train", recipe), prompts, "no prompts")


def test_an_empty_prompt(recipe, prompts):
    prompts.write_text('{"prompt": "1+1", "answer": "2"}\n{"prompt": "  ", "answer": "2"}\n', encoding="utf-8")
    assert_refused(kibitz_says("train", recipe), prompts, "line 2", "empty")


def test_no_file_of_prompts(recipe, prompts):
    prompts.unlink()
    assert_refused(kibitz_says("train", recipe), "data.prompts", prompts)


def test_a_column_that_is_not_there(recipe, prompts):
    prompts.write_text('{"question": "1+1", "answer": "2"}\n', encoding="utf-8")
    assert_refused(kibitz_says("train", recipe), "line 1", "'prompt'", "'question'")


def test_a_prompt_beyond_the_limit(recipe):
    assert_refused(kibitz_says("train", recipe, "data.max_prompt_tokens=6"), "line 1", "the limit is 6")


def test_tokenizers_that_differ(recipe, small_models):
    assert_refused(kibitz_says("train", recipe, f"teacher.model={small_models}/stranger"), "tokenizer")


def test_a_negative_learning_rate(recipe):
    assert_refused(kibitz_says("train", recipe, "optim.lr=-0.1"), "optim.lr", "greater than 0", "-0.1")


def test_an_unknown_key(recipe):
    assert_refused(
        kibitz_says("train", recipe, "optim.warmup_step=3"), "optim.warmup_step", "did you mean warmup_steps?"
    )


def test_an_unknown_method(recipe):
    assert_refused(kibitz_says("train", recipe, "method.type=odp"), "unknown method 'odp'", "did you mean opd?")


def test_no_recipe(tmp_path):
    assert_refused(kibitz_says("train", tmp_path / "recipe.yaml"), "no recipe at", tmp_path)


def test_a_folder_that_holds_a_run_offers_a_way_on(recipe, tmp_path):
    assert kibitz_says("train", recipe, "steps=1").exit_code == 0
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert_refused(kibitz_says("train", recipe), "already holds a run", "--resume", "--overwrite", "output=")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics, "the run was left alone"
    assert_refused(kibitz_says("train", recipe, "--resume", "--overwrite"), "--resume", "--overwrite")
    resumed = json.loads(kibitz_says("train", recipe, "--resume", "--json").stdout)
    assert resumed["steps"] == 2
    started_again = json.loads(kibitz_says("train", recipe, "steps=1", "--overwrite", "--json").stdout)
    assert started_again["steps"] == 1


def test_eval_of_nothing(small_models):
    assert_refused(kibitz_says("eval", small_models / "student"), "--world", "--prompts")
    assert_refused(kibitz_says("eval", "nowhere/at/all", "--world", "arithmetic"), "nowhere")


def test_score_of_unequal_numbers():
    args = ["score", "--prompt", "1+1", "--prompt", "2+2", "--response", "2"]
    assert_refused(kibitz_says(*args), "2 prompts and 1 responses")


def test_a_report_of_no_run(tmp_path):
    assert_refused(kibitz_says("report", tmp_path / "nothing"), "no run", "nothing")


def test_debug_shows_where(tmp_path):
    answer = kibitz_says("train", tmp_path / "recipe.yaml", "--debug")
    assert isinstance(answer.exception, kibitz.RecipeError)


# ------------------------------------------------------------------ Ctrl-C


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals are sent the POSIX way")
def test_ctrl_c_leaves_a_run_that_goes_on(recipe, tmp_path):
    """The interrupted run tells how to go on; going on by those words ends like a run that nobody stopped."""
    program = "from kibitz.cli import main; main()"
    line = [sys.executable, "-c", program, "train", str(recipe), "steps=1000000"]
    running = subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 600
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=600)
    assert running.returncode == 130, said
    assert "Traceback" not in said
    assert f"kibitz train {recipe} steps=1000000 --resume" in said
    done = len(metrics.read_text().splitlines())
    assert done >= 3

    steps = done + 2
    resumed = json.loads(kibitz_says("train", recipe, f"steps={steps}", "--resume", "--json").stdout)
    assert resumed["steps"] == steps
    assert [json.loads(row)["step"] for row in metrics.read_text().splitlines()] == list(range(1, steps + 1))


# ------------------------------------------------------------------ the demo


@pytest.mark.slow
def test_demo_in_two_steps(tmp_path):
    small = ["steps=2", "rollout.prompts_per_step=8", "eval.num_prompts=24", "eval.every=0"]
    args = ["demo", "--output", tmp_path / "demo", *small]
    answer = kibitz_says(*args)
    assert answer.exit_code == 0, answer.output
    assert "misconception" in answer.stderr
    for words in (
        "before",
        "after",
        "What it cost",
        "One wrong solution",
        str(tmp_path / "demo" / "report.html"),
    ):
        assert words in answer.stdout, words
    assert kibitz_says(*args, "--quiet").exit_code == 0, "a demo replaces the last demo"


def test_demo_leaves_other_runs_alone(recipe, tmp_path):
    assert kibitz_says("train", recipe, "steps=1").exit_code == 0
    assert_refused(kibitz_says("demo", "--output", tmp_path / "run", "--quiet"), "already holds a run")


@pytest.mark.slow
def test_demo_shows_the_effect(tmp_path):
    """The claim of the README: both accuracies rise, and the 95% intervals before and after do not touch."""
    result = json.loads(kibitz_says("demo", "--output", tmp_path / "demo", "--json").stdout)
    before, after = result["before"], result["after"]
    for how in ("sampled", "greedy"):
        assert after[how]["low"] > before[how]["high"], (how, before[how], after[how])
    assert after["reverse_kl"] < before["reverse_kl"] / 2
