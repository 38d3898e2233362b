"""Rollouts of a step: written when they are needed, or one step ahead, while the student learns from those before.

One step ahead (`rollout.max_staleness: 1`), servers write with the weights of one step earlier. The rollouts of the next step
begin when those of this one are taken, and must be whole before the optimizer moves the weights. They are a part of a
checkpoint: a run that goes on learns from the same text. An engine in this process cannot write meanwhile: it writes the same
rollouts at once.
"""

import json
import pickle
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kibitz.config import Recipe
from kibitz.data import PromptStream
from kibitz.engines import Engine, Overlapping, Unfinished
from kibitz.parallel.ranks import ALONE, Ranks
from kibitz.training.setup import Setup
from kibitz.types import Prompt, Rollout

Write = Callable[[Sequence[Prompt], int], list[Rollout]]
"""Writes the rollouts of some prompts, as those of the step with this number, counted from 0."""


@dataclass(frozen=True)
class InTime:
    """Each step's rollouts are written at its beginning, by the student as it is."""

    write: Write
    stream: PromptStream
    num_prompts: int

    def take(self, number: int) -> list[Rollout]:
        """The rollouts of a step."""
        return self.write(self.stream.take(self.num_prompts), number)

    def settle(self) -> None:
        """Nothing is being written."""

    def metrics(self) -> dict[str, float]:
        """Numbers for the step's row."""
        return {}


