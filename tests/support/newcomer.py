"""A folder in which the commands of the pages work as they stand: models, prompts, a short recipe, and runs of many names."""

import json
import shutil
from pathlib import Path

from support.cli import kibitz_says
from support.gguf_files import folder_of
from support.paths import ROOT

import kibitz
from kibitz import worlds
from kibitz.cli import demo

RECIPE = """student: {{model: S{lora}}}
teacher: {{model: T}}
data:    {{prompts: prompts.jsonl}}
method:  {{type: opd}}
rollout: {{prompts_per_step: 4, samples_per_prompt: 2, max_tokens: 16, store: true}}
optim:   {{lr: 1.0e-3}}
steps:   2
eval:    {{every: 1, num_prompts: 6, heatmaps: 4}}
threads: 1
output:  {output}
"""
TASK = """task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: test.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: [], do_sample: false, max_gen_toks: 6}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def prepare(home: Path) -> Path:
    """Make the folder, which must be the current one: recipes name paths from there."""
    folder_of(home / "S", "llama", max_position_embeddings=2048)
    folder_of(home / "T", "qwen3", max_position_embeddings=2048)
    assert kibitz_says("export", "S", "--output", "SmolLM2.gguf", "--gguf", "float16").exit_code == 0
    for name in ("prompts.jsonl", "test.jsonl", "held-out.jsonl", "p.jsonl"):
        rows = worlds.get("arithmetic").rows("test", 8, seed=len(name))
        (home / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (home / "recipe.yaml").write_text(RECIPE.format(output="runs/first", lora=""), encoding="utf-8")
    (home / "my-tasks").mkdir()
    (home / "my-tasks" / "sums.yaml").write_text(TASK, encoding="utf-8")
    for name in ("recipes", "benchmarks", "examples"):
        (home / name).symlink_to(ROOT / name)
    for output, lora in (("runs/run", ""), ("runs/lora", ", lora: {rank: 2}")):
        (home / "a.yaml").write_text(RECIPE.format(output=output, lora=lora), encoding="utf-8")
        kibitz.train("a.yaml", quiet=True)
    for name in ("my-run", "another", "a", "b"):
        shutil.copytree(home / "runs" / "run", home / "runs" / name)
    small = ["steps=1", "data.limit=64", "rollout.prompts_per_step=4", "eval.num_prompts=12"]
    kibitz.train(demo.recipe(), small, quiet=True)
    return home
