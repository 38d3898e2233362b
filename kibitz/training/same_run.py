"""What must be the same when a run goes on, beside its recipe: the data, the models that it reads, and the date that a chat
template writes. A checkpoint holds a fingerprint of each; where one has changed, going on would be another run."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from kibitz import config
from kibitz.config import LocalTeacherConfig, Recipe, RecipeError, StoredTeacherConfig, StudentTeacherConfig
from kibitz.config.teachers import HostedTeacherConfig
from kibitz.data.templates import DATE, mentions
from kibitz.models import lora
from kibitz.models.load import load_tokenizer
from kibitz.teachers import Teacher
from kibitz.teachers.stored import hash_of_vocabulary
from kibitz.types import Prompt

Fingerprint = dict[str, str]
"""Hashes of what a run reads, by the words that an error calls it by."""

WHOLE = 32 * 2**20
"""Bytes of a file up to which all of it is hashed: 30 ms. Of a larger one, its header and a piece of each tensor."""
PIECE = 4096


def fingerprint(recipe: Recipe, prompts: Sequence[Prompt], teacher_tokenizers: Sequence[Any]) -> Fingerprint:
    """Hash the prompts as they are read, with all that their rows say, and the files of every model that a resumed run
    loads again. The student's own are among them where it is a base of adapters, a reference or a teacher."""
    found = {f"the prompts of {recipe.data.prompts or recipe.data.world}": _of_prompts(prompts)}
    found |= {f"the weights of {name}": _of_model(name) for name in _models(recipe)}
    for teacher, tokenizer in zip(recipe.teachers, teacher_tokenizers, strict=True):
        if isinstance(teacher, LocalTeacherConfig):
            read = f"{hash_of_vocabulary(tokenizer)} {tokenizer.chat_template}"
            found[f"the tokenizer or chat template of {teacher.model}"] = _hash(read)
        elif isinstance(teacher, StoredTeacherConfig):
            found[f"the scores at {teacher.stored}"] = _of_files([Path(teacher.stored) / "store.json"])
    if (path := recipe.method.needs().rollouts) is not None:
        found[f"the rollouts of {path}"] = _of_files([Path(path)])
    return found


def served(teacher: Teacher | None) -> Fingerprint:
    """What the servers of the teachers say that they serve."""
    known = () if teacher is None else teacher.served
    return {f"the model of {name}": model for name, model in known}


def check_same(output: Path, checkpoint: Path | None, now: Mapping[str, str]) -> None:
    """Raise RecipeError, which says what was replaced, if a run would go on from `checkpoint` with other things than it
    began with. What the checkpoint does not know, as those of older versions, is not compared."""
    if checkpoint is None:
        return
    then = json.loads((checkpoint / "training" / "state.json").read_text(encoding="utf-8")).get("fingerprint", {})
    replaced = [what for what, seen in now.items() if then.get(what, seen) != seen]
    if replaced:
        raise RecipeError(
            f"output: the run at {output} would go on with something else than it began with: replaced since are "
            f"{' and '.join(replaced)}. Put back what was there, or begin another run with what this one has learnt, by "
            f"student.model={checkpoint} output=ANOTHER"
        )


def _models(recipe: Recipe) -> list[str]:
    names = [one.model for one in recipe.teachers if isinstance(one, LocalTeacherConfig | HostedTeacherConfig)]
    names += [section.model for section in recipe.other_models().values()]
    own = any(isinstance(teacher, StudentTeacherConfig) for teacher in recipe.teachers)
    return list(dict.fromkeys([*names, *([recipe.student.model] if own or recipe.student.lora is not None else [])]))


def _of_prompts(prompts: Sequence[Prompt]) -> str:
    whole = hashlib.blake2b(digest_size=16)
    for prompt in prompts:
        said = [prompt.key, prompt.ids, prompt.answer, prompt.response, prompt.task, prompt.route, prompt.columns]
        whole.update(json.dumps(said, sort_keys=True, default=repr).encode() + b"\n")
    return whole.hexdigest()


def _of_model(name: str) -> str:
    """Of a folder, of an adapter with its base, or of what the hub's cache holds under a name."""
    folder = Path(name)
    if not folder.is_dir():
        found = cached_file(name, "config.json", _raise_exceptions_for_missing_entries=False)
        assert found is not None, "its tokenizer has been loaded, and with it its configuration"
        folder = Path(found).parent
    paths = [*folder.glob("*.safetensors"), folder / "config.json", folder / lora.CONFIG]
    own = _of_files(sorted(path for path in paths if path.is_file()))
    return f"{own} {_of_model(lora.base_of(folder))}" if lora.is_adapter(folder) else own


def _of_files(paths: Sequence[Path]) -> str:
    whole = hashlib.blake2b(digest_size=16)
    for path in paths:
        whole.update(f"{path.name} {path.stat().st_size}\n".encode())
        for piece in _pieces(path):
            whole.update(piece)
    return whole.hexdigest()


def _pieces(path: Path) -> Iterator[bytes]:
    """All of a small file. Of a large one of safetensors its header, and the beginning and the middle of each tensor; of
    another large one, 4 KiB of each of 4096 parts."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE:
            yield file.read()
            return
        starts = [size * part // 4096 for part in range(4096)]
        if path.suffix == ".safetensors":
            length = int.from_bytes(file.read(8), "little")
            header = file.read(min(length, size))
            yield header
            tensors = [entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"]
            starts = [8 + length + at for begin, end in sorted(tensors) for at in (begin, (begin + end) // 2)]
        for start in starts:
            file.seek(start)
            yield file.read(PIECE)


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


# ------------------------------------------------------------------ the date


def with_date(recipe: Recipe, tokenizer: Any, resume: bool) -> Recipe:
    """The recipe, with the day on which the run began as the date that its chat templates write, where one of them writes
    today's: a prompt of tomorrow would be another prompt. A run that goes on keeps its day."""
    own = [one for one in recipe.teachers if isinstance(one, LocalTeacherConfig) and _reads_by_its_own(one)]
    readers = [tokenizer, *(load_tokenizer(one, "teacher") for one in own)]
    if not any(mentions(reader, DATE) for reader in readers):
        return recipe
    day = recipe.data.template.get(DATE) or _day_of(Path(recipe.output) / "recipe.yaml", resume)
    return recipe if day is None else _dated(recipe, day)


def _reads_by_its_own(teacher: LocalTeacherConfig) -> bool:
    return teacher.tokenizer == "own" or teacher.context is not None


def _day_of(old: Path, resume: bool) -> str | None:
    """Of the run that goes on, None if it knows none; else today."""
    return config.load(old).data.template.get(DATE) if resume and old.is_file() else date.today().isoformat()


def _dated(recipe: Recipe, day: str) -> Recipe:
    def dated(section: Any) -> Any:
        return section.model_copy(update={"template": {DATE: day, **section.template}})

    def of_teacher(teacher: Any) -> Any:
        return teacher if teacher.context is None else teacher.model_copy(update={"context": dated(teacher.context)})

    changed: dict[str, Any] = {"data": dated(recipe.data)}
    if recipe.teachers:
        several = [of_teacher(teacher) for teacher in recipe.teachers]
        changed["teacher"] = several if isinstance(recipe.teacher, list) else several[0]
    return recipe.model_copy(update=changed)
