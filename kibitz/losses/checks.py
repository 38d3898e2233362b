"""Checks of numbers on a device, whose answer a host must wait for: in a loss all together, once a micro-batch. For those of a
CPU nobody waits."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

Checks = list[tuple[Tensor, Callable[[], Exception]]]
_waiting: ContextVar[Checks | None] = ContextVar("waiting", default=None)


def refuse_if(wrong: Tensor, error: Callable[[], Exception]) -> None:
    """Raise `error()` where `wrong`, one bool: at once, or, of a GPU's, when the context of `together` ends."""
    waiting = _waiting.get()
    if waiting is not None and wrong.device.type != "cpu":
        waiting.append((wrong, error))
    elif wrong.item():
        raise error()


@contextmanager
def together() -> Iterator[None]:
    """A context whose checks are made at its end, by one wait for the device."""
    checks: Checks = []
    token = _waiting.set(checks)
    try:
        yield
    finally:
        _waiting.reset(token)
    if checks:
        found = torch.stack([wrong for wrong, _ in checks]).tolist()
        for is_wrong, (_, error) in zip(found, checks, strict=True):
            if is_wrong:
                raise error()