class Ahead:
    """The next step's rollouts are written while this one's are learnt from, or, by an engine that cannot do that, before. A
    `Stateful`: what was written and not yet learnt.

    Of several processes each has a thread that writes its share. What they do together is done in `take` and `settle`, which
    all call in the same order, and never in that thread."""

    def __init__(
        self, write: Write, stream: PromptStream, num_prompts: int, num_steps: int, engine: Engine, ranks: Ranks = ALONE
    ):
        self.write, self.stream, self.engine, self.ranks = write, stream, engine, ranks
        self.num_prompts, self.num_steps = num_prompts, num_steps
        self._next: _Pending | None = None
        self._stale = 0

    def take(self, number: int) -> list[Rollout]:
        self._stale = int(self._next is not None)
        pending = self._settled(self._next or self._begin(number))
        assert pending.number == number and pending.rollouts is not None, "rollouts are taken step by step"
        self._next = self._begin(number + 1) if number + 1 < self.num_steps else None
        return pending.rollouts

    def settle(self) -> None:
        """Wait until all is written; what did not come from the student's weights is written again: a server may have been
        started anew meanwhile. The student still has the weights that its servers should have had."""
        if self._next is not None:
            self._next = self._settled(self._next)

    def metrics(self) -> dict[str, float]:
        """By how many steps the weights that wrote what was taken last are older than the student that learnt from it."""
        return {"staleness": self._stale}

    def _begin(self, number: int) -> "_Pending":
        before, prompts = self.stream.position, self.stream.take(self.num_prompts)
        if not isinstance(self.engine, Overlapping):
            return _Pending(number, before, prompts, self.write(prompts, number))
        places = self.ranks.places([prompt.key for prompt in prompts])
        self.engine.begin()
        pending = _Pending(number, before, prompts, places=places)

        def write() -> None:
            try:
                pending.share.set_result(self._share(pending))
            except BaseException as error:  # noqa: BLE001  # whoever settles gets it
                pending.share.set_exception(error)

        threading.Thread(target=write, name="kibitz-ahead", daemon=True).start()
        return pending

    def _share(self, pending: "_Pending") -> list[Rollout] | Exception:
        """What this process writes, over HTTP alone; or what kept it from that."""
        assert isinstance(self.engine, Overlapping)
        try:
            with self.engine.in_background():
                mine = [pending.prompts[place] for place in pending.places[self.ranks.rank]]
                return self.write(mine, pending.number)
        except Exception as error:  # noqa: BLE001  # it is raised in all processes
            return error

    def _settled(self, pending: "_Pending") -> "_Pending":
        if pending.rollouts is not None:
            return pending
        assert isinstance(self.engine, Overlapping)
        mine = pending.share.result()
        self._agree(mine)
        while not self.engine.settle():
            mine = self._share(pending)
            self._agree(mine)
        assert isinstance(mine, list), "an engine has settled when all is written"
        placed: dict[int, list[Rollout]] = {}
        for places, rollouts in zip(pending.places, self.ranks.gather(mine), strict=True):
            each = len(rollouts) // len(places)
            placed |= {place: rollouts[i * each : (i + 1) * each] for i, place in enumerate(places)}
        whole = [rollout for place in range(len(pending.prompts)) for rollout in placed[place]]
        return replace(pending, rollouts=whole)

    def _agree(self, mine: list[Rollout] | Exception) -> None:
        """Raise in all processes what went wrong in one, for what `Overlapping.settle` does not look after."""
        error = mine if isinstance(mine, Exception) and not isinstance(mine, Unfinished) else None
        errors = self.ranks.gather(None if error is None else _sendable(error))
        if (error := next((one for one in errors if one is not None), None)) is not None:
            raise error

    def state(self) -> dict[str, Tensor]:
        if self._next is None:
            return {"about": _packed(None), "logp": torch.zeros(0), "ids": torch.zeros(0, dtype=torch.long)}
        rollouts = self._next.rollouts
        assert rollouts is not None, "a run is saved between steps"
        each = len(rollouts) // len(self._next.prompts)
        assert all(r.prompt.ids == self._next.prompts[i // each].ids for i, r in enumerate(rollouts)), (
            "in order of the prompts"
        )
        rows = [[r.num_tokens, r.finished, r.sample, r.shortened, r.text] for r in rollouts]
        about = {"number": self._next.number, "position": self._next.position, "rollouts": rows}
        return {
            "about": _packed(about),
            "logp": torch.cat([r.logp_T for r in rollouts]),
            "ids": torch.tensor([i for r in rollouts for i in r.response_ids]),
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        about = json.loads(bytes(state["about"].tolist()))
        if about is None:
            return
        self.stream.go_to(about["position"])
        prompts, rows = self.stream.take(self.num_prompts), about["rollouts"]
        sizes, each = [row[0] for row in rows], len(rows) // len(prompts)
        parts = zip(rows, state["ids"].split(sizes), state["logp"].split(sizes), strict=True)
        rollouts = [
            Rollout(
                prompts[i // each], ids_T.tolist(), logp_T.clone(), finished, sample, shortened=shortened, text=text
            )
            for i, ((_, finished, sample, shortened, text), ids_T, logp_T) in enumerate(parts)
        ]
        self._next = _Pending(about["number"], about["position"], prompts, rollouts)


@dataclass(frozen=True)
class _Pending:
    """Rollouts of a step: whole, or None while they are written. `position` is that of the prompts before these, `places` are
    the prompts of each process, and `share` is what this one writes."""

    number: int
    position: int
    prompts: list[Prompt]
    rollouts: list[Rollout] | None = None
    places: Sequence[Sequence[int]] = ()
    share: "Future[list[Rollout] | Exception]" = field(default_factory=Future)


def supply_for(recipe: Recipe, setup: Setup, write: Write) -> "InTime | Ahead":
    """The supply that a recipe asks for."""
    stream, num = setup.stream, recipe.rollout.prompts_per_step
    if recipe.rollout.max_staleness == 0:
        return InTime(write, stream, num)
    return Ahead(write, stream, num, recipe.steps, setup.engine, setup.parts.ranks)


def _sendable(error: Exception) -> Exception:
    """The error, or what can be said of one that other processes could not read."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001  # an error may hold anything
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _packed(tree: object) -> Tensor:
    return torch.tensor(list(json.dumps(tree).encode()), dtype=torch.uint8)
