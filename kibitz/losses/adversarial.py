"""Losses with an adversary: it is trained to tell the student from the teacher, and the student to make it fail."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from kibitz.losses.criteria import Divergence
from kibitz.signals import Tokens


def moment_gap(student_CS: Tensor, teacher_CS: Tensor, q_CS: Tensor) -> Tensor:
    """E_T q - E_S q = sum_s (T_s - S_s) q_s: by how much the expected action value of the two policies differs.

    Over all |q| <= 1 its largest value is 2 TV(S, T), at q = sign(T - S); the student lowers it, q raises it. Adversarial
    moment matching (Jia, 2406.02959), with the expectation over both policies' actions taken exactly; the derivation is
    ours, see docs/methods.md."""
    return ((teacher_CS.exp() - student_CS.exp()) * q_CS).sum(-1)


ActionValue = Callable[[Tensor, Tensor], Tensor]
"""(student_CV, teacher_CV) -> q_CV: what each token is worth in a state, which is known by what both would do there."""


@dataclass(frozen=True)
class MomentMatching:
    """The student's side of the moment gap, under a q that is held fixed. The gradient is -sum_a q(a) grad S(a): a policy
    gradient over all actions at once, without the noise of a sampled one."""

    q: ActionValue

    def __call__(self, logits_CV: Tensor, tokens: Tokens) -> dict[str, Tensor]:
        return Divergence(self._gap)(logits_CV, tokens)

    def _gap(self, student_CV: Tensor, teacher_CV: Tensor) -> Tensor:
        with torch.no_grad():
            q_CV = self.q(student_CV, teacher_CV)
        return moment_gap(student_CV, teacher_CV, q_CV)


def bradley_terry(better: Tensor, worse: Tensor) -> Tensor:
    """-log sigmoid(better - worse): what a judge pays for preferring the wrong one of two (GAD, 2511.10643, eq. of D)."""
    return softplus(worse - better)
