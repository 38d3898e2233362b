"""Prompts from a file, a dataset or a toy world; rendered, tokenized and checked before any weights load."""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from kibitz import graders, worlds
from kibitz.config import DataConfig
from kibitz.graders import Grader
from kibitz.types import Prompt, Rollout

WORLD_ROWS = 20_000


def load_prompts(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int = 0,
    demonstrations: bool = False,
    gaps: bool = False,
) -> list[Prompt]:
    """All prompts of a `data` section, as the student will read them. `demonstrations`: rows need a response; all of them,
    unless there may be `gaps`."""
    rows = _rows(config, seed, demonstrations)
    prompts = [_prompt(number, row, config, tokenizer, demonstrations and not gaps) for number, row in rows]
    if not prompts:
        raise ValueError(f"{config.prompts or config.world} holds no prompts")
    if config.too_long == "drop":
        prompts = [prompt for prompt in prompts if len(prompt.ids) <= config.max_prompt_tokens]
    if not prompts:
        raise ValueError(f"every prompt of {config.prompts or config.world} is longer than {config.max_prompt_tokens} tokens: "
                         "raise data.max_prompt_tokens")  # fmt: skip
    return prompts


def load_grader(config: DataConfig, prompts: Sequence[Prompt], need_all: bool = False) -> Grader | None:
    """Return the grader that `data.grader` names; a world brings its own. ValueError for a row that it cannot read, and for
    one without anything to grade against where all need a reward (`need_all`), or where none has it."""
    if config.world is not None:
        world = worlds.get(config.world)
        return graders.pick(config.grader, prompts, lambda prompt, text: world.grade(dict(prompt.columns), text))
    grader = graders.pick(config.grader, prompts)
    if grader is not None:
        graders.check(grader, prompts, need_all or not any(graders.is_graded(grader, prompt) for prompt in prompts))
    return grader


# ------------------------------------------------------------------ rows


def _rows(config: DataConfig, seed: int, demonstrations: bool) -> Iterable[tuple[str, dict[str, Any]]]:
    """Rows with the name that an error calls each by."""
    if config.world is not None:
        world, count = worlds.get(config.world), config.limit or WORLD_ROWS
        make = world.demonstrations if demonstrations else world.rows
        try:
            rows = make(config.split, count, seed, **config.options)
        except TypeError as error:
            raise ValueError(f"data.options: the world {config.world} does not take these: {error}") from None
        return [(f"{config.world} row {i + 1}", row) for i, row in enumerate(rows)]
    assert config.prompts is not None
    path = Path(config.prompts)
    if path.suffix in (".jsonl", ".json", ".ndjson"):
        rows = _read_jsonl(path)
        return [rows[i] for i in _picked(len(rows), config)]
    return _read_dataset(config, path)


def _picked(count: int, config: DataConfig) -> Sequence[int]:
    """The places of the rows that `limit` leaves, in the order of the file."""
    limit = min(count, config.limit or count)
    if config.pick == "first" or limit == count:
        return range(limit)
    return sorted(random.Random(f"rows|{count}").sample(range(count), limit))


def _read_jsonl(path: Path) -> list[tuple[str, dict[str, Any]]]:
    if not path.is_file():
        raise ValueError(f"data.prompts: there is no file {path}")
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: text may hold U+2028
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f'{path}, line {number} is not an object such as {{"prompt": ..., "answer": ...}}')
        rows.append((f"{path}, line {number}", row))
    return rows


