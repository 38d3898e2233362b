"""`kibitz init`: five questions, or flags, and a recipe with a reason behind each line."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from kibitz.cli.output import Output, harmless

FEW = "5e-5 is for all weights of a large model (the cookbook); a model of a few million wants 1e-3"
ADAPTER = "10 x the rate of all weights (LoRA Without Regret)"


def init(
    ctx: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="The file to write.")] = Path("recipe.yaml"),
    student: Annotated[str | None, typer.Option(help="Folder or hub name of the model that learns.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Folder or hub name of the model that comments.")] = None,
    prompts: Annotated[str | None, typer.Option(help="JSONL, parquet or a dataset name; world:NAME for a toy.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="The longest answer, in tokens.")] = None,
    lora: Annotated[bool | None, typer.Option("--lora/--whole", help="Train an adapter, or all weights.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write a recipe: five questions, or as many flags. Each line says why it is there; `kibitz check` looks at it next."""
    out: Output = ctx.obj
    if recipe.exists() and not force:
        raise ValueError(f"{recipe} is there already: write another name, or --force to replace it")
    tree = {
        "student": _answer(out, "student", student, "The student, the model that learns (folder or hub name)", None),
        "teacher": _answer(out, "teacher", teacher, "The teacher, a better model (same tokenizer is simplest)", None),
        "prompts": _answer(out, "prompts", prompts, "The prompts (JSONL, parquet, a dataset, or world:NAME)", None),
        "max_tokens": int(_answer(out, "max-tokens", max_tokens, "The longest answer, in tokens", "1024")),
        "lora": lora if lora is not None else _yes(out, "Train an adapter (LoRA) instead of all weights"),
    }
    text = recipe_text(**tree)

    from kibitz import config

    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text(text, encoding="utf-8")
    found = config.load(recipe)

    def for_a_person(console: Console) -> None:
        name = harmless(str(recipe))
        for label, words in (("recipe", name), ("next", f"kibitz check {name}"), ("then", f"kibitz train {name}")):
            console.print(Text(f"{label:<11}{words}"), soft_wrap=True)

    out.result({"recipe": recipe, "tree": found.model_dump(mode="json", exclude_unset=True)}, for_a_person)


def _answer(out: Output, flag: str, given: Any, question: str, default: str | None) -> str:
    """What the flag says, or else what the person answers."""
    if given is not None:
        return str(given)
    if not _may_ask(out):
        if default is not None:
            return default
        raise ValueError(f"nobody is here to answer: write --{flag}")
    while True:
        said = str(typer.prompt(question, default=default, err=True)).strip()
        if said and (flag != "max-tokens" or (said.isdecimal() and int(said) > 0)):
            return said


def _yes(out: Output, question: str) -> bool:
    return _may_ask(out) and typer.confirm(question, default=False, err=True)


def _may_ask(out: Output) -> bool:
    return out.live and sys.stdin.isatty()


def recipe_text(student: str, teacher: str, prompts: str, max_tokens: int, lora: bool) -> str:
    """The recipe as text. What no question asks about is the default, and is written where people change it."""
    from kibitz.config.commented import commented

    world = prompts.removeprefix("world:") if prompts.startswith("world:") else None
    name = Path(world or prompts).stem
    lines: list[tuple[str, Any, str]] = [
        ("student.model", student, "learns; it writes its own answers"),
        *([("student.lora", {"rank": 32}, "an adapter of rank 32; the base stays as it is")] if lora else []),
        ("teacher.model", teacher, "scores each token of them; with another tokenizer, write tokenizer: own"),
        *(
            [("data.world", world, "a toy; kibitz worlds lists them")]
            if world is not None
            else [("data.prompts", prompts, "rows with prompt or messages, and answer if you want accuracy")]
        ),
        ("method.type", "opd", "on-policy distillation; docs/methods.md has the others"),
        ("method.divergence", "reverse_kl", "learn what the teacher would do, not all that it might do"),
        ("method.support", "full", "the whole vocabulary, exact; top_k or sampled for a teacher behind a URL"),
        ("rollout.prompts_per_step", 64, "Thinking Machines' default"),
        ("rollout.samples_per_prompt", 1, "more where prompts are few"),
        ("rollout.max_tokens", max_tokens, "a longer answer is cut off"),
        ("optim.lr", 5e-4 if lora else 5e-5, ADAPTER if lora else FEW),
        ("optim.warmup_steps", 10, "AdamW's first steps are its wildest"),
        ("steps", 100, "published runs take 50 to 150; kibitz watch shows when it is enough"),
        ("eval.every", 20, "in steps; a file of held-out prompts goes into eval.prompts"),
        ("save.every", 50, "in steps; kibitz train --resume goes on from there"),
        ("output", f"runs/{name}", "the folder of the run"),
    ]
    tree: dict[str, Any] = {}
    for setting, value, _ in lines:
        *parents, last = setting.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    head = [
        "A recipe of kibitz. Everything that it does not say has a default: kibitz schema lists them with their sources."
    ]
    return commented(tree, {setting: why for setting, _, why in lines}, head)
