"""Prompts that a command reads once, although its check and its run both ask for them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from kibitz.types import Prompt

_read: ContextVar[list[tuple[Any, list[Prompt]]] | None] = ContextVar("prompts that were read", default=None)


@contextmanager
def reading_once() -> Iterator[None]:
    """A context inside which the same prompts, asked for again, are those of the first time. Outside it a file is read each time,
    because it may have changed."""
    token = _read.set([])
    try:
        yield
    finally:
        _read.reset(token)


def remembered(asked: Any, read: Callable[[], list[Prompt]]) -> list[Prompt]:
    """What `read` returns, or has returned for an equal `asked` in the same `reading_once`."""
    known = _read.get()
    if known is None:
        return read()
    found = next((prompts for before, prompts in known if before == asked), None)
    if found is None:
        found = read()
        known.append((asked, found))
    return list(found)
