"""A method on the rollouts of one step, without the run around it."""

from pathlib import Path

import torch
from support.runs import STEP, recipe

from kibitz import methods
from kibitz.batching import micro_batches, pack
from kibitz.training import setup


def odd(prompt, text) -> float:
    return float(len(text) % 2)


class Lab:
    """A method with the rollouts of a run's first step, without the run around it."""

    def __init__(self, models: Path, output: Path, method: dict, **sections):
        tree = recipe(models / "student", models / "teacher", output, method=method, **sections)
        self.setup = setup.prepare(tree, grader=odd)
        self.parts, self.student = self.setup.parts, self.setup.student
        self.method = methods.build(self.parts)
        self.rollouts = self.method.rollout(self.setup.stream.take(8), STEP)
        for i, rollout in enumerate(self.rollouts):
            rollout.reward = float(i % 3)
        self.scored = self.method.signal(self.rollouts, STEP)

    def log_probs(self, model, rollout) -> torch.Tensor:
        """[T, V] in float64, from the plain model, one sequence at a time."""
        ids, first = torch.tensor([[*rollout.prompt.ids, *rollout.response_ids]]), len(rollout.prompt.ids) - 1
        return model.model(ids).logits[0, first:-1, : model.vocab_size].double().log_softmax(-1)

    def values(self, scored=None, method=None) -> tuple[float, torch.Tensor]:
        """What the trainer minimises, and its gradient: each objective is the mean over its own tokens."""
        scored, method = self.scored if scored is None else scored, method or self.method
        counts = {
            s.objective: sum(int((o.weight_T > 0).sum()) for o in scored if o.objective == s.objective) for s in scored
        }
        self.student.zero_grad()
        loss = 0.0
        for indices in micro_batches(scored, 200):
            batch = pack([scored[i] for i in indices])
            total, _ = method.loss(self.student, batch)
            (total / counts[batch.objective]).backward()
            loss += total.item() / counts[batch.objective]
        return loss, torch.cat([p.grad.flatten() for p in self.student.parameters() if p.grad is not None])


def model_of(teacher):
    return teacher.writer(lambda model: model)
