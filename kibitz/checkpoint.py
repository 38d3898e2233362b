"""Checkpoints: a plain Hugging Face folder, and beside the weights what training needs to go on.

    checkpoints/step-000050/            loads with AutoModelForCausalLM.from_pretrained; of LoRA, with peft
    checkpoints/step-000050/training/   optimizer.safetensors, state.json, and NAME.safetensors of what else is kept

A folder appears under its name only when it is whole. Sampling is seeded by prompt and step, and dropout is off, so
the step, the position in the data and the optimizer's moments are the whole state of a run, but for what its method
or its teacher keeps (`Stateful`).
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from kibitz import lora
from kibitz.config import ModelConfig
from kibitz.models import LanguageModel, load_tokenizer, load_weights
from kibitz.types import Stateful


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run folder, oldest first."""
    found = (folder / "checkpoints").glob("step-*")
    return sorted(path for path in found if (path / "training" / "state.json").is_file())


def save(
    folder: Path, step: int, student: LanguageModel, keeps: Mapping[str, Stateful], state: dict[str, Any], keep: int
) -> Path:
    """Write the checkpoint of a step, then delete all but the last `keep`. If that fails, the older ones stay whole.
    `keeps` are the optimizer and what else has a state, by the names of their files."""
    final = folder / "checkpoints" / f"step-{step:06d}"

    def write(temporary: Path) -> None:
        student.save(temporary)
        (temporary / "training").mkdir()
        for name, kept in keeps.items():
            save_file(kept.state(), temporary / "training" / f"{name}.safetensors")
        (temporary / "training" / "state.json").write_text(json.dumps({"step": step, **state}), encoding="utf-8")

    write_folder(final, write)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def load_state(checkpoint: Path, keeps: Mapping[str, Stateful]) -> dict[str, Any]:
    """The state of a checkpoint. All of `keeps` get back what they had."""
    for name, kept in keeps.items():
        path = checkpoint / "training" / f"{name}.safetensors"
        if not path.is_file():
            raise ValueError(
                f"{checkpoint} has no training/{path.name}, and this run keeps a {name}: it was made by another version or "
                "without it, and cannot be gone on with; start anew from it with student.model"
            )
        kept.load_state(load_file(path))
    return json.loads((checkpoint / "training" / "state.json").read_text(encoding="utf-8"))


def export(source: str, output: Path, merge: bool) -> None:
    """A folder for others: what is in a checkpoint or model folder, without what training needs; an adapter may be merged
    into its base. That is done in float32 and then rounded once, to the dtype of the base."""
    config = ModelConfig(model=source)
    tokenizer = load_tokenizer(config, "model")
    if merge and not lora.is_adapter(source):
        raise ValueError(f"{source} holds no adapter to merge: it is whole already; leave out --merge")
    if not Path(source).is_dir():
        raise ValueError(f"there is no folder at {source} to export")
    if output.exists():
        raise ValueError(f"{output} is there already: write --output ANOTHER")

    def write(temporary: Path) -> None:
        if merge:
            dtype = AutoConfig.from_pretrained(lora.base_of(source)).dtype or torch.float32
            load_weights(config, "model", torch.device("cpu")).to(dtype).save_pretrained(temporary)
        else:
            shutil.copytree(source, temporary, dirs_exist_ok=True, ignore=shutil.ignore_patterns("training"))
        tokenizer.save_pretrained(temporary)

    write_folder(output, write)


def write_folder(final: Path, write: Callable[[Path], None]) -> None:
    """`write(temporary)` fills a folder that then takes its final name in one step, or leaves nothing behind."""
    temporary = final.with_name(f".{final.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        for path in [*temporary.rglob("*"), temporary]:
            _sync(path)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        _sync(final.parent)
    except (OSError, SafetensorError) as error:
        raise OSError(f"could not save {final}: {error}; older checkpoints are untouched") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
