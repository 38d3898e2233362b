"""Signals on disk: what a teacher has scored once need not be computed again, in this run, its resumption, or another one.

    store.json          the teacher: hashes of weights, tokenizer and chat template, the teacher's settings
    head.safetensors    the output head, if whole distributions are held (as hidden states)
    index.jsonl         one line for each rollout: key, kind, file, first row, number of tokens
    NAME.safetensors    the numbers of one call, rollout after rollout

A signal is found by its content: the ids of prompt and response, and what was asked for. So it does not matter which run, step
or epoch wrote the rollout. A store belongs to one teacher: another one is refused, with the parts that differ.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kibitz.config import SignalKind
from kibitz.engines import Engine
from kibitz.files import write_atomically
from kibitz.losses.supports import rest_of
from kibitz.models import LanguageModel
from kibitz.models.head import Head
from kibitz.signals import Dense, Sampled, Signal, TopK, cat_signals
from kibitz.teachers import MakeEngine, Scorer, ScoreRequest, Teacher
from kibitz.types import Rollout

PARTS = ("weights", "tokenizer", "chat template")
KINDS: tuple[SignalKind, ...] = ("dense", "top_k", "sampled")
"""The signals that a model of this process gives of its own tokens, and that can be stored."""


# ------------------------------------------------------------------ who spoke


def identity(model: LanguageModel) -> dict[str, Any]:
    """Return what identifies a teacher: hashes of all its numbers, of its vocabulary and of its chat template."""
    weights = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.model.state_dict().items()):
        weights.update(name.encode())
        weights.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return {
        "weights": weights.hexdigest(),
        "tokenizer": hash_of_vocabulary(model.tokenizer),
        "chat template": _hash(model.tokenizer.chat_template),
        "num_parameters": model.num_parameters,
    }


def hash_of_vocabulary(tokenizer: Any) -> str:
    return _hash(sorted(tokenizer.get_vocab().items()))


def _hash(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


# ------------------------------------------------------------------ the folder


class Store:
    """A folder of signals. `who` is the teacher that may add to it; without one it is only read."""

    def __init__(self, folder: Path, who: Mapping[str, Any] | None, device: torch.device):
        self.folder, self.device = folder, device
        self.who = self._agreed(who)
        self.index: dict[str, dict[str, Any]] = {row["key"]: row for row in self._rows()}
        self.files: dict[str, Any] = {}
        self.head: Head | None = None

    def _agreed(self, who: Mapping[str, Any] | None) -> dict[str, Any]:
        path = self.folder / "store.json"
        if not path.is_file():
            if who is None:
                raise ValueError(
                    f"teacher.stored: there is no store of scores at {self.folder}: `kibitz score --out` makes one"
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(who, indent=1))
            return dict(who)
        held = json.loads(path.read_text(encoding="utf-8"))
        if who is not None:
            _refuse_another(self.folder, held, who)
        return held

    def _rows(self) -> list[dict[str, Any]]:
        """The index, without a last line that a kill cut short."""
        path, rows = self.folder / "index.jsonl", []
        for line in path.read_text(encoding="utf-8").split("\n") if path.is_file() else []:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return rows

    @property
    def kinds(self) -> tuple[SignalKind, ...]:
        held = {row["kind"] for row in self.index.values()}
        return tuple(kind for kind in KINDS if kind in held)

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.folder.iterdir() if path.is_file())

    def find(self, rollout: Rollout, request: ScoreRequest) -> Signal | None:
        row = self.index.get(key_of(rollout, request))
        if row is None:
            return None
        columns = self._columns(row)
        match request.kind:
            case "dense":
                return Dense(columns["hidden"], self.shared_head())
            case "top_k":
                logp_TK = columns["logp"]
                rest_T = columns.get("rest_logp", rest_of(logp_TK.float().logsumexp(-1)))  # older stores lack it
                return TopK(columns["ids"].long(), logp_TK, request.temperature, rest_logp_T=rest_T)
            case _:
                return Sampled(columns["logp"])

    def _columns(self, row: Mapping[str, Any]) -> dict[str, Tensor]:
        start, path = row["start"], self.folder / row["file"]
        try:
            if row["file"] not in self.files:
                self.files[row["file"]] = safe_open(path, framework="pt")
            file = self.files[row["file"]]
            columns = {name: file.get_slice(name)[start : start + row["tokens"]] for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"the store of scores is damaged, {path.name} cannot be read ({error}): delete {self.folder}"
            ) from None
        if any(len(column) != row["tokens"] for column in columns.values()):
            raise ValueError(f"the store of scores is damaged, {path.name} is too short: delete the folder")
        return {name: column.to(self.device) for name, column in columns.items()}

    def add(self, rollouts: Sequence[Rollout], signals: Sequence[Signal], request: ScoreRequest) -> None:
        """Numbers first, then the index: a kill between the two loses what it would have pointed to, and nothing else."""
        said = cat_signals([signal.to("cpu") for signal in signals])
        if isinstance(said, Dense):
            self._keep_head(said.head)
        tensors = {_on_disk(column): _small(tensor.detach()) for column, tensor in said.columns().items()}
        name, start, lines = f"{uuid.uuid4().hex}.safetensors", 0, []
        temporary = self.folder / f".{name}"
        save_file(tensors, temporary)
        temporary.rename(self.folder / name)
        for rollout in rollouts:
            row = {
                "key": key_of(rollout, request),
                "kind": request.kind,
                "file": name,
                "start": start,
                "tokens": rollout.num_tokens,
            }
            start += rollout.num_tokens
            lines.append(json.dumps(row))
            self.index[row["key"]] = row
        with (self.folder / "index.jsonl").open("a", encoding="utf-8") as file:
            file.write("\n" + "\n".join(lines))  # a line cut short by a kill ends here, too
            file.flush()
            os.fsync(file.fileno())

    def _keep_head(self, head: Any) -> None:
        path = self.folder / "head.safetensors"
        if path.is_file():
            return
        if not isinstance(head, Head):
            raise ValueError(
                "teacher.store: hidden states are kept with one model's output head, and this teacher has none"
            )
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in head.projection.state_dict().items()}
        shape = {"vocab_size": head.vocab_size, "scale": head.scale, "softcap": head.softcap}
        save_file(weights or {"none": torch.zeros(1)}, path, metadata={"head": json.dumps(shape)})

    def shared_head(self) -> Head:
        """One head for all signals, so that those of several rollouts can be joined."""
        if self.head is None:
            path = self.folder / "head.safetensors"
            weights = load_file(path)
            with safe_open(path, framework="pt") as file:
                shape = json.loads(file.metadata()["head"])
            projection: nn.Module = nn.Identity()
            if "weight" in weights:
                rows, width = weights["weight"].shape
                projection = nn.Linear(width, rows, bias="bias" in weights, dtype=weights["weight"].dtype)
                projection.load_state_dict(weights)
            self.head = Head(projection, **shape).to(self.device).requires_grad_(False)
        return self.head


def key_of(rollout: Rollout, request: ScoreRequest) -> str:
    asked = (
        [request.kind]
        if request.kind == "dense"
        else [request.kind, request.temperature, request.top_k if request.kind == "top_k" else 0]
    )
    return _hash([asked, list(rollout.prompt.ids), rollout.response_ids])


def _on_disk(column: str) -> str:
    """A column's name without its shape: `hidden`, `ids`, `logp`."""
    return column.rpartition("_")[0]


