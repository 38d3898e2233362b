"""Rollouts in a JSONL file, token by token, for `method.rollouts` of a later run: one line each.

    {"prompt_key", "prompt_ids", "sample", "response_ids", "logp", "finished"}

and, where they say something, `writers` (numbers of `Writer`), `shortened` and `learn` (the weight of each token in the
loss). A run with `rollout.store` writes it as `stored.jsonl`; `save_rollouts` writes whatever a source gave.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kibitz.files import write_atomically
from kibitz.types import Prompt, Rollout, Writer


def as_row(rollout: Rollout) -> dict[str, Any]:
    row: dict[str, Any] = {
        "prompt_key": rollout.prompt.key,
        "prompt_ids": list(rollout.prompt.ids),
        "sample": rollout.sample,
        "response_ids": rollout.response_ids,
        "logp": rollout.logp_T.tolist(),
        "finished": rollout.finished,
    }
    if rollout.writer_T is not None:
        row["writers"] = rollout.writer_T.tolist()
    if rollout.learn_T is not None and not bool((rollout.learn_T == 1).all()):
        row["learn"] = rollout.learn_T.tolist()
    return row | ({"shortened": True} if rollout.shortened else {})


_OPTIONAL = {"shortened": bool, "writers": list, "learn": list, "num_seeded": int}
_NEEDED = {"prompt_key": str, "prompt_ids": list, "response_ids": list, "logp": list, "finished": bool}


def save_rollouts(path: Path | str, rollouts: Iterable[Rollout]) -> None:
    write_atomically(Path(path), "".join(json.dumps(as_row(rollout)) + "\n" for rollout in rollouts))


def load_rollouts(
    path: Path | str, prompts: Sequence[Prompt], vocab_size: int, num_samples: int, max_tokens: int
) -> dict[str, list[Rollout]]:
    """The rollouts by their prompts' keys, in the order of the file. Whoever wrote a token, here it is the data's: nobody
    samples it again, and its reward says nothing of the student of today. (The environment's stay the environment's.)

    ValueError unless every line fits a prompt of the data and the tokenizer, and every prompt has `num_samples`."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"method.rollouts: there is no file {file}")
    by_key = {prompt.key: prompt for prompt in prompts}
    found: dict[str, list[Rollout]] = {key: [] for key in by_key}
    for number, line in enumerate(_lines(file), 1):
        if line.strip():
            place = f"method.rollouts: {file}, line {number}"
            rollout = _read(place, line, by_key, vocab_size)
            if rollout.num_tokens > max_tokens:
                raise ValueError(
                    f"{place} has {rollout.num_tokens} tokens: write rollout.max_tokens={rollout.num_tokens} or more"
                )
            found[rollout.prompt.key].append(rollout)
    for key, rollouts in found.items():
        if len(rollouts) < num_samples:
            raise ValueError(
                f"method.rollouts: {file} has {len(rollouts)} rollouts of the prompt {by_key[key].text[:80]!r}, and a step "
                f"takes {num_samples}: lower rollout.samples_per_prompt, or leave prompts without rollouts out of data"
            )
    return found


def prompts_of(path: Path | str) -> list[Prompt]:
    """The prompts that a file of rollouts was written for, as token ids without text."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"there is no file {file}")
    found: dict[str, Prompt] = {}
    for number, line in enumerate(_lines(file), 1):
        if line.strip():
            place = f"{file}, line {number}"
            row = _parsed(place, line)
            _check_fields(place, row)
            key = row["prompt_key"]
            found.setdefault(key, Prompt(ids=tuple(row["prompt_ids"]), text="", key=key))
    if not found:
        raise ValueError(f"{file} holds no rollouts: a run with rollout.store=true writes such a file")
    return list(found.values())


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from None


def _parsed(place: str, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON: {error}") from None


def _read(place: str, line: str, prompts: Mapping[str, Prompt], vocab_size: int) -> Rollout:
    row = _parsed(place, line)
    _check_fields(place, row)
    prompt = prompts.get(row["prompt_key"])
    if prompt is None:
        raise ValueError(
            f"{place}: no prompt of data has the key {row['prompt_key']!r}: use the data that it was written for"
        )
    if tuple(row["prompt_ids"]) != prompt.ids:
        raise ValueError(
            f"{place} was written for other prompt tokens: use the tokenizer, the chat template and data.template of "
            "the run that wrote it"
        )
    wrong = [i for i in row["response_ids"] if not isinstance(i, int) or not 0 <= i < vocab_size]
    if wrong:
        raise ValueError(
            f"{place}: the tokenizer has {vocab_size} tokens and no token {wrong[0]}: was it written with another one?"
        )
    count = len(row["response_ids"])
    writer_T = torch.tensor(row.get("writers") or [Writer.DATASET] * count, dtype=torch.uint8)
    writer_T[writer_T != Writer.ENVIRONMENT] = Writer.DATASET
    learn_T = torch.tensor(row["learn"], dtype=torch.float32) if "learn" in row else _learnt_before(row)
    logp_T, sample = torch.tensor(row["logp"], dtype=torch.float32), row.get("sample", 0)
    shortened = row.get("shortened", False)
    return Rollout(prompt, row["response_ids"], logp_T, row["finished"], sample, writer_T, shortened, learn_T)


def _learnt_before(row: Mapping[str, Any]) -> torch.Tensor | None:
    """The weights of a line that says `num_seeded` and `learn_seed` in place of `learn`, as kibitz wrote it until 0.1."""
    num_seeded = row.get("num_seeded", 0)
    if num_seeded == 0 or row.get("learn_seed") is True:
        return None
    return (torch.arange(len(row["response_ids"])) >= num_seeded).float()


def _check_fields(place: str, row: Any) -> None:
    """Raise ValueError unless the line is complete, so that later code can rely on its fields."""
    if not isinstance(row, dict) or not row.keys() >= _NEEDED.keys():
        missing = ", ".join(_NEEDED) if not isinstance(row, dict) else ", ".join(k for k in _NEEDED if k not in row)
        raise ValueError(f"{place} is no rollout, it lacks {missing}: a run with rollout.store=true writes such a file")
    for name, kind in (_NEEDED | _OPTIONAL).items():
        if name in row and not isinstance(row[name], kind):
            raise ValueError(f"{place}: {name} must be a {kind.__name__}, and is {row[name]!r:.80}")
    count = len(row["response_ids"])
    if count == 0:
        raise ValueError(f"{place} has no tokens: leave it out")
    for name in ("logp", "writers", "learn"):
        if len(row.get(name, row["logp"])) != count:
            raise ValueError(
                f"{place} has {count} response_ids and {len(row[name])} {name}: there must be one for each"
            )
    if not all(map(_is_number, row["logp"])):
        raise ValueError(f"{place}: logp must hold finite numbers, the natural logarithms of probabilities")
    if not all(_is_number(weight) and weight >= 0 for weight in row.get("learn", [])):
        raise ValueError(f"{place}: learn must hold the weight of each token in the loss, a number of 0 or more")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
