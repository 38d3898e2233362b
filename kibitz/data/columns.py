"""What stands in a row: text is text, a list of messages is a conversation, and nothing is made into text by force."""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from kibitz.config import Columns, DataConfig
from kibitz.data.templates import Message, mentions

SPEAKERS = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}
MEANT = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts", "tool_calls", "function_call", "images")
"""Fields of a message that say something: a template that does not write them would lose it."""


@dataclass(frozen=True)
class Conversation:
    """What the student reads, the assistant's turn that the data has for it, and the tools that both may speak of."""

    messages: list[Message]
    turn: Message | None = None
    tools: tuple[Mapping[str, Any], ...] = ()


def value_of(place: str, row: Mapping[str, Any], name: str) -> Any:
    """What a column holds, None if the row lacks it. A dotted name goes into objects and, by numbers from 0, into lists,
    unless a column is called that; so does a part of it, where keys have dots themselves."""
    return _inside(place, name, row, name.split("."))


def _inside(place: str, name: str, value: Any, parts: Sequence[str]) -> Any:
    if not parts or value is None:
        return value
    if isinstance(value, list) and parts[0].isdecimal():
        index = int(parts[0])
        return _inside(place, name, value[index], parts[1:]) if index < len(value) else None
    if not isinstance(value, Mapping):
        raise ValueError(
            f"{place}: the column {name!r} goes into an object, and {_shown(value)} stands before .{parts[0]}"
        )
    for size in range(len(parts), 0, -1):
        if (key := ".".join(parts[:size])) in value:
            return _inside(place, name, value[key], parts[size:])
    return None


def text_of(place: str, row: Mapping[str, Any], name: str) -> str | None:
    """The text in a column; a finite number is its JSON text. ValueError, which names the row, for anything else."""
    value = value_of(place, row, name)
    return None if value is None else as_text(place, name, value)


def as_text(place: str, name: str, value: Any) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return json.dumps(value)
    if isinstance(value, int) and not isinstance(value, bool):
        with suppress(ValueError):  # more digits than Python writes
            return json.dumps(value)
    if not isinstance(value, str):
        dotted = (
            f", or name a part of it, such as {name}.{next(iter(value))}" if isinstance(value, dict) and value else ""
        )
        raise ValueError(
            f"{place}: {name} must be text or a finite number, and is {_shown(value)}: write it as text{dotted}"
        )
    _check_characters(place, name, value)
    return value


def conversation_of(place: str, row: dict[str, Any], config: DataConfig, tokenizer: Any) -> Conversation:
    """The conversation up to where the student speaks, and the assistant's turn behind it, if there is one."""
    columns = config.columns
    told = value_of(place, row, columns.response)
    name = columns.prompt
    if name == Columns().prompt or value_of(place, row, name) is None:
        name = next((whole for whole in ("messages", "conversations") if row.get(whole) is not None), name)
    value = value_of(place, row, name)
    if value is None and name in row:
        raise ValueError(f"{place}: {name} is null: write a prompt there, or leave the row out")
    if value is None:
        raise ValueError(
            f"{place} has no column {columns.prompt!r}; it has {', '.join(map(repr, row))}: write data.columns.prompt=NAME"
        )
    if isinstance(value, list) or name in ("messages", "conversations"):
        messages, turn = _split(place, name, _messages(place, name, value, tokenizer))
    else:
        messages, turn = [{"role": "user", "content": as_text(place, name, value)}], None
    if turn is None and told is not None:
        turn = _response(place, columns.response, told, tokenizer)
    if not messages[-1]["content"].strip():
        raise ValueError(f"{place} has an empty prompt")
    if config.system is not None:
        messages = [{"role": "system", "content": config.system}, *messages]
    return Conversation(messages, turn, _tools(place, row))


def _response(place: str, name: str, value: Any, tokenizer: Any) -> Message:
    """The assistant's turn in a column of its own: text, or a list with that one message (TRL's `completion`)."""
    if not isinstance(value, list):
        return {"role": "assistant", "content": as_text(place, name, value)}
    messages = _messages(place, name, value, tokenizer)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise ValueError(f"{place}: {name} must be text or a list with one message, the assistant's")
    return messages[0]


