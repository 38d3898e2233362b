"""Rollouts of a step: written when they are needed, or one step ahead, while the student learns from those before.

One step ahead (`rollout.max_staleness: 1`), servers write with the weights of one step earlier. The rollouts of the next step
begin when those of this one are taken, and must be whole before the optimizer moves the weights. They are a part of a
checkpoint: a run that goes on learns from the same text. An engine in this process cannot write meanwhile: it writes the same
rollouts at once.
"""

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kibitz.config import Recipe
from kibitz.data import PromptStream
from kibitz.engines import Checked, Engine
from kibitz.engines.build import ENGINES
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
    """The next step's rollouts are written while this one's are learnt from, or before that if not `meanwhile`. A `Stateful`:
    what was written and not yet learnt."""

    def __init__(
        self,
        write: Write,
        stream: PromptStream,
        num_prompts: int,
        num_steps: int,
        engine: Engine,
        meanwhile: bool = True,
    ):
        self.write, self.stream, self.engine, self.meanwhile = write, stream, engine, meanwhile
        self.num_prompts, self.num_steps = num_prompts, num_steps
        self._next: _Pending | None = None
        self._stale = 0

    def take(self, number: int) -> list[Rollout]:
        self._stale = int(self._next is not None)
        pending = self._next or self._begin(number)
        assert pending.number == number, "rollouts are taken step by step"
        rollouts = pending.written.result()
        self._next = self._begin(number + 1) if number + 1 < self.num_steps else None
        return rollouts

    def settle(self) -> None:
        """Wait for what is being written, and write again what did not come from the student's weights: a server may have been
        started anew meanwhile. The student still has the weights that its servers should have had."""
        if self._next is not None:
            self._next.written.result()
            if isinstance(self.engine, Checked) and not self.engine.believed():
                again: Future[list[Rollout]] = Future()
                again.set_result(self.write(self._next.prompts, self._next.number))
                self._next = replace(self._next, written=again)

    def metrics(self) -> dict[str, float]:
        """By how many steps the weights that wrote what was taken last are older than the student that learnt from it."""
        return {"staleness": self._stale}

    def _begin(self, number: int) -> "_Pending":
        before = self.stream.position
        prompts, written = self.stream.take(self.num_prompts), Future()
        if not self.meanwhile:
            written.set_result(self.write(prompts, number))
            return _Pending(number, before, prompts, written)

        def write() -> None:
            try:
                written.set_result(self.write(prompts, number))
            except BaseException as error:  # noqa: BLE001  # whoever takes the rollouts gets it
                written.set_exception(error)

        threading.Thread(target=write, name="kibitz-ahead", daemon=True).start()
        return _Pending(number, before, prompts, written)

    def state(self) -> dict[str, Tensor]:
        if self._next is None:
            return {"about": _packed(None), "logp": torch.zeros(0), "ids": torch.zeros(0, dtype=torch.long)}
        rollouts = self._next.written.result()
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
        written: Future[list[Rollout]] = Future()
        written.set_result(
            [
                Rollout(
                    prompts[i // each], ids_T.tolist(), logp_T.clone(), finished, sample, shortened=shortened, text=text
                )
                for i, ((_, finished, sample, shortened, text), ids_T, logp_T) in enumerate(parts)
            ]
        )
        self._next = _Pending(about["number"], about["position"], prompts, written)


@dataclass(frozen=True)
class _Pending:
    """Rollouts of a step, whole or being written. `position` is that of the prompts before these."""

    number: int
    position: int
    prompts: list[Prompt]
    written: "Future[list[Rollout]]"


def supply_for(recipe: Recipe, setup: Setup, write: Write) -> "InTime | Ahead":
    """The supply that a recipe asks for."""
    stream, num = setup.stream, recipe.rollout.prompts_per_step
    if recipe.rollout.max_staleness == 0:
        return InTime(write, stream, num)
    meanwhile = not ENGINES[recipe.rollout.engine].in_process
    return Ahead(write, stream, num, recipe.steps, setup.engine, meanwhile)


def _packed(tree: object) -> Tensor:
    return torch.tensor(list(json.dumps(tree).encode()), dtype=torch.uint8)
