"""`kibitz score --prompts`: look before training. The page, the numbers and the recipe go into one folder."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kibitz.cli.output import Output, harmless
from kibitz.cli.places import resolved

DEFAULT = Path("runs/diagnosis")


def diagnose(
    output: Output,
    models: tuple[str | None, ...],
    source: tuple[str | None, str | None],
    overrides: list[str],
    num_prompts: int,
    price: float | None,
    out: Path | None,
) -> None:
    """`models` are the student and the teacher (of a world those that it ships, if none is named), `source` the file of prompts
    or the world."""
    from kibitz import config

    recipe = config.load(_tree(*models, *source), overrides)

    from kibitz.files import write_atomically
    from kibitz.preflight.diagnosis import diagnose as look
    from kibitz.report.diagnosis import diagnosis_page

    found = look(recipe, num_prompts, price, output.say)
    folder = out or DEFAULT
    folder.mkdir(parents=True, exist_ok=True)
    paths = {
        name: folder / f"{name}.{kind}"
        for name, kind in (("diagnosis", "html"), ("numbers", "json"), ("recipe", "yaml"))
    }
    write_atomically(paths["recipe"], found["recipe"])
    write_atomically(paths["diagnosis"], diagnosis_page(found | {"recipe_file": str(paths["recipe"])}))
    write_atomically(paths["numbers"], json.dumps({k: v for k, v in found.items() if k != "examples"}, indent=1) + "\n")
    tree = {key: value for key, value in found.items() if key not in ("examples", "recipe")}
    output.result(tree | {"files": paths}, lambda console: _show(console, found, paths))


def _tree(student: str | None, teacher: str | None, prompts: str | None, world: str | None) -> dict[str, Any]:
    from kibitz import worlds

    if prompts is not None and world is not None:
        raise ValueError("write either --prompts FILE or --world NAME")
    names = {"student": student, "teacher": teacher}
    for role, name in names.items():
        if name is None and world is None:
            raise ValueError(f"write --{role} FOLDER-OR-NAME: --prompts {prompts} brings no models")
        if name is None and world is not None:
            names[role] = str(worlds.get(world).checkpoint(role))
    names = {role: resolved(str(name)) for role, name in names.items()}
    return {
        "student": {"model": names["student"]},
        "teacher": {"model": names["teacher"]},
        "data": {"world": world} if world is not None else {"prompts": prompts},
    }


def _show(console: Console, found: dict[str, Any], paths: dict[str, Path]) -> None:
    from kibitz.report.diagnosis import facts_in_words, pattern_in_words

    table = Table(box=None, header_style="dim", show_header=False)
    for label, figure, word in facts_in_words(found):
        table.add_row(Text(label), Text(figure, style="bold", justify="right"), Text(word, style="dim"))
    console.print(table)
    if found["contexts"]:
        console.print(Text("\nwhere they differ: the share of the divergence, and what stands before", style="bold"))
    for one in found["contexts"][:4]:
        words = " and ".join(pattern_in_words(pattern) for pattern in one["patterns"])
        console.print(Text(f"{100 * one['share']:>6.1f}%  {harmless(words)}"), soft_wrap=True)
    for doubt in found["doubts"]:
        console.print(Text(f"but: {doubt}", style="yellow"), soft_wrap=True)
    console.print()
    for name, path in paths.items():
        console.print(Text(f"{name:<11}{harmless(str(path))}"), soft_wrap=True)
    console.print(Text(f"{'next':<11}kibitz train {harmless(str(paths['recipe']))}"), soft_wrap=True)
