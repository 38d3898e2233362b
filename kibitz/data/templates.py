"""Chat templates: what a model reads before it speaks, and how its turn ends."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from kibitz.graders.worker import Worker

Message = dict[str, Any]
"""`role` and `content`, both text, and what else the template writes, such as `reasoning_content`."""

DATE = "strftime_now"
"""The template's function that gives today's date, and the argument of `data.template` that says which day that is."""
TALK: list[Message] = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "Kibitz"}]
MOST_SECONDS, MOST_CHARACTERS = 5.0, 1_000_000
"""What a template may take for a conversation of two words: real ones take a millisecond and write a page."""


def check_template(tokenizer: Any) -> None:
    """Raise ValueError for a chat template that loops, or writes without end. It is a program that came with a model: it runs
    in a process of its own first, which can be stopped."""
    if tokenizer.chat_template is not None and os.name == "posix":
        _check_template(str(_template_of(tokenizer)), json.dumps(tokenizer.special_tokens_map, default=str))


@lru_cache(maxsize=64)
def _check_template(text: str, special: str) -> None:
    worker = Worker("template", MOST_SECONDS)
    conversations = [(TALK[:1], True), (TALK, False)]
    try:
        length = worker.ask(ask="template", text=text, conversations=conversations, special=json.loads(special))
    finally:
        worker.close()
    if length is None or length > MOST_CHARACTERS:
        raise ValueError(
            "the chat template does not come to an end on a conversation of two words, or fills the memory: take a template "
            "of another model of the family"
        )


def _template_of(tokenizer: Any) -> Any:
    """The template that is used where several have names."""
    try:
        return tokenizer.get_chat_template()
    except (ValueError, TypeError):
        return tokenizer.chat_template


def encode_prompt(
    tokenizer: Any,
    messages: Sequence[Message],
    template: Mapping[str, Any],
    tools: Sequence[Mapping[str, Any]] = (),
) -> list[int]:
    """Render messages by the chat template, which writes its own BOS; a tokenizer without a template reads the plain text,
    with what it puts before a text and without what it puts behind one, such as EOS."""
    if tools and not mentions(tokenizer, "tools"):
        raise ValueError("there are tools, and the chat template does not write any: leave out the column `tools`")
    if tokenizer.chat_template is None:
        return _plain(tokenizer, "\n\n".join(m["content"] for m in messages))
    arguments = {"add_generation_prompt": True, **_arguments(tokenizer, template, tools)}
    if _control_pattern(tokenizer).search("\n".join(m["content"] for m in messages)):
        return _spelt(tokenizer, messages, arguments)
    return _rendered(tokenizer, messages, arguments, return_dict=False)


def encode_plain_prompts(
    tokenizer: Any, conversations: Sequence[Sequence[Message]], template: Mapping[str, Any]
) -> list[list[int] | None]:
    """`encode_prompt` of many conversations without tools, in a third of the time. None for those that are left to it: empty
    ones, those that spell control tokens, and all where there is no template, or where it refuses one."""
    ids: list[list[int] | None] = [None] * len(conversations)
    if tokenizer.chat_template is None:
        return ids
    controls = _control_pattern(tokenizer)
    texts = ["\n".join(m["content"] for m in messages) for messages in conversations]
    plain = [place for place, text in enumerate(texts) if conversations[place] and not controls.search(text)]
    try:
        arguments = {"add_generation_prompt": True, **_arguments(tokenizer, template, ())}
        found = _rendered(tokenizer, [list(conversations[place]) for place in plain], arguments, return_dict=False)
    except ValueError:
        return ids
    for place, one in zip(plain, found, strict=True):
        ids[place] = one
    return ids


def encode_text(tokenizer: Any, text: str, whose: str = "the text spells") -> list[int]:
    """The tokens of a text, and of nothing but text: where it spells a control token, such as the end of a turn, it is spelt
    by others. ValueError, which begins with `whose`, if the tokenizer knows no others."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    controls = {*tokenizer.all_special_ids} - ({tokenizer.unk_token_id} - {tokenizer.eos_token_id})
    if found := controls.intersection(ids):
        spelt = tokenizer.convert_ids_to_tokens(min(found))
        raise ValueError(f"{whose} {spelt!r}, which the student's tokenizer can only read as a control token")
    return ids


def _control_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Finds what a tokenizer reads as a control token."""
    named = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    spelt = sorted({*named, *tokenizer.all_special_tokens} - {""}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, spelt)) or r"(?!)")


def _spelt(tokenizer: Any, messages: Sequence[Message], arguments: Mapping[str, Any]) -> list[int]:
    """The tokens of messages whose content spells control tokens, which are text there, and control tokens only where the
    template writes them."""
    pattern, found = _control_pattern(tokenizer), []
    whole = "".join(m["content"] for m in messages)
    mark = next(sign for sign in map(chr, range(0xE000, 0xF8FF)) if sign not in whole)

    def out(match: re.Match[str]) -> str:
        found.append(match.group())
        return mark

    marked = [{**m, "content": pattern.sub(out, m["content"])} for m in messages]
    first, *others = _rendered(tokenizer, marked, arguments, tokenize=False).split(mark)
    if len(others) != len(found):
        raise ValueError(
            f"it spells {found[0]!r}, a control token, in what the chat template does not write as it stands: leave it out"
        )
    ids = list(tokenizer(first, add_special_tokens=False)["input_ids"])
    for spelt, behind in zip(found, others, strict=True):
        ids += encode_text(tokenizer, spelt)
        ids += tokenizer(behind, add_special_tokens=False)["input_ids"] if behind else []
    return ids


def encode_response(tokenizer: Any, text: str) -> list[int]:
    """A demonstration as the student should write it, with the end that it has to learn, once: some data spells it already."""
    ids, end = tokenizer(text, add_special_tokens=False)["input_ids"], turn_end(tokenizer)
    return [*ids[: -1 if ids and ids[-1] == end else None], end]


def turn_end(tokenizer: Any) -> int:
    """The token that ends an assistant's turn: the first special one that the chat template writes behind it, else EOS."""
    return _turn_end(tokenizer, repr(tokenizer.chat_template), tokenizer.eos_token_id)


