"""A method on the rollouts of one step, without the run around it."""

from dataclasses import replace
from pathlib import Path

import torch
from support.models import full_logp
from support.runs import STEP, recipe, teacher_model

from kibitz import methods
from kibitz.batching import micro_batches, pack
from kibitz.signals import Scored
from kibitz.training import setup
from kibitz.types import Rollout


def odd(prompt, text) -> float:
    return float(len(text) % 2)


class Lab:
    """A method with the rollouts of a run's first step, or with `own` text of the student whatever the method reads."""

    def __init__(self, models: Path, output: Path, method: dict, own: bool = False, **sections):
        sections["optim"] = {"tokens_per_micro_batch": 200, **sections.get("optim", {})}
        tree = recipe(models / "student", models / "teacher", output, method=method, **sections)
        self.setup = setup.prepare(tree, grader=odd)
        self.parts, self.student = self.setup.parts, self.setup.parts.student
        self.method = methods.build(self.parts)
        if own:
            sampling = replace(self.parts.sampling, seed=5)
            self.rollouts = self.setup.engine.generate(self.setup.stream.take(6), sampling)
        else:
            self.rollouts = self.method.rollout(self.setup.stream.take(8), STEP)
        for i, rollout in enumerate(self.rollouts):
            rollout.reward = float(i % 3)

    @property
    def teacher(self):
        return teacher_model(self.setup)

    def scored(self) -> list[Scored]:
        return self.method.signal(self.rollouts, STEP)

    def weights(self) -> list[torch.Tensor]:
        return [one.weight_T for one in self.scored()]

    def both(self, rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor]:
        """log p of the student and of the teacher, `[T, V]` in float64, without gradients."""
        return full_logp(self.student, rollout).detach(), full_logp(self.teacher, rollout).detach()

    def values(self, scored=None, method=None) -> tuple[float, torch.Tensor]:
        """What the trainer minimises, and its gradient: each objective is the mean over its own tokens."""
        scored, method = self.scored() if scored is None else scored, method or self.method
        counts = {
            s.objective: sum(int((o.weight_T > 0).sum()) for o in scored if o.objective == s.objective) for s in scored
        }
        self.student.zero_grad()
        loss = 0.0
        for indices in micro_batches(scored, self.parts.recipe.optim.tokens_per_micro_batch):
            batch = pack([scored[i] for i in indices])
            total, _ = method.loss(self.student, batch)
            (total / counts[batch.objective]).backward()
            loss += total.item() / counts[batch.objective]
        return loss, torch.cat([p.grad.flatten() for p in self.student.parameters() if p.grad is not None])

    def objective(self, scored: list[Scored] | None = None) -> float:
        return self.values(scored)[0]
