"""The recipes for real models: each is read, checked, and run for two steps with tiny random models of its architecture, a
byte-level tokenizer with Qwen's template, and a file of rows with the columns that its data set has."""

import json
import subprocess
from pathlib import Path

import pytest
import yaml
from support.models import make_model
from support.paths import ROOT
from support.tokenizers_zoo import qwen_tokenizer

import kibitz
from kibitz import config, preflight

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
    return changes if own else [*changes, f"teacher={{model: {tiny['teacher']}}}"]


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
    asks = config.load(path, small(recipe, tiny, tmp_path / "run"))
    lights = {finding.name: finding for finding in preflight.check_files(asks, preflight.Options(teraflops=1))}
    assert preflight.worst(list(lights.values())) != "red", [f.text for f in lights.values()]
    assert lights["thinking mode"].light == ("green" if recipe.data.template else "amber")
    run = kibitz.train(asks)
    assert [row["step"] for row in run.metrics] == [1, 2]
    assert run.checkpoint is not None
    assert asks.method == recipe.method
    assert asks.optim == recipe.optim


def test_the_slurm_script_is_shell_and_the_skypilot_file_names_a_recipe():
    script = FOLDER / "launch" / "slurm.sh"
    assert subprocess.run(["bash", "-n", script], check=False, capture_output=True).returncode == 0
    task = yaml.safe_load((FOLDER / "launch" / "skypilot.yaml").read_text(encoding="utf-8"))
    assert (FOLDER.parent / task["envs"]["RECIPE"]).is_file()
    assert "--resume" in task["run"]
    assert "--resume" in script.read_text(encoding="utf-8")
