"""Checkpoints: a plain Hugging Face folder, and beside the weights what training needs to go on.

    checkpoints/step-000050/            loads with AutoModelForCausalLM.from_pretrained; of LoRA, with peft
    checkpoints/step-000050/training/   state.json, optimizer.safetensors, NAME.safetensors of what else is kept,
                                        and manifest.json; of several processes, whose optimizer is sharded, optimizer/
                                        with a file of each (`kibitz.parallel.sharded_files`)

A folder appears under its name only when it is whole, and gives it up before the first of its files goes. The manifest,
written last, holds the SHA-256 of every other file. Sampling is seeded by prompt and step, and dropout is off, so the
step, the position in the data and the optimizer's moments are the whole state of a run, but for what its method or its
teacher keeps (`Stateful`).
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from kibitz.config import ModelConfig
from kibitz.files import checkpoints, step_of
from kibitz.models import LanguageModel, lora
from kibitz.models.load import load_tokenizer, load_weights
from kibitz.models.progress import no_progress_bars
from kibitz.optim import Optimizer
from kibitz.parallel import sharded_files
from kibitz.parallel.ranks import ALONE, Ranks
from kibitz.types import Stateful

MANIFEST = Path("training") / "manifest.json"
PIECE = 2**24


def newest_sound(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is as it was written, and what is wrong with those after it."""
    wrong = []
    for path in reversed(checkpoints(folder)):
        problem = damage(path)
        if problem is None:
            return path, wrong
        wrong.append(f"the checkpoint {path.name} is damaged: {problem}")
    return None, wrong


def damage(checkpoint: Path) -> str | None:
    """Return what is wrong with the files of a checkpoint; None if every one is as it was written."""
    try:
        wanted = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["sha256"]
        if not isinstance(wanted, dict) or not wanted:
            return f"its {MANIFEST.name} names no file"
        missing = [name for name in wanted if not (checkpoint / name).is_file()]
        if missing:
            return f"{missing[0]} is missing"
        found = _sums(checkpoint, wanted)
        changed = [name for name in wanted if found[name] != wanted[name]]
        if changed:
            return f"{changed[0]} is not as it was written"
        step = json.loads((checkpoint / "training" / "state.json").read_text(encoding="utf-8"))["step"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MANIFEST.name} cannot be read ({type(error).__name__})"
    return None if step == step_of(checkpoint) else f"it is that of step {step} under another name"


def begin_to_save(
    folder: Path,
    step: int,
    student: LanguageModel,
    stateful: Mapping[str, dict[str, Tensor]],
    state: dict[str, Any],
    keep: int,
    ranks: Ranks = ALONE,
) -> Callable[[], None]:
    """Write the student of a step and return what is left to do: to write `stateful`, most of the bytes, which must not change
    until then, to give the folder its name, and to delete all but the last `keep`. Of one process another thread may do it. If
    anything fails, the older ones stay whole.

    `stateful` are the states of the optimizer and of what else has one, by the names of their files. Of several processes the
    first writes, and of a state that is sharded each its own part."""
    final = folder / "checkpoints" / f"step-{step:06d}"
    in_parts = {name: kept for name, kept in stateful.items() if sharded_files.are_in(kept.values())}
    whole = {name: kept for name, kept in stateful.items() if name not in in_parts}
    ranks.first(lambda: _clean(final.parent))
    with ExitStack() as stack:
        temporary = stack.enter_context(_in_the_making(final, ranks))
        ranks.first(lambda: _write_student(temporary, step, student, state))
        rest = stack.pop_all()

    def finish() -> None:
        with rest:
            ranks.first(lambda: _write_states(temporary, whole))
            for name, kept in in_parts.items():
                sharded_files.write(kept, temporary / "training" / name)
            ranks.first(lambda: _write_manifest(temporary))
        ranks.first(lambda: [remove(old) for old in checkpoints(folder)[:-keep]])

    return finish


def _write_student(folder: Path, step: int, student: LanguageModel, state: dict[str, Any]) -> None:
    student.save(folder)
    (folder / "training").mkdir()
    (folder / "training" / "state.json").write_text(json.dumps({"step": step, **state}), encoding="utf-8")


