"""One side's steps of on-policy distillation, for `benchmarks.step`: kibitz, or TRL's DistillationTrainer, on the same folders.

Both sides take exact reverse KL, AdamW with the same settings, one micro-batch a step, float32, no recomputation. Phases, on
both: sampling; scoring (the teacher without its head); training (the student, both heads, the backward pass, the update).
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.worker import Clock

PHASES = ("sampling", "scoring", "training")


def work(side: str, **given: Any) -> dict[str, Any]:
    return (with_kibitz if side == "kibitz" else with_trl)(**given)


def with_kibitz(
    home: str,
    rows: int,
    tokens: int,
    steps: int,
    lr: float,
    threads: int,
    store: str = "",
    change: dict[str, Any] | None = None,
    output: str = "",
) -> dict[str, Any]:
    """Seconds of each step by phase, losses, FLOPs; `store` is where the rollouts go, `change` are other settings of the recipe,
    and `output` the folder of the run, where several processes share it."""
    import kibitz

    watch = _Watch()
    with tempfile.TemporaryDirectory() as folder:
        tree = {
            "student": {"model": f"{home}/student", "dtype": "float32"},
            "teacher": {"model": f"{home}/teacher", "dtype": "float32"},
            "data": {"prompts": f"{home}/prompts.jsonl", "shuffle": False},
            "method": {"type": "opd"},
            "rollout": {"prompts_per_step": rows, "samples_per_prompt": 1, "max_tokens": tokens, "store": bool(store)},
            "optim": {"lr": lr},
            "eval": {"every": 0, "num_prompts": 1, "heatmaps": 0},
            "save": {"every": 0},
            "steps": steps,
            "device": "cpu",
            "threads": threads,
            "output": output or f"{folder}/run",
        }
        for name, section in (change or {}).items():
            tree[name] = {**tree[name], **section} if name in tree and "=" not in section else _without(section)
        run = kibitz.train(tree, overwrite=True, progress=watch)
        if store:
            Path(store).write_text((run.folder / "stored.jsonl").read_text(encoding="utf-8"), encoding="utf-8")
    return {
        "steps": watch.steps,
        "num_tokens": [row["num_tokens"] for row in run.metrics],
        "losses": [row["reverse_kl"] for row in run.metrics],
        "grad_norms": [row["grad_norm"] for row in run.metrics],
        "flops": [row["flops"] for row in run.metrics],
        "bytes": [row.get("teacher_bytes_per_token") for row in run.metrics],
        "signal_bytes": [row.get("signal_bytes") for row in run.metrics],
        "from": str(Path(kibitz.__file__).parents[1]),
    }


def _without(section: dict[str, Any]) -> dict[str, Any]:
    """A section that replaces the whole one, as its key "=" says."""
    return {name: value for name, value in section.items() if name != "="}


class _Watch:
    """Hears where steps begin and end, and keeps a clock for what kibitz's ledger times: on the processor, too."""

    def __init__(self) -> None:
        self.clock, self.steps = Clock(), []
        ledger = _ledger()
        timed = ledger.timed

        @contextmanager
        def clocked(one: Any, name: str) -> Iterator[None]:
            before = self.clock.current()
            self.clock.phase(name if name in PHASES else "other")
            with timed(one, name):
                yield
            self.clock.phase(before)

        ledger.timed = clocked

    def phase(self, name: str) -> None:
        if name == "rollouts":
            self.clock.take()  # what came before is no step
            self.clock.phase("other")

    def step(self, row: dict[str, Any]) -> None:
        self.steps.append(self.clock.take())

    def start(self, recipe: Any, first_step: int) -> None: ...
    def evaluated(self, row: dict[str, Any]) -> None: ...
    def note(self, text: str) -> None: ...


def _ledger() -> Any:
    """The class that times phases; kibitz.metrics had it until the code of e8b724f."""
    try:
        from kibitz.ledger import Ledger
    except ImportError:
        from kibitz.metrics import Ledger  # pyright: ignore[reportMissingImports]
    return Ledger


def with_trl(home: str, rows: int, tokens: int, steps: int, lr: float, threads: int, given: str = "") -> dict[str, Any]:
    """The same through TRL; `given` is a file of rollouts that kibitz stored, which it takes instead of writing its own."""
    import datasets
    import torch
    import transformers
    from transformers import TrainerCallback
    from trl import DistillationConfig, DistillationTrainer  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    clock, found = Clock(), []
    texts = [
        json.loads(line)["prompt"] for line in Path(home, "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    chats = [[{"role": "user", "content": text}] for text in texts[: rows * steps]]

    class Steps(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            clock.take()
            clock.phase("training")

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            found.append(clock.take())

    with tempfile.TemporaryDirectory() as folder:
        trainer = DistillationTrainer(
            model=f"{home}/student",
            teacher_model=f"{home}/teacher",
            args=DistillationConfig(**_settings(folder, rows, tokens, steps, lr)),
            train_dataset=datasets.Dataset.from_dict({"prompt": chats}),
            callbacks=[Steps()],
        )
        trainer._generate_and_score_completions = _within(clock, "sampling", trainer._generate_and_score_completions)
        bodies = trainer._get_last_hidden_state
        scored = _within(clock, "scoring", bodies)
        teacher = trainer.accelerator.unwrap_model(trainer.teacher_model)
        trainer._get_last_hidden_state = lambda model, *rest, **more: (scored if model is teacher else bodies)(
            model, *rest, **more
        )
        if given:
            trainer._generate_single_turn = _stored(Path(given))
        trainer.train()
    told = [row for row in trainer.state.log_history if "loss" in row]
    lengths = [row["completions/mean_length"] for row in told]
    return {
        "steps": found,
        "num_tokens": [round(rows * length) for length in lengths],
        "losses": [row["loss"] for row in told],
        "grad_norms": [row["grad_norm"] for row in told],
    }


def _settings(folder: str, rows: int, tokens: int, steps: int, lr: float) -> dict[str, Any]:
    """What kibitz's defaults are, in TRL's words."""
    return {
        "output_dir": folder, "max_steps": steps, "per_device_train_batch_size": rows, "gradient_accumulation_steps": 1,
        "max_completion_length": tokens, "temperature": 1.0, "top_k": 0, "beta": 1.0,
        "learning_rate": lr, "lr_scheduler_type": "linear", "warmup_steps": 0, "weight_decay": 0.0,
        "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_epsilon": 1e-8, "max_grad_norm": 1.0,
        "gradient_checkpointing": False, "bf16": False, "fp16": False, "use_cpu": True,
        "model_init_kwargs": {"dtype": "float32"}, "teacher_model_init_kwargs": {"dtype": "float32"},
        "save_strategy": "no", "report_to": "none", "logging_steps": 1, "disable_tqdm": True, "shuffle_dataset": False,
    }  # fmt: skip


def _within(clock: Clock, phase: str, run: Any) -> Any:
    """`run`, whose time is that of a phase; afterwards the one that was interrupted goes on."""

    def timed(*args: Any, **kwargs: Any) -> Any:
        before = clock.current()
        clock.phase(phase)
        try:
            return run(*args, **kwargs)
        finally:
            clock.phase(before)

    return timed


def _stored(path: Path) -> Any:
    """TRL's `_generate_single_turn`, which finds responses by their prompts' ids."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    by_prompt = {tuple(row["prompt_ids"]): row["response_ids"] for row in rows}
    return lambda prompt_ids, *rest, **more: [by_prompt[tuple(ids)] for ids in prompt_ids]
