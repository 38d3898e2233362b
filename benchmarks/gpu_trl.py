"""The same models and prompts through TRL's DistillationTrainer, for `benchmarks/gpu.py`: exact reverse KL (beta 1), one sample
of each prompt, each prompt as often as kibitz samples it; the rest as TRL has it by default, with activation checkpointing.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

VERSION = "1.16.0"


def missing() -> str | None:
    """Why TRL cannot be measured here; None if it can."""
    try:
        import trl
        from trl import DistillationTrainer
    except ImportError as error:
        return f"trl=={VERSION} does not import: {error}"
    del DistillationTrainer
    return None if trl.__version__ == VERSION else f"trl is {trl.__version__}, and {VERSION} is compared with"


def train(tree: dict[str, Any], output: Path) -> dict[str, Any]:
    """The second of two steps of `tree`, a recipe as a dict: seconds, tokens a second, the largest memory of its phases."""
    import datasets
    import torch
    from transformers import TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    rollout, device = tree["rollout"], torch.device(tree["device"])
    rows = datasets.load_dataset("json", data_files=tree["data"]["prompts"], split="train")
    prompts = [text for text in rows["prompt"] for _ in range(rollout["samples_per_prompt"])]
    num = rollout["prompts_per_step"] * rollout["samples_per_prompt"]
    at_once = _at_once(tree, num, len(prompts[0].split()))
    settings = DistillationConfig(
        output_dir=str(output),
        max_steps=2,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=num // at_once,
        max_completion_length=rollout["max_tokens"],
        temperature=1.0,
        top_k=0,
        beta=1.0,
        learning_rate=tree["optim"]["lr"],
        gradient_checkpointing=tree["optim"].get("checkpointing", False),
        bf16=device.type == "cuda",
        use_cpu=device.type == "cpu",
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
        shuffle_dataset=False,
        teacher_model_init_kwargs={"dtype": "bfloat16"},
    )
    clock = _Clock(device)

    class Steps(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.end()

    trainer = DistillationTrainer(
        model=tree["student"]["model"],
        teacher_model=tree["teacher"]["model"],
        args=settings,
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
        peft_config=_lora(tree["student"].get("lora")),
        callbacks=[Steps()],
    )
    trainer._generate_and_score_completions = clock.around(trainer._generate_and_score_completions)
    trainer.train()
    tokens = num * _last(trainer.state.log_history, "completions/mean_length")
    return {
        "seconds": clock.seconds,
        "tokens_per_second": tokens / sum(clock.seconds.values()),
        "num_tokens": tokens,
        "peak_bytes": clock.peaks,
        "rows_of_a_micro_batch": at_once,
        "grad_norm": _last(trainer.state.log_history, "grad_norm"),
    }


def _at_once(tree: dict[str, Any], num: int, words: int) -> int:
    """The rows of a micro-batch: a divisor of all `num`, of as many tokens as the recipe's."""
    most = max(1, min(num, tree["optim"]["tokens_per_micro_batch"] // (words + tree["rollout"]["max_tokens"])))
    return next(size for size in range(most, 0, -1) if num % size == 0)


def _last(rows: list[dict[str, Any]], name: str) -> Any:
    """The newest number that was logged by that name, None if none was."""
    return next((row[name] for row in reversed(rows) if name in row), None)


def _lora(section: dict[str, Any] | None) -> Any:
    if section is None:
        return None
    import peft

    return peft.LoraConfig(r=section["rank"], lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


class _Clock:
    """Seconds and memory of the last step: what is written, and all else, in which the teacher scores as well. transformers calls
    a step begun before its first micro-batch is prepared, which is when TRL writes."""

    def __init__(self, device: Any):
        import torch

        self.device, self.cuda = device, torch.cuda
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, float] = {}
        self._written = self._start = 0.0

    def now(self) -> float:
        if self.device.type == "cuda":
            self.cuda.synchronize()
        return time.perf_counter()

    def begin(self) -> None:
        self._start, self._written = self.now(), 0.0

    def end(self) -> None:
        self.seconds = {"sampling": self._written, "training": self.now() - self._start - self._written}
        self._peak("training")

    def around(self, write: Callable[..., Any]) -> Callable[..., Any]:
        """`write`, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = self.now()
            self._reset()
            result = write(*args, **kwargs)
            self._written += self.now() - begin
            self._peak("sampling")
            return result

        return timed

    def _reset(self) -> None:
        if self.device.type == "cuda":
            self.cuda.reset_peak_memory_stats()

    def _peak(self, phase: str) -> None:
        if self.device.type == "cuda":
            self.peaks[phase] = float(self.cuda.max_memory_allocated())
            self._reset()