def _split(place: str, name: str, messages: list[Message]) -> tuple[list[Message], Message | None]:
    if messages[-1]["role"] != "assistant":
        return messages, None
    if len(messages) == 1:
        raise ValueError(f"{place}: {name} hold nothing before the assistant's")
    return messages[:-1], messages[-1]


def _messages(place: str, name: str, value: Any, tokenizer: Any) -> list[Message]:
    turns = _as_messages(place, name, value)
    if not isinstance(turns, list) or not turns or not all(map(_is_message, turns)):
        raise ValueError(f"{place}: {name} must be a list of {{role, content}}, both of them text")
    return [_message(f"{place}: {name}", turn, tokenizer) for turn in turns]


def _as_messages(place: str, name: str, conversation: Any) -> Any:
    """Messages as `{role, content}`, content as text, where they are ShareGPT's `{from, value}`, as OpenThoughts has, or their
    content is a list of parts; anything else as it is."""
    if not isinstance(conversation, list) or not all(isinstance(turn, dict) for turn in conversation):
        return conversation
    turns = []
    for turn in conversation:
        if isinstance(speaker := turn.get("from"), str):
            if speaker.lower() not in SPEAKERS:
                raise ValueError(
                    f"{place}: {name} are from {speaker!r:.60}, who is none of {', '.join(SPEAKERS)}: write {{role, content}}"
                )
            turn = {**turn, "role": SPEAKERS[speaker.lower()], "content": turn.get("value")}
        turns.append({**turn, "content": _joined_parts(place, name, turn.get("content"))})
    return turns


def _joined_parts(place: str, name: str, content: Any) -> Any:
    """The text of parts such as `{"type": "text", "text": ...}`, the format of chat servers; other content as it is."""
    if not isinstance(content, list) or not content:
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            what = f"of type {part.get('type')!r:.60}" if isinstance(part, dict) else _shown(part)
            raise ValueError(
                f'{place}: {name} hold a part of content that is {what}: only {{"type": "text", "text": ...}} is read'
            )
    return "".join(part["text"] for part in content)


def _is_message(turn: Any) -> bool:
    """Whether it says who says what. One that calls tools may say nothing else."""
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
        return False
    return isinstance(turn.get("content"), str) or (turn.get("content") is None and bool(turn.get("tool_calls")))


def _message(where: str, turn: Mapping[str, Any], tokenizer: Any) -> Message:
    """The part of a message that the chat template writes. Times, names and the like, which it does not, are left out."""
    content = turn["content"] if turn.get("content") is not None else ""
    for name, text in (("role", turn["role"]), ("content", content)):
        _check_characters(where, name, text)
    message: Message = {"role": turn["role"], "content": content}
    for name, value in turn.items():
        if name in message or value is None or value in ("", [], {}):
            continue
        if mentions(tokenizer, name):
            _check_json(where, name, value)
            message[name] = value
        elif name in MEANT:
            raise ValueError(
                f"{where} have {name}, which the chat template does not write: bring them without it, or a student whose "
                "template does"
            )
    return message


def _tools(place: str, row: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """The functions that the template tells of: a list of JSON schemas, or the JSON text of one."""
    value = row.get("tools")
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = row["tools"]
    if value is None or value in ("", [], {}):
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise ValueError(f"{place}: tools must be a list of functions as JSON schemas, and is {_shown(value)}")
    _check_json(place, "tools", value)
    return tuple(value)


def _check_json(where: str, name: str, value: Any) -> None:
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError):
        raise ValueError(
            f"{where}: {name} must hold text, numbers, lists and objects, and is {_shown(value)}"
        ) from None


def _check_characters(where: str, name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise ValueError(f"{where}: {name} holds {half}, half a surrogate pair, which is no character") from None


def _shown(value: Any) -> str:
    """What a value is, for an error."""
    kinds: Sequence[tuple[type, str]] = (
        (bool, "true or false"),
        (Mapping, "an object"),
        (list, "a list"),
        (str, "text"),
    )
    if isinstance(value, float) and not math.isfinite(value):
        return "not a finite number"
    return next((words for kind, words in kinds if isinstance(value, kind)), f"a {type(value).__name__}")