@lru_cache(maxsize=16)
def _turn_end(tokenizer: Any, template: str, eos: int) -> int:
    if tokenizer.chat_template is None:
        return eos
    try:
        text = _rendered(tokenizer, TALK, {}, tokenize=False)
    except ValueError:  # it wants something else of a conversation
        return eos
    _, found, tail = text.rpartition(TALK[-1]["content"])
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | {*tokenizer.all_special_ids}
    ends = special - {tokenizer.unk_token_id, tokenizer.bos_token_id} | {eos}
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"] if found else []
    return next((i for i in ids if i in ends), eos)


def said_by(
    tokenizer: Any,
    messages: Sequence[Message],
    turn: Message,
    template: Mapping[str, Any],
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The text of the assistant's `turn` as the student would write it: the content, or, where the turn has more than that,
    all that the chat template adds for it, without the end."""
    if turn.keys() <= {"role", "content"}:
        return turn["content"]
    arguments = _arguments(tokenizer, template, tools)
    before = _rendered(tokenizer, messages, arguments, add_generation_prompt=True, tokenize=False)
    whole = _rendered(tokenizer, [*messages, turn], arguments, tokenize=False)
    if not whole.startswith(before):
        more = ", ".join(turn.keys() - {"role", "content"})
        raise ValueError(
            f"the chat template opens the assistant's turn otherwise than it writes one with {more}: put all of the response "
            "into content, as the student should write it"
        )
    text, end = whole.removeprefix(before), tokenizer.convert_ids_to_tokens(turn_end(tokenizer))
    return text.rpartition(end)[0] if end in text else text


def mentions(tokenizer: Any, name: str) -> bool:
    """Whether the chat template speaks of `name`."""
    return re.search(rf"\b{re.escape(name)}\b", str(tokenizer.chat_template or "")) is not None


def _rendered(tokenizer: Any, messages: Sequence[Any], arguments: Mapping[str, Any], **options: Any) -> Any:
    """What the chat template makes of a conversation, or of each of several. ValueError for whatever it raises: it is a
    program, too."""
    try:
        return tokenizer.apply_chat_template(list(messages), **options, **arguments)
    except RecursionError:
        why = "it calls itself without end"
    except Exception as error:  # noqa: BLE001 - a template raises what it likes
        why = " ".join(str(error).split())[:300] or type(error).__name__
    raise ValueError(f"the chat template cannot render this conversation: {why}")


def _arguments(tokenizer: Any, template: Mapping[str, Any], tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What `apply_chat_template` is told; the day of `template` becomes part of the template itself, which transformers lets
    no function into."""
    arguments = {**template, "tools": list(tools)} if tools else dict(template)
    day = arguments.pop(DATE, None)
    if day is not None and mentions(tokenizer, DATE):
        own = tokenizer.get_chat_template(None, tools=arguments.get("tools"))
        arguments["chat_template"] = _on(day) + own
    return arguments


def _on(day: Any) -> str:
    """A macro that does on a certain day what `strftime_now` does today. With the line break behind it, it leaves nothing in
    the text."""
    try:
        moment = datetime.fromisoformat(day)
    except (ValueError, TypeError):
        raise ValueError(
            f"data.template.{DATE}: {day!r} is no date that a chat template could write: write one such as 2026-11-26"
        ) from None
    names = [f"%{letter}" for letter in ("-d", "-m", "-H", "-I", "-M", "e", *"aAbBdHIjmMpSyYcxXuUwWGV%")]
    replaced = "".join(f" | replace({name!r}, {moment.strftime(name)!r})" for name in names)
    return f"{{%- macro {DATE}(form) -%}}{{{{ form{replaced} }}}}{{%- endmacro %}}\n"


def _plain(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a prompt without a template: what the tokenizer puts before a text, and the text, as text."""
    ids = _without_end(tokenizer, text)
    if not _control_pattern(tokenizer).search(text):
        return ids
    some, bare = _without_end(tokenizer, "a"), tokenizer("a", add_special_tokens=False)["input_ids"]
    return [*some[: len(some) - len(bare)], *encode_text(tokenizer, text)]


def _without_end(tokenizer: Any, text: str) -> list[int]:
    ids, bare = tokenizer(text)["input_ids"], tokenizer(text, add_special_tokens=False)["input_ids"]
    starts = (i for i in range(len(ids) - len(bare) + 1) if ids[i : i + len(bare)] == bare)
    start = next(starts, None)
    return ids if start is None or not bare else ids[: start + len(bare)]
