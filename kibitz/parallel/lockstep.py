"""Collectives that only one process needs: it calls for one by number, and the others, which wait, join it.

Processes that wait for each other take part in every collective that is called for meanwhile, as often as it is, so that
no process has to know how many the others need.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist


class Lockstep:
    """The registered collectives of a process, numbered from 1 in the order in which all processes register them."""

    def __init__(self) -> None:
        self.collectives: list[Callable[[], object]] = []

    def register(self, collective: Callable[[], object]) -> Callable[[], None]:
        """Register this process's part of a collective. The function that is returned calls for it: call that, then do
        the caller's own part. All processes register the same collectives in the same order."""
        self.collectives.append(collective)
        number = len(self.collectives)
        return lambda: self._join_until(number)

    def wait(self) -> None:
        """Join the collectives of the other processes until all of them wait."""
        if self.collectives:
            self._join_until(0)

    def _join_until(self, number: int) -> None:
        """Join collectives until `number` is the one that is called for; of several at a time the highest is first."""
        while (called := _highest(number)) != number:
            self.collectives[called - 1]()


def _highest(number: int) -> int:
    """The highest number that any process passes."""
    highest = torch.tensor(number)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    return int(highest)
