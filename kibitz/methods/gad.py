"""Generative adversarial distillation (2511.10643): the teacher gives text only. A judge learns to tell it from the
student's answers to the same prompts, and its score of an answer is the reward that the student learns from.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from kibitz.batching import group, pack
from kibitz.config import GADConfig
from kibitz.losses.adversarial import bradley_terry
from kibitz.losses.criteria import CrossEntropy, PolicyGradient
from kibitz.losses.policy_gradient import group_advantages
from kibitz.methods.adversary import Adversary, adversary
from kibitz.methods.parts import Parts, policy_loss, teacher_engine, token_loss
from kibitz.methods.sources import Demonstrations, Generated, Source
from kibitz.models import LanguageModel
from kibitz.models.head import body_of
from kibitz.models.load import load_model
from kibitz.signals import Batch, Scored
from kibitz.types import Prompt, Rollout, Step, Writer

Comparison = list[Rollout]
"""All answers to one prompt: the teacher's, then each of the student's."""


class Judge(nn.Module):
    """D(x, y): one number on top of a language model's body, read at the last token of the response. Zero at first."""

    def __init__(self, model: LanguageModel):
        super().__init__()
        self.body = body_of(model.model)
        self.score = nn.Linear(model.model.config.get_text_config().hidden_size, 1, bias=False, device=model.device)
        nn.init.zeros_(self.score.weight)

    def forward(self, ids_BL: Tensor, last_B: Tensor) -> Tensor:
        hidden_BLD = self.body(ids_BL, use_cache=False).last_hidden_state
        return self.score(hidden_BLD[torch.arange(len(last_B), device=last_B.device), last_B].float())[:, 0]


@dataclass
class GAD:
    config: GADConfig
    parts: Parts
    student: Source
    teacher: Source
    judge: Adversary
    model: LanguageModel  # what the judge stands on
    comparisons: list[Comparison] = field(default_factory=list)  # of this step

    def rollout(self, prompts: Sequence[Prompt], step: Step) -> list[Rollout]:
        """Return the rollouts that the student learns from in this step. The other side's answers are for the judge alone."""
        own = self.student.rollout(prompts, step)
        theirs = self.teacher.rollout(prompts, replace(step, seed=~step.seed))  # not the student's random numbers
        size = len(own) // len(prompts)
        self.comparisons = [[answer, *own[i * size : (i + 1) * size]] for i, answer in enumerate(theirs)]
        return theirs if self._warming_up(step) else own

    def signal(self, rollouts: Sequence[Rollout], step: Step) -> list[Scored]:
        """Score with the judge as it was before it learns from these answers. The student's answers in a comparison are one
        group of GRPO."""
        rewards_GN = self._judge()
        if self._warming_up(step):
            return [Scored(rollout, rollout.weight_T()) for rollout in rollouts]
        advantages = group_advantages(rewards_GN, self.config.normalize_std).flatten()
        return [
            Scored(rollout, rollout.weight_T(), advantage_T=advantage.expand(rollout.num_tokens))
            for rollout, advantage in zip(rollouts, advantages, strict=True)
        ]

    def loss(self, student: LanguageModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        policy = PolicyGradient(policy_loss(self.config), temperature=self.parts.sampling.temperature)
        criterion = CrossEntropy() if batch.tokens.advantage_T is None else policy
        return token_loss(student, batch, criterion, self.parts.recipe.optim.chunk_tokens)

    def _warming_up(self, step: Step) -> bool:
        return step.number < round(self.config.warmup * step.total)

    def _judge(self) -> Tensor:
        """Train the judge by one step on all comparisons, and return its scores `[G, N]` of the student's answers from before
        that step."""
        size = len(self.comparisons[0])
        scores_GM = torch.zeros(len(self.comparisons), size)
        num_pairs, total = len(self.comparisons) * (size - 1), 0.0
        longest = [max(comparison, key=_length) for comparison in self.comparisons]
        for indices in group(longest, self.parts.recipe.optim.tokens_per_micro_batch // size):
            given_GM = self._scores([answer for i in indices for answer in self.comparisons[i]]).view(-1, size)
            loss = bradley_terry(given_GM[:, :1], given_GM[:, 1:]).sum() / num_pairs
            loss.backward()
            scores_GM[indices], total = given_GM.detach().cpu(), total + loss.item()
        self.judge.optimizer.step()
        theirs_G1, own_GN = scores_GM[:, :1], scores_GM[:, 1:]
        ledger, lengths = (
            self.parts.ledger,
            [_length(answer) for comparison in self.comparisons for answer in comparison],
        )
        ledger.metrics["discriminator_loss"] = total
        ledger.metrics["discriminator_accuracy"] = (
            (0.5 + 0.5 * (theirs_G1 - own_GN).sign()).mean().item()
        )  # a tie: half
        ledger.metrics["score_teacher"] = theirs_G1.mean().item()
        ledger.metrics["score_student"] = own_GN.mean().item()
        ledger.spend("opponent_training", 3 * self.model.forward_flops(sum(lengths), sum(n * n for n in lengths), 0))
        return own_GN

    def _scores(self, rollouts: Sequence[Rollout]) -> Tensor:
        ids_BL = pack([Scored(rollout, rollout.weight_T()) for rollout in rollouts], self.model.device).ids_BL
        return self.judge.module(ids_BL, torch.tensor([_length(r) - 1 for r in rollouts], device=ids_BL.device))


def _length(rollout: Rollout) -> int:
    return len(rollout.prompt.ids) + rollout.num_tokens


def build(config: GADConfig, parts: Parts) -> GAD:
    if config.source == "dataset":
        teacher: Source = Demonstrations(parts.encode_response)
    else:
        teacher = Generated(teacher_engine(parts), replace(parts.sampling, num_samples=1), Writer.TEACHER)
    model = load_model(parts.recipe.other_models()["discriminator"], "method.discriminator", parts.student.device)
    lr = config.discriminator.lr or parts.recipe.optim.lr
    kept = parts.stateful["discriminator"] = adversary(Judge(model), lr, parts.recipe.optim)
    return GAD(config, parts, Generated(parts.engine, parts.sampling), teacher, kept, model)
