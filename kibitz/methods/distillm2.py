"""DistiLLM-2 (Ko et al., ICML 2025, 2503.07067): each prompt is answered by both, and each text has its own divergence.

    loss = (2 - b) mean over the teacher's tokens of SKL  +  b mean over the student's of SRKL
    SKL  = KL(T || a T + (1 - a) S)         pulls up what the teacher writes
    SRKL = KL(S || (1 - a) T + a S)         pushes down what only the student writes

The paper's student is that of the epoch before, whose text is stored; here it writes anew at every step. The student
inside the mixture of SRKL has a gradient, as the formula says; the released code detaches it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kibitz.config import DistiLLM2Config
from kibitz.losses.criteria import Divergence
from kibitz.losses.divergences import adaptive_alpha, skew_kl, skew_reverse_kl
from kibitz.methods.parts import Parts, scorer, student_scorer, teacher_engine, token_loss, written_logp
from kibitz.methods.sources import Generated, Source
from kibitz.models import LanguageModel
from kibitz.parallel.ranks import ALONE, Ranks
from kibitz.signals import Batch, Scored, Signal
from kibitz.teachers import Scorer
from kibitz.types import Prompt, Rollout, Step, Writer

DIVERGENCE: dict[str, Callable[..., Tensor]] = {"teacher_text": skew_kl, "student_text": skew_reverse_kl}


@dataclass(frozen=True)
class DistiLLM2:
    config: DistiLLM2Config
    theirs: Source
    own: Source
    teacher: Scorer
    student: Scorer
    chunk_tokens: int | None
    ranks: Ranks = ALONE

    def rollout(self, prompts: Sequence[Prompt], step: Step) -> list[Rollout]:
        return [*self.theirs.rollout(prompts, step), *self.own.rollout(prompts, step)]

    def signal(self, rollouts: Sequence[Rollout], step: Step) -> list[Scored]:
        start, end = self.config.student_coef, self.config.student_coef_end
        coefficient = start + (end - start) * min(1.0, 2 * step.progress)
        theirs = [r for r in rollouts if r.has_tokens_of(Writer.TEACHER)]
        own = [r for r in rollouts if not r.has_tokens_of(Writer.TEACHER)]
        return [
            *self._scored(theirs, "teacher_text", 2 - coefficient),
            *self._scored(own, "student_text", coefficient),
        ]

    def _scored(self, rollouts: list[Rollout], objective: str, coefficient: float) -> list[Scored]:
        signals = self.teacher.score(rollouts)
        numbers = [
            {"alpha": alpha.expand(r.num_tokens)}
            for r, alpha in zip(rollouts, self._alphas(rollouts, signals, objective), strict=True)
        ]
        return [
            Scored(r, coefficient * r.weight_T(), signal, numbers=number, objective=objective)
            for r, signal, number in zip(rollouts, signals, numbers, strict=True)
        ]

    def _alphas(self, rollouts: list[Rollout], signals: list[Signal], objective: str) -> Tensor:
        """The skew of each response, by how much likelier it is to its writer than to the other model."""
        if not self.config.adaptive:
            return torch.full((len(rollouts),), self.config.alpha)
        teacher_N, student_N = (
            torch.stack([logp_T.mean().exp() for logp_T in written_logp(rollouts, scored)])
            for scored in (signals, self.student.score(rollouts))
        )
        gap_N = teacher_N - student_N if objective == "teacher_text" else student_N - teacher_N
        alphas = self.ranks.with_all(
            lambda gaps: list(adaptive_alpha(torch.stack(gaps), self.config.alpha)), list(gap_N)
        )
        return torch.stack(alphas)

    def loss(self, student: LanguageModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        skewed = DIVERGENCE[batch.objective]

        def criterion(logits_CV, tokens):
            return Divergence(partial(skewed, alpha=tokens.numbers["alpha"]))(logits_CV, tokens)

        return token_loss(student, batch, criterion, self.chunk_tokens)


def build(config: DistiLLM2Config, parts: Parts) -> DistiLLM2:
    theirs = Generated(teacher_engine(parts), parts.sampling, Writer.TEACHER)
    own = Generated(parts.engine, parts.sampling)
    teacher, student = scorer(parts, config), student_scorer(parts)
    return DistiLLM2(config, theirs, own, teacher, student, parts.recipe.optim.chunk_tokens, parts.ranks)