def _small(column: Tensor) -> Tensor:
    """Token ids take four bytes."""
    return column.int() if column.dtype == torch.long else column


def _refuse_another(folder: Path, held: Mapping[str, Any], who: Mapping[str, Any]) -> None:
    changed = [part for part in PARTS if held.get(part) != who[part]]
    ours, theirs = who["settings"], held.get("settings", {})
    changed += [f"teacher.{key}" for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)]
    if changed:
        raise ValueError(
            f"the store of scores at {folder} was made by a teacher with another {', another '.join(changed)}: write "
            "teacher.store=ANOTHER, or delete the folder"
        )


# ------------------------------------------------------------------ as teachers


@dataclass
class Tally:
    """Counts one step: how many rollouts were looked up, and which the teacher had to read."""

    looked_up: int = 0
    read: set[str] = field(default_factory=set)

    def close(self, store: Store) -> dict[str, float]:
        share = 1.0 - len(self.read) / max(1, self.looked_up)
        self.looked_up, self.read = 0, set()
        return {"stored_share": share, "store_bytes": float(store.num_bytes)}


@dataclass(frozen=True)
class StoredScorer:
    """Reads stored signals from disk; `inner` scores the others, all together, and they are stored from then on."""

    store: Store
    request: ScoreRequest
    inner: Scorer | None
    tally: Tally

    def __post_init__(self) -> None:
        if self.request.kind not in KINDS:
            raise ValueError(
                f"teacher.store: signals of the kind {self.request.kind} cannot be stored: leave out store"
            )

    def score(self, rollouts: Sequence[Rollout]) -> list[Signal]:
        missing = {key_of(r, self.request): r for r in rollouts if self.store.find(r, self.request) is None}
        self.tally.looked_up += len(rollouts)
        self.tally.read |= {_content(rollout) for rollout in missing.values()}
        if missing:
            fresh = list(missing.values())
            self.store.add(fresh, self._ask(fresh), self.request)
        found = [self.store.find(rollout, self.request) for rollout in rollouts]
        return [signal for signal in found if signal is not None]

    def _ask(self, rollouts: list[Rollout]) -> list[Signal]:
        if self.inner is not None:
            return self.inner.score(rollouts)
        first = rollouts[0].prompt
        raise ValueError(
            f"the store of scores at {self.store.folder} lacks {len(rollouts)} rollouts, the first of the prompt "
            f"{first.text[:80] or first.key!r}: learn from the rollouts that it was made of (method.rollouts), or name a model"
        )


