"""What processes do together though only one of them needs it: where a model is in parts, nobody reads it alone.

Each such duty has a number. Who needs one says so and does it; the others, who wait for something, do it as well and wait on.
So every process may do as many as it takes, at any moment, and nobody has to count.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist


class Lockstep:
    def __init__(self) -> None:
        self.collectives: list[Callable[[], object]] = []

    def register(self, collective: Callable[[], object]) -> Callable[[], None]:
        """Enter what others do while one process does its own. To be called before that; all enter the same in one order."""
        self.collectives.append(collective)
        number = len(self.collectives)
        return lambda: self._together(number)

    def wait(self) -> None:
        """Until nobody needs anything any more."""
        if self.collectives:
            self._together(0)

    def _together(self, number: int) -> None:
        """Help with all that comes before `number`; of several that are needed, the highest comes first."""
        while (needed := _highest(number)) != number:
            self.collectives[needed - 1]()


def _highest(number: int) -> int:
    said = torch.tensor(number)
    dist.all_reduce(said, op=dist.ReduceOp.MAX)
    return int(said)
