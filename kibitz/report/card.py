"""A model card, the README.md of an exported checkpoint, from the files of its run. What they do not know is left open."""

import html
import re
from pathlib import Path
from typing import Any

import yaml

from kibitz import __version__
from kibitz.config import TEACHER_CONFIGS
from kibitz.report import costs, summary
from kibitz.report.folder import Row, Run, dig, read_run
from kibitz.report.formats import safe_lines

OPEN = (
    "This card states no licence: kibitz cannot know it. It depends on those of the student, of the teacher (some forbid that "
    "other models learn from theirs), and of the prompts. Write it into `license:` above before you publish the model."
)
USES = "For what the model may be used, and for what not, nobody has written yet: that is yours to say."


def model_card(folder: Path, step: int | None = None) -> str:
    """The card of a checkpoint of a run: of this step, or of its last."""
    run = _until(read_run(folder), step)
    parts = [
        _front(run),
        f"# {_plain(run.name)}",
        " ".join(_markdown(sentence) for sentence in summary.sentences(run)),
        f"Trained with kibitz {_plain(str(run.info.get('version') or __version__))}; checkpoint of step {run.last_step}.",
        "## Evaluation",
        *_evaluations(run),
        "## What it learnt from",
        *_sources(run),
        "## Cost",
        _costs(run),
        "## Licence and use",
        OPEN,
        USES,
        "## Recipe",
        _fenced(run.recipe_text or "(the run has kept no recipe)", "yaml"),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _until(run: Run, step: int | None) -> Run:
    if step is not None:
        run.metrics = [row for row in run.metrics if row["step"] <= step]
        run.evals = [row for row in run.evals if row["step"] <= step]
    return run


def _front(run: Run) -> str:
    """The front matter that model hubs read."""
    student = dig(run.recipe, "student", "model")
    front: Row = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    front |= {"tags": ["kibitz", "distillation", str(dig(run.recipe, "method", "type") or "unknown")]}
    if isinstance(student, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", student) and not Path(student).exists():
        front["base_model"] = student
    text = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    return f"---\n{text}# license: left open, see below\n---"


def _evaluations(run: Run) -> list[str]:
    """A table for each split: before, after, with 95% intervals."""
    found = []
    for comparison in summary.comparisons(run):
        rows = [["", f"step {comparison.first_step}", f"step {comparison.last_step}"]]
        rows += [[m.label, _cell(m.before), _cell(m.after)] for m in comparison.measures]
        split = f" of the split {_plain(comparison.split)}" if comparison.split else ""
        found += [f"{comparison.asked}{split}; brackets are 95% intervals.", _table(rows)]
    return found or ["Nothing was evaluated in this run."]


def _cell(cell: summary.Cell) -> str:
    return f"{cell.text} [{cell.interval}]" if cell.interval else cell.text


def _sources(run: Run) -> list[str]:
    rows = [["", ""], ["student", _named(dig(run.recipe, "student", "model"))]]
    teachers = run.recipe.get("teacher")
    for teacher in teachers if isinstance(teachers, list) else [teachers]:
        if isinstance(teacher, dict):
            named = next((teacher[key] for key in ("model", *TEACHER_CONFIGS) if teacher.get(key)), None)
            rows.append(["teacher", _named(named)])
    data = run.recipe.get("data")
    rows.append(
        ["prompts", _named(dig(data, "prompts") or (f"world {dig(data, 'world')}" if dig(data, "world") else None))]
    )
    rows.append(["method", _plain(summary.title(run))])
    rows.append(["seed", _named(run.recipe.get("seed"))])
    return [_table(rows)]


def _costs(run: Run) -> str:
    table = costs.table(run)
    if table is None:
        return "Neither operations nor seconds were counted."
    rows = [["phase", "compute", "", "time", ""], *table["rows"], table["total"]]
    device = f" on {_plain(str(run.info['device']))}" if run.info.get("device") else ""
    return f"{_table(rows)}\n\nFrom start to end {table['wall']}{device}."


# ------------------------------------------------------------------ markdown in which names stay names


def _plain(text: str) -> str:
    """Text on one line that is neither HTML nor markdown."""
    return re.sub(r"([\\`*_\[\]|#<>])", r"\\\1", " ".join(safe_lines(text).split()))


def _named(value: Any) -> str:
    return (
        "–"
        if value is None
        else f"`{' '.join(safe_lines(str(value)).split()).replace('`', chr(39)).replace('|', '/')}`"
    )


def _markdown(sentence: Any) -> str:
    """A sentence of the report: its code stays code, and the rest is plain."""
    parts = re.split(r"<code>(.*?)</code>", str(sentence))
    return "".join(_named(html.unescape(part)) if i % 2 else _plain_words(part) for i, part in enumerate(parts))


def _plain_words(part: str) -> str:
    words = _plain(html.unescape(part))
    return f"{' ' if part[:1] == ' ' else ''}{words}{' ' if part[-1:] == ' ' and words else ''}"


def _table(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def _fenced(text: str, language: str) -> str:
    """A block that the text cannot end."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence}{language}\n{safe_lines(text).rstrip()}\n{fence}"
