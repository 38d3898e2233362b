"""The recipes for real models: each is read, checked, and run for two steps with tiny random models of its architecture, a
byte-level tokenizer with Qwen's template, and a file of rows with the columns that its data set has."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from support.models import make_model
from support.paths import ROOT
from support.qwen import qwen3
from support.tokenizers_zoo import qwen_tokenizer

import kibitz
from kibitz import config, preflight
from kibitz.config import LocalTeacherConfig
from kibitz.preflight import budget
from kibitz.preflight.shapes import shape_of

FOLDER = ROOT / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
ROWS = [
    {"solution": f"{i}+{i}={2 * i}"}
    | dict.fromkeys(("question", "problem", "prompt"), f"What is {i}+{i}?")
    | dict.fromkeys(("final_answer", "answer"), str(2 * i))
    for i in range(8)
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, Path]:
    home, tokenizer = tmp_path_factory.mktemp("tiny"), qwen_tokenizer()
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    for number, name in enumerate(("student", "teacher")):
        make_model(home / name, seed=number, vocab_size=len(tokenizer), max_position_embeddings=32768, **ids)
        tokenizer.save_pretrained(home / name)
    rows = home / "rows.jsonl"
    turns = [{"from": "human", "value": "What is 1+1?"}, {"from": "gpt", "value": "2"}]
    chat = [{"role": "user", "content": "Say hi."}, {"role": "assistant", "content": "Hi."}]
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (home / "turns.jsonl").write_text("".join(json.dumps({"conversations": turns}) + "\n" for _ in range(8)))
    (home / "chat.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for _ in range(8)))
    return {path.stem: path for path in home.iterdir()}


DATA = {
    "open-thoughts/OpenThoughts3-1.2M": "turns",
    "allenai/tulu-3-sft-mixture": "chat",
    "zwhe99/DeepMath-103K": "rows",
    "siyanzhao/Openthoughts_math_30k_opsd": "rows",
}


def small(recipe: config.Recipe, tiny: dict[str, Path], output: Path) -> list[str]:
    """Overrides that leave everything of a recipe but its size."""
    changes = [
        f"student.model={tiny['student']}",
        f"data.prompts={tiny[DATA[recipe.data.prompts]]}",
        "data.limit=8",
        "rollout.prompts_per_step=2",
        "rollout.max_tokens=6",
        f"rollout.samples_per_prompt={min(2, recipe.rollout.samples_per_prompt)}",
        "steps=2",
        "eval.every=0",
        "threads=1",
        f"output={output}",
    ]
    if recipe.rollout.engine == "vllm":
        changes += ["rollout.engine=torch", "rollout.urls=[]"]
    own = recipe.teacher is None or hasattr(recipe.teacher, "student")
    kept = getattr(recipe.teacher, "quantize", None)
    teacher = f"{{model: {tiny['teacher']}}}" if kept is None else f"{{model: {tiny['teacher']}, quantize: {kept}}}"
    return changes if own else [*changes, f"teacher={teacher}"]


def test_there_are_recipes():
    assert len(RECIPES) >= 3


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_what_was_published_and_what_we_ran(path):
    head = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert any("Published" in line for line in head)
    assert any("Ours:" in line for line in head)
    assert f"({path.name})" in (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains(path, tiny, tmp_path):
    recipe = config.load(path, [])
    if recipe.student.quantize is not None:
        pytest.importorskip("bitsandbytes")
    asks = config.load(path, small(recipe, tiny, tmp_path / "run"))
    lights = {finding.name: finding for finding in preflight.check_files(asks, preflight.Options(teraflops=1))}
    assert preflight.worst(list(lights.values())) != "red", [f.text for f in lights.values()]
    assert lights["thinking mode"].light == ("green" if recipe.data.template else "amber")
    run = kibitz.train(asks)
    assert [row["step"] for row in run.metrics] == [1, 2]
    assert run.checkpoint is not None
    assert asks.method == recipe.method
    assert asks.optim == recipe.optim


SIZED = re.compile(r"# Sized for (one|\d+) GPUs? of (\d+) GB")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_fits_the_gpus_that_it_states(path, tmp_path):
    """By the plan of `kibitz check`, from the shapes of its models alone, with nine tenths of the memory."""
    recipe = config.load(path, [])
    found = SIZED.search(path.read_text(encoding="utf-8"))
    assert found is not None, "write `# Sized for N GPUs of M GB.`"
    devices, room = 1 if found[1] == "one" else int(found[1]), float(found[2]) * budget.GIB
    sections = [recipe.student, *(one for one in recipe.teachers if isinstance(one, LocalTeacherConfig))]
    renamed = [one.model_copy(update={"model": str(qwen3(tmp_path, one.model))}) for one in sections]
    shapes = [shape_of(section, torch.bfloat16) for section in renamed]
    plan = budget.memory(recipe, budget.Models(shapes[0], shapes[1:]), recipe.data.max_prompt_tokens, devices, room)
    assert plan.peak <= 0.9 * room, budget.by_phase(plan)


def test_every_kind_of_gpu_has_a_recipe_and_students_go_from_the_smallest_to_8b():
    texts = [path.read_text(encoding="utf-8") for path in RECIPES]
    assert {"one GPU of 24 GB", "one GPU of 80 GB", "8 GPUs of 80 GB"} <= {
        found[0].removeprefix("# Sized for ") for text in texts if (found := SIZED.search(text)) is not None
    }
    students = {config.load(path, []).student.model for path in RECIPES}
    assert {"Qwen/Qwen3-0.6B-Base", "Qwen/Qwen3-1.7B-Base", "Qwen/Qwen3-8B-Base"} <= students


def test_the_slurm_script_is_shell_and_the_skypilot_file_names_a_recipe():
    script = FOLDER / "launch" / "slurm.sh"
    assert subprocess.run(["bash", "-n", script], check=False, capture_output=True).returncode == 0
    task = yaml.safe_load((FOLDER / "launch" / "skypilot.yaml").read_text(encoding="utf-8"))
    assert (FOLDER.parent / task["envs"]["RECIPE"]).is_file()
    assert "--resume" in task["run"]
    assert "--resume" in script.read_text(encoding="utf-8")