def _read_dataset(config: DataConfig, path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Parquet files and hub datasets, by the library that knows them."""
    import datasets

    try:
        if path.suffix == ".parquet":
            if not path.is_file():
                raise FileNotFoundError("there is no such file")
            table = datasets.load_dataset("parquet", data_files=str(path), split="train")
        else:
            table = datasets.load_dataset(config.prompts or "", split=config.split)
    except Exception as error:  # the library raises a dozen kinds
        raise ValueError(f"data.prompts: cannot read {config.prompts}: {' '.join(str(error).split())[:300]}") from error
    places = _picked(len(table), config)
    rows = table.select(places)  # before they are read: a data set can be larger than memory
    return [(f"{config.prompts} row {i + 1}", dict(row)) for i, row in zip(places, rows, strict=True)]


# ------------------------------------------------------------------ from a row to a prompt


def _prompt(
    place: str, row: dict[str, Any], config: DataConfig, tokenizer: PreTrainedTokenizerBase, demonstrations: bool
) -> Prompt:
    messages, response = _messages(place, row, config)
    if demonstrations and response is None:
        raise ValueError(
            f"{place} has no response: the method, or teacher.context, needs a column {config.columns.response!r}, or "
            "messages that end with the assistant's; or, for sft, write method.source=teacher, or "
            "method.fill=teacher for such rows"
        )
    try:
        ids = encode_prompt(tokenizer, messages, config.template)
    except jinja2.TemplateError as error:
        raise ValueError(f"{place}: the chat template cannot render it: {error}") from error
    if not ids:
        raise ValueError(f"{place} is empty: the tokenizer makes no token of its prompt")
    if len(ids) > config.max_prompt_tokens and config.too_long == "error":
        raise ValueError(
            f"{place}: the prompt has {len(ids)} tokens, the limit is {config.max_prompt_tokens}: "
            "shorten it, raise data.max_prompt_tokens, or leave such prompts out by data.too_long=drop"
        )
    answer = row.get(config.columns.answer)
    identity = json.dumps(messages, ensure_ascii=False, sort_keys=True)
    return Prompt(
        ids=tuple(ids),
        text=messages[-1]["content"],
        key=hashlib.blake2b(identity.encode(), digest_size=8).hexdigest(),
        task=str(row.get(config.columns.task, "default")),
        answer=None if answer is None else str(answer),
        response=response,
        columns=row,
        messages=tuple(messages),
        route=None if (route := row.get(config.columns.route)) is None else str(route),
    )


def _messages(place: str, row: dict[str, Any], config: DataConfig) -> tuple[list[dict[str, str]], str | None]:
    """The conversation up to where the student speaks, and the demonstrated response if there is one."""
    response = row.get(config.columns.response)
    if "messages" in row or "conversations" in row:
        messages = row["messages"] if "messages" in row else _as_messages(row["conversations"])
        if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
            raise ValueError(f"{place}: messages must be a list of {{role, content}}, both of them text")
        if messages[-1]["role"] == "assistant":
            messages, response = messages[:-1], messages[-1]["content"]
        if not messages:
            raise ValueError(f"{place}: messages hold nothing before the assistant's")
    else:
        text = row.get(config.columns.prompt)
        if text is None:
            raise ValueError(
                f"{place} has no column {config.columns.prompt!r}; it has {', '.join(map(repr, row))}: "
                f"write data.columns.prompt=NAME"
            )
        messages = [{"role": "user", "content": str(text)}]
    if not str(messages[-1]["content"]).strip():
        raise ValueError(f"{place} has an empty prompt")
    if config.system is not None:
        messages = [{"role": "system", "content": config.system}, *messages]
    return messages, None if response is None else str(response)


SPEAKERS = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}


def _as_messages(conversation: Any) -> Any:
    """ShareGPT's way of writing them, `{from, value}`, as OpenThoughts has; anything else as it is."""
    if not isinstance(conversation, list) or not all(isinstance(turn, dict) for turn in conversation):
        return conversation
    return [
        {"role": SPEAKERS.get(str(turn["from"]), turn["from"]), "content": turn.get("value")}
        if "from" in turn
        else turn
        for turn in conversation
    ]


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def encode_prompt(tokenizer: Any, messages: list[dict[str, str]], template: dict[str, Any]) -> list[int]:
    """Render messages by the chat template, which writes its own BOS; a tokenizer without a template reads the plain text."""
    if tokenizer.chat_template is None:
        return tokenizer("\n\n".join(m["content"] for m in messages))["input_ids"]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **template)


def encode_response(tokenizer: Any, text: str) -> list[int]:
    """A demonstration as the student should write it, with the EOS that it has to learn."""
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def apart(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts, with keys of their own for those that stand here more than once: a key decides every token, and a second
    copy would bring the same responses again."""
    seen: Counter[str] = Counter()
    found = []
    for prompt in prompts:
        found.append(replace(prompt, key=f"{prompt.key}+{seen[prompt.key]}") if seen[prompt.key] else prompt)
        seen[prompt.key] += 1
    return found


def joined(prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Rollouts of `apart(prompts)`, equally many of each, with the prompts as they were."""
    num_samples = len(rollouts) // max(1, len(prompts))
    asked = (prompt for prompt in prompts for _ in range(num_samples))
    return [replace(rollout, prompt=prompt) for rollout, prompt in zip(rollouts, asked, strict=True)]


class PromptStream:
    """Prompts for one step after another, epoch by epoch, each epoch in its own order. `position` is its whole state."""

    def __init__(self, prompts: Sequence[Prompt], seed: int, shuffle: bool = True, position: int = 0):
        self.prompts, self.seed, self.shuffle, self.position = prompts, seed, shuffle, position

    def go_to(self, position: int) -> None:
        """Go on behind the first `position` prompts of the run, as a checkpoint says."""
        self.position = position

    def take(self, num: int) -> list[Prompt]:
        taken = []
        while len(taken) < num:
            epoch, start = divmod(self.position, len(self.prompts))
            part = self._order(epoch)[start : start + num - len(taken)]
            taken += [self.prompts[i] for i in part]
            self.position += len(part)
        return taken

    def _order(self, epoch: int) -> list[int]:
        order = list(range(len(self.prompts)))
        if self.shuffle:
            random.Random(f"{self.seed}|{epoch}").shuffle(order)
        return order