def _content(rollout: Rollout) -> str:
    return _hash([list(rollout.prompt.ids), rollout.response_ids])


def with_store(teacher: Teacher, folder: Path, settings: Mapping[str, Any], device: torch.device) -> Teacher:
    """`teacher`, which never scores a text twice. `settings` are those of its section that change its scores. Its examiner
    stays as it is: what is measured once need not fill the disk."""
    if len(teacher.models) != 1 or teacher.stateful:
        raise ValueError(
            "teacher.store: this teacher changes or has no name, so its scores cannot be stored: leave out store"
        )
    store, tally = Store(folder, {**identity(teacher.models[0]), "settings": dict(settings)}, device), Tally()
    return replace(
        teacher,
        scorer=lambda request: StoredScorer(store, request, teacher.scorer(request), tally),
        metrics=lambda: {**teacher.metrics(), **tally.close(store)},
    )


def check(folder: Path, tokenizer: Any) -> None:
    """Raise ValueError unless the folder holds scores of the student's tokens."""
    who = Store(folder, None, torch.device("cpu")).who
    if who["tokenizer"] != hash_of_vocabulary(tokenizer):
        raise ValueError(f"teacher.stored: the scores at {folder} are of another tokenizer than the student's")


def stored_teacher(folder: Path, device: torch.device) -> Teacher:
    """A teacher that is nothing but its store: it has read certain rollouts, and cannot score others."""
    store, tally = Store(folder, None, device), Tally()

    def writer(make: MakeEngine) -> Engine:
        raise ValueError("stored scores cannot write responses: name a model as the teacher")

    return Teacher(
        kinds=store.kinds,
        scorer=lambda request: StoredScorer(store, request, None, tally),
        examiner=None,
        writer=writer,
        num_parameters=store.who["num_parameters"],
        metrics=lambda: tally.close(store),
    )
