"""Prompts from a file, a dataset or a toy world; rendered, tokenized and checked before any weights load."""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from kibitz import graders, worlds
from kibitz.config import Columns, DataConfig
from kibitz.data.columns import Conversation, conversation_of, text_of
from kibitz.data.once import remembered
from kibitz.data.rows import read_rows
from kibitz.data.templates import (
    check_template,
    encode_plain_prompts,
    encode_prompt,
    encode_response,
    encode_text,
    said_by,
    turn_end,
)
from kibitz.graders import Grader
from kibitz.types import Prompt, Rollout

__all__ = [
    "PromptStream", "apart", "check_template", "encode_prompt", "encode_response", "encode_text", "joined", "load_grader",
    "load_prompts", "turn_end",
]  # fmt: skip

TOGETHER = 1024
"""Rows whose prompts are rendered and tokenized by one call."""


def load_prompts(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int = 0,
    demonstrations: bool = False,
    gaps: bool = False,
    room: int | None = None,
) -> list[Prompt]:
    """All prompts of a `data` section, as the student will read them. `demonstrations`: rows need a response; all of them,
    unless there may be `gaps`. `room` is the number of tokens that the models have for a prompt and its response."""
    named = (type(tokenizer), tokenizer.name_or_path, tokenizer.chat_template)
    asked = (config, named, seed, demonstrations, gaps, room)
    return remembered(asked, partial(_read_prompts, config, tokenizer, seed, demonstrations, gaps, room))


def _read_prompts(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    demonstrations: bool,
    gaps: bool,
    room: int | None,
) -> list[Prompt]:
    rows = list(read_rows(config, seed, demonstrations))
    prompts = []
    for first in range(0, len(rows), TOGETHER):
        some = rows[first : first + TOGETHER]
        talks = [conversation_of(place, row, config, tokenizer) for place, row in some]
        encoded = encode_plain_prompts(
            tokenizer, [[] if talk.tools else talk.messages for talk in talks], config.template
        )
        for (place, row), talk, ids in zip(some, talks, encoded, strict=True):
            prompts.append(_prompt(place, row, config, tokenizer, (demonstrations, gaps), talk, ids))
    if not prompts:
        raise ValueError(f"{config.source} holds no prompts")
    if config.too_long == "drop":
        prompts = [prompt for prompt in prompts if len(prompt.ids) <= config.max_prompt_tokens]
    if room is not None and demonstrations:
        prompts = [prompt for prompt in prompts if _fits(prompt, config, tokenizer, room)]
    if not prompts:
        raise ValueError(f"every prompt of {config.source} is longer than {config.max_prompt_tokens} tokens: "
                         "raise data.max_prompt_tokens")  # fmt: skip
    return prompts


def _fits(prompt: Prompt, config: DataConfig, tokenizer: PreTrainedTokenizerBase, room: int) -> bool:
    """Whether a prompt and its demonstration have room; ValueError if they do not and `data.too_long` says so."""
    if prompt.response is None:
        return True
    length = len(prompt.ids) + len(encode_response(tokenizer, prompt.response))
    if length > room and config.too_long == "error":
        raise ValueError(
            f"the row of the prompt {prompt.text[:80]!r}: prompt and response have {length} tokens, and a model has {room} "
            "positions: shorten the response, or leave such rows out by data.too_long=drop"
        )
    return length <= room


def load_grader(config: DataConfig, prompts: Sequence[Prompt], need_all: bool = False) -> Grader | None:
    """Return the grader that `data.grader` names; a world brings its own. ValueError for a row that it cannot read, and for
    one without anything to grade against where all need a reward (`need_all`), or where none has it."""
    if config.world is not None:
        world = worlds.get(config.world)
        return graders.pick(config.grader, prompts, lambda prompt, text: world.grade(dict(prompt.columns), text))
    name = config.columns.answer
    if name != Columns().answer and all(prompt.answer is None for prompt in prompts):
        has = ", ".join(map(repr, prompts[0].columns))
        raise ValueError(
            f"data.columns.answer: no row of the data holds anything under {name!r}; the first one has {has}"
        )
    own = None if config.reasoning_gym is None else graders.verify
    grader = graders.pick(config.grader, prompts, own)
    if grader is not None:
        graders.check(grader, prompts, need_all or not any(graders.is_graded(grader, prompt) for prompt in prompts))
    return grader


def _prompt(
    place: str,
    row: dict[str, Any],
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    wanted: tuple[bool, bool],
    talk: Conversation,
    ids: list[int] | None,
) -> Prompt:
    """One prompt; `ids` are its tokens where they are known already. `wanted`: a response, of all but gaps."""
    told, gaps = wanted
    if told and not gaps and talk.turn is None:
        raise ValueError(
            f"{place} has no response: the method, or teacher.context, needs a column {config.columns.response!r}, or "
            "messages that end with the assistant's; or, for sft, write method.source=teacher, or "
            "method.fill=teacher for such rows"
        )
    try:
        if ids is None:
            ids = encode_prompt(tokenizer, talk.messages, config.template, talk.tools)
        response = None if talk.turn is None else _response(tokenizer, talk, config, told)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    if not ids:
        raise ValueError(f"{place} is empty: the tokenizer makes no token of its prompt")
    if len(ids) > config.max_prompt_tokens and config.too_long == "error":
        raise ValueError(
            f"{place}: the prompt has {len(ids)} tokens, the limit is {config.max_prompt_tokens}: "
            "shorten it, raise data.max_prompt_tokens, or leave such prompts out by data.too_long=drop"
        )
    columns, identity = config.columns, [talk.messages, talk.tools] if talk.tools else talk.messages
    written = json.dumps(identity, ensure_ascii=False, sort_keys=True)
    return Prompt(
        ids=tuple(ids),
        text=talk.messages[-1]["content"],
        key=hashlib.blake2b(written.encode(), digest_size=8).hexdigest(),
        task=text_of(place, row, columns.task) or "default",
        answer=text_of(place, row, columns.answer),
        response=response,
        columns=row,
        messages=tuple(talk.messages),
        route=text_of(place, row, columns.route),
        tools=talk.tools,
    )


def _response(tokenizer: Any, talk: Conversation, config: DataConfig, told: bool) -> str | None:
    """The demonstration. What only a template can write is not written where nobody reads it."""
    assert talk.turn is not None
    if not told and not talk.turn.keys() <= {"role", "content"}:
        return None
    return said_by(tokenizer, talk.messages, talk.turn, config.template, talk.tools)


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
