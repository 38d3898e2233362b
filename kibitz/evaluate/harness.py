"""Published benchmarks (GSM8K, MATH-500, AIME, IFEval, ...) through EleutherAI's lm-evaluation-harness, an extra.

It brings the tasks, their prompts and their graders, so that numbers compare with those of others. kibitz brings the
model: a folder (an adapter is merged into its base), or a vLLM server by its URL. A task in the harness's own format, a
YAML file in a folder of yours, runs like its own. Tasks that execute code the model wrote are refused.
"""

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kibitz.config import ModelConfig
from kibitz.models.load import load_model, load_tokenizer, pick_device


def run_tasks(
    model: str,
    tasks: Sequence[str],
    *,
    url: str | None = None,
    folder: Path | None = None,
    limit: int | None = None,
    max_tokens: int | None = None,
    batch_size: int = 16,
    device: str = "auto",
) -> dict[str, dict[str, float]]:
    """Every number that the harness gives, by task and `metric,filter`; `..._stderr` are its standard errors.

    `model` is a folder or hub name, of a server what it serves; `folder` holds tasks of your own. Prompts follow the
    chat template where the tokenizer has one."""
    harness = _harness()
    tokenizer = load_tokenizer(ModelConfig(model=model), "model")
    manager = harness.tasks.TaskManager(include_path=None if folder is None else str(folder))
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise ValueError(
            f"the harness knows no task {', '.join(unknown)}: `lm_eval ls tasks` lists them, --task-folder adds yours"
        )
    writer = _server(model, url) if url else _folder(model, tokenizer, batch_size, device)
    with contextlib.redirect_stdout(sys.stderr):
        answer = harness.simple_evaluate(
            writer,
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            gen_kwargs={"max_gen_toks": max_tokens} if max_tokens else None,
            apply_chat_template=tokenizer.chat_template is not None,
            log_samples=False,
        )
    assert answer is not None  # only ranks other than the first get nothing
    return {task: {name: value for name, value in row.items() if isinstance(value, int | float)}
            for task, row in answer["results"].items()}  # fmt: skip


def _harness() -> Any:
    try:
        import lm_eval  # pyright: ignore[reportMissingImports]
        import lm_eval.tasks  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f"--tasks needs lm-evaluation-harness ({error}): pip install 'kibitz[evals]'") from None
    return lm_eval


def _folder(model: str, tokenizer: Any, batch_size: int, device: str) -> Any:
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    where = pick_device(device)
    loaded = load_model(ModelConfig(model=model), "model", where, tokenizer)
    return HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size, device=str(where))


def _server(model: str, url: str) -> Any:
    """Prompts as token ids, made by the model's own tokenizer here. The key stands in the environment."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI  # pyright: ignore[reportMissingImports]

    os.environ.setdefault("OPENAI_API_KEY", "none")  # vLLM without --api-key takes any
    return LocalCompletionsAPI(model=model, base_url=f"{url.rstrip('/')}/v1/completions", num_concurrent=16)
