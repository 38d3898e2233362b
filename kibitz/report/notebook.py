"""Runs, rollouts, scores, evaluations and diagnoses as HTML in a notebook, with the report's own parts.

    %load_ext kibitz.report

Nothing that is shown knows of it: the formatters are registered by the names of the types, which are not imported. Each
page stands in a frame of its own, whose scripts reach neither the notebook nor the network.
"""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kibitz.report import page
from kibitz.report.diagnosis import diagnosis_page
from kibitz.report.folder import Row, Run, read_run

TALL, LOW = 640, 320


def register(shell: Any) -> None:
    """Teach an IPython shell to show them. What is none of them is shown as before."""
    formatter = shell.display_formatter.formatters["text/html"]
    formatter.for_type_by_name("kibitz.training.trainer", "Run", run_html)
    formatter.for_type_by_name("kibitz.types", "Rollout", lambda rollout: rows_html([rollout]))
    formatter.for_type(list, rows_html)
    formatter.for_type(dict, dict_html)


def run_html(run: Any) -> str:
    """A run of `kibitz.train`: before and after, tokens, costs. The curves are in its report."""
    return frame(page.summary_page(read_run(Path(run.folder))), TALL)


def rows_html(rows: Sequence[Any]) -> str | None:
    """Scores (rows as in rollouts.jsonl), or rollouts; None for any other list."""
    if not rows:
        return None
    if all(isinstance(row, dict) and isinstance(row.get("tokens"), list) and "prompt" in row for row in rows):
        return frame(page.rollout_page(list(rows)), TALL)
    if all(hasattr(row, "response_ids") and hasattr(row, "prompt") for row in rows):
        return frame(page.rollout_page([_row(rollout) for rollout in rows]), LOW)
    if all(_is_evaluation(row) for row in rows):
        evals = [{"step": place, **row} for place, row in enumerate(rows)]
        return frame(page.summary_page(Run(name="", evals=evals)), LOW)
    return None


def dict_html(row: Row) -> str | None:
    """An evaluation, as `kibitz.evaluate` and `run.evals` have it, or what a diagnosis found; None for any other dict."""
    if _is_evaluation(row):
        return frame(page.summary_page(Run(name="", evals=[{"step": 0, **row}])), LOW)
    if isinstance(row.get("numbers"), dict) and "contexts" in row and "examples" in row:
        return frame(diagnosis_page(row), TALL)
    return None


def _is_evaluation(row: Any) -> bool:
    return isinstance(row, dict) and "num_prompts" in row and ("sampled" in row or "reverse_kl" in row)


def _row(rollout: Any) -> Row:
    """A rollout without a teacher's word: its text."""
    text = rollout.text or f"{len(rollout.response_ids)} tokens that nobody has decoded yet"
    prompt = rollout.prompt
    return {"prompt": prompt.text, "prompt_key": f"{prompt.key}/{rollout.sample}", "answer": prompt.answer, "response": text,
            "reward": rollout.reward, "finished": rollout.finished}  # fmt: skip


def frame(document: str, height: int) -> str:
    """A page inside another: it may run its own scripts, and has no origin that anything could be asked from."""
    return (
        f'<iframe sandbox="allow-scripts" title="kibitz" style="width:100%;height:{height}px;border:0" '
        f'srcdoc="{html.escape(document)}"></iframe>'
    )