def _write_states(folder: Path, stateful: Mapping[str, dict[str, Tensor]]) -> None:
    for name, kept in stateful.items():
        save_file(kept, folder / "training" / f"{name}.safetensors")


def _write_manifest(folder: Path) -> None:
    sums = _sums(folder, sorted(str(path.relative_to(folder)) for path in _files(folder)))
    (folder / MANIFEST).write_text(json.dumps({"sha256": sums}, indent=1), encoding="utf-8")


def _clean(folder: Path) -> None:
    for left_by_a_kill in folder.glob(".step-*"):
        shutil.rmtree(left_by_a_kill)


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint, which gives up its name first: killed on the way, it leaves none that is half there."""
    gone = checkpoint.with_name(f".{checkpoint.name}.deleted")
    shutil.rmtree(gone, ignore_errors=True)
    checkpoint.rename(gone)
    shutil.rmtree(gone)


def set_aside(folder: Path, last_step: int) -> None:
    """Take the name from checkpoints of later steps than a run goes on from: they are damaged, and not of it any more."""
    for path in checkpoints(folder):
        if step_of(path) > last_step:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def load_state(checkpoint: Path, stateful: Mapping[str, Stateful]) -> dict[str, Any]:
    """The state of a checkpoint. All of `stateful` get back what they had."""
    for name, kept in stateful.items():
        folder = checkpoint / "training" / name
        path = folder if folder.is_dir() else folder.with_name(f"{name}.safetensors")
        if not path.exists():
            raise ValueError(
                f"{checkpoint} has no training/{path.name}, and this run keeps a {name}: it was made by another version or "
                "without it, and cannot be gone on with; start anew from it with student.model"
            )
        if isinstance(kept, Optimizer) and (path.is_dir() or sharded_files.are_in(kept.parameters)):
            kept.load_state(sharded_files.read(path, kept.room))
        else:
            kept.load_state(load_file(path))
    return json.loads((checkpoint / "training" / "state.json").read_text(encoding="utf-8"))


def export(source: str, output: Path, merge: bool, card: str | None = None) -> None:
    """A folder for others: what is in a checkpoint or model folder, without what training needs; an adapter may be merged
    into its base. That is done in float32 and then rounded once, to the dtype of the base. `card` is its README.md."""
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
            weights = load_weights(config, "model", torch.device("cpu")).to(dtype)
            with no_progress_bars():
                weights.save_pretrained(temporary)
        else:
            shutil.copytree(source, temporary, dirs_exist_ok=True, ignore=shutil.ignore_patterns("training"))
        tokenizer.save_pretrained(temporary)
        if card is not None:
            (temporary / "README.md").write_text(card, encoding="utf-8")

    write_folder(output, write)


def write_folder(final: Path, write: Callable[[Path], None]) -> None:
    """`write(temporary)` fills a folder that then takes its final name in one step, or leaves nothing behind."""
    with _in_the_making(final) as temporary:
        write(temporary)


@contextmanager
def _in_the_making(final: Path, ranks: Ranks = ALONE) -> Iterator[Path]:
    """The folder to fill, which then takes its final name in one step, or leaves nothing behind."""
    temporary = final.with_name(f".{final.name}.partial")

    def begin() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def end() -> None:
        for path in [*temporary.rglob("*"), temporary]:
            _sync(path)
        if final.exists():
            remove(final)
        temporary.rename(final)
        _sync(final.parent)

    try:
        ranks.first(begin)
        yield temporary
        ranks.first(end)
    except (OSError, SafetensorError) as error:
        raise OSError(f"could not save {final}: {error}; older checkpoints are untouched") from error
    finally:
        if ranks.is_main:
            shutil.rmtree(temporary, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _sums(folder: Path, names: Collection[str]) -> dict[str, str]:
    """The SHA-256 of each file; several at a time, because hashing is slower than a disk."""
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(names, pool.map(lambda name: _sum(folder / name), names), strict=True))


def _sum(path: Path) -> str:
    """In pieces so large that a thread which hashes seldom asks the one that trains for the interpreter."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()
