"""An evaluation gives accuracy at temperature 1 and greedy with 95% intervals, pass@k, and the reverse KL to the teacher.

The evaluation has its own seed, so two evaluations of one run differ by the weights only.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from statistics import fmean
from typing import Any

import numpy as np
import torch

from kibitz.batching import group, pack
from kibitz.config import DataConfig, EvalConfig, ModelConfig, RolloutConfig
from kibitz.data import apart, joined, load_grader, load_prompts
from kibitz.engines import Engine
from kibitz.engines.torch import TorchEngine
from kibitz.evaluate.statistics import interval, pass_at_k
from kibitz.graders import Grader, is_graded
from kibitz.losses.chunked import over_chunks
from kibitz.losses.criteria import ReverseKL
from kibitz.models import LanguageModel
from kibitz.models.load import load_model, load_tokenizer, pick_device, share_vocabulary, stop_ids
from kibitz.parallel.ranks import ALONE, Ranks
from kibitz.signals import Scored, Spans
from kibitz.teachers import Teacher
from kibitz.teachers.build import reader_of
from kibitz.types import Prompt, Rollout, Sampling

SCORED_TOGETHER = 4096
"""Positions of one forward pass: activations of many more are memory that a CPU asks the system for each time anew."""


@dataclass(frozen=True)
class Evaluator:
    """Everything that one evaluation needs, so that a run can repeat it on the same prompts."""

    student: LanguageModel
    engine: Engine
    teacher: Teacher | None
    prompts: Sequence[Prompt]
    grader: Grader | None
    sampling: (
        Sampling  # max_tokens, num_samples, stop_ids and seed; temperature, truncation and epsilon are the evaluation's
    )
    split: str = "dev"
    ranks: Ranks = ALONE
    held_out: bool = True
    """Whether the student learns on none of these prompts."""

    def run(self) -> tuple[dict[str, Any], list[Rollout]]:
        """A row for `evals.jsonl`, and the rollouts at temperature 1 that it describes."""
        sampling = replace(self.sampling, temperature=1.0, top_p=1.0, top_k=0, epsilon=0.0)
        sampled = grade(self.grader, self.student, self._written(sampling), self.ranks)
        row: dict[str, Any] = {"split": self.split, "num_prompts": len(self.prompts)}
        row |= {} if self.held_out else {"held_out": False}
        if self.grader is not None and any(rollout.reward is not None for rollout in sampled):
            greedy = self._written(replace(sampling, temperature=0.0, num_samples=1))
            greedy = grade(self.grader, self.student, greedy, self.ranks)
            row |= {"sampled": accuracy(sampled), "greedy": accuracy(greedy), "pass_at_k": _pass_at_k(sampled)}
        if self.teacher is not None:
            row |= distance(self.student, self.teacher, sampled, ranks=self.ranks)
        row["response_tokens"] = fmean(r.num_tokens for r in sampled)
        row["cut_off"] = fmean(not r.finished for r in sampled)
        return row, sampled

    def _written(self, sampling: Sampling) -> list[Rollout]:
        """The rollouts; rows that ask the same have samples of their own."""
        return joined(self.prompts, self.engine.generate(apart(self.prompts), sampling))


def grade(
    grader: Grader | None, student: LanguageModel, rollouts: Sequence[Rollout], ranks: Ranks = ALONE
) -> list[Rollout]:
    """The rollouts with their text and, where there is a grader, their reward. A grader that raises names the prompt and
    stops the run."""
    decode = student.tokenizer.decode
    graded = [replace(r, text=decode(r.response_ids, skip_special_tokens=True)) for r in rollouts]
    if grader is None:
        return graded
    rewards = ranks.in_shares(lambda part: [_reward(grader, rollout) for rollout in part], graded)
    return [replace(rollout, reward=reward) for rollout, reward in zip(graded, rewards, strict=True)]


def _reward(grader: Grader, rollout: Rollout) -> float | None:
    """None for a row that holds nothing to grade against."""
    if not is_graded(grader, rollout.prompt):
        return None
    try:
        reward = grader(rollout.prompt, rollout.text)
    except Exception as error:
        raise RuntimeError(
            f"the grader failed on prompt {rollout.prompt.text[:200]!r}, response {rollout.text[:200]!r}"
        ) from error
    try:
        number = float(reward) if isinstance(reward, Real | torch.Tensor | np.bool_) else math.nan
    except (OverflowError, ValueError, RuntimeError):  # a number too large, a tensor of several
        number = math.nan
    if not math.isfinite(number):
        raise RuntimeError(
            f"the grader gave {reward!r:.100} for the response {rollout.text[:200]!r} of prompt {rollout.prompt.text[:200]!r}: "
            "a reward is a finite number"
        )
    return number


def accuracy(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """The mean reward with its 95% interval, and the number of different prompts that have one: see `statistics.interval`."""
    groups = _by_prompt(rollouts)
    mean, low, high = interval(groups)
    return {"accuracy": mean, "low": low, "high": high, "num": len(groups)}


def _pass_at_k(rollouts: Sequence[Rollout]) -> dict[str, float]:
    counts = [(len(rewards), sum(reward >= 1.0 for reward in rewards)) for rewards in _by_prompt(rollouts)]
    least = min(num for num, _ in counts)
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64, 128, 256) if k <= least]
    return {str(k): fmean(pass_at_k(num, correct, k) for num, correct in counts) for k in ks}


def _by_prompt(rollouts: Sequence[Rollout]) -> list[list[float]]:
    """The rewards of all samples of each prompt. Rows that ask the same and have the same answer, up to white space, are one
    prompt."""
    groups: dict[tuple[str, ...], list[float]] = {}
    for rollout in rollouts:
        if rollout.reward is not None:
            groups.setdefault(_asked(rollout.prompt), []).append(rollout.reward)
    return list(groups.values())


def _asked(prompt: Prompt) -> tuple[str, ...]:
    """The words of a problem: equal for its copies, however they are spaced."""
    if not prompt.messages:
        return prompt.key, prompt.answer or ""
    said = "\n".join(f"{message['role']}: {message['content']}" for message in prompt.messages)
    tools = json.dumps(prompt.tools, default=str) if prompt.tools else ""
    return " ".join(said.split()), tools, " ".join((prompt.answer or "").split())


@torch.no_grad()
def distance(
    student: LanguageModel,
    teacher: Teacher,
    rollouts: Sequence[Rollout],
    max_tokens: int = SCORED_TOGETHER,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """`reverse_kl`, KL(student || teacher) in nats per token of the student's own text: exact over the vocabulary from a
    dense signal, a lower bound from the teacher's top K and their tail, the k3 estimate from the sampled token or span.

    Of a teacher with another tokenizer also `reverse_kl_per_byte`, which students of different tokenizers can be compared
    by, and `unaligned`, the share of tokens that it could not score."""
    total, num_bytes, scored_tokens, written = 0.0, 0.0, 0.0, 0.0
    part = ranks.part(rollouts)
    for indices in group(part, max_tokens):
        members = [part[i] for i in indices]
        signals = teacher.score(members, max_tokens)
        scored = [Scored.from_signal(r, s) for r, s in zip(members, signals, strict=True)]
        total += _sum_of_reverse_kl(student, scored)
        scored_tokens += sum(s.weight_T.sum().item() for s in scored)
        written += sum(r.weight_T().sum().item() for r in members)
        num_bytes += sum((s.bytes_T / s.size_T * s.comparable_T).sum().item() for s in signals if isinstance(s, Spans))
    sums = ranks.gather((total, num_bytes, scored_tokens, written))
    total, num_bytes, scored_tokens, written = (sum(values) for values in zip(*sums, strict=True))
    row = {"reverse_kl": total / max(1.0, scored_tokens)}
    if num_bytes:
        row |= {"reverse_kl_per_byte": total / num_bytes, "unaligned": 1 - scored_tokens / written}
    return row


def mean_reverse_kl(
    student: LanguageModel, teacher: Teacher, rollouts: Sequence[Rollout], max_tokens: int = SCORED_TOGETHER
) -> float:
    """The `reverse_kl` of `distance`."""
    return distance(student, teacher, rollouts, max_tokens)["reverse_kl"]


def _sum_of_reverse_kl(student: LanguageModel, scored: Sequence[Scored]) -> float:
    batch, criterion, size = pack(scored, student.device), ReverseKL(), student.chunk_tokens
    total, _ = student(batch, lambda hidden_TD, head: over_chunks(criterion, hidden_TD, head, batch.tokens, size))
    return total.item()


def evaluate_model(
    model: str,
    *,
    teacher: str | None = None,
    data: DataConfig,
    eval: EvalConfig = EvalConfig(),
    rollout: RolloutConfig = RolloutConfig(),
    device: str = "auto",
) -> dict[str, Any]:
    """Evaluate a checkpoint on the prompts of a `data` section."""
    where, config = pick_device(device), ModelConfig(model=model)
    tokenizer = load_tokenizer(config, "student")
    limit = min(eval.num_prompts, data.limit or eval.num_prompts)
    prompts = load_prompts(data.model_copy(update={"limit": limit}), tokenizer, eval.seed)
    grader = load_grader(data, prompts)
    theirs = None if teacher is None else load_model(ModelConfig(model=teacher), "teacher", where)
    scorer = None if theirs is None else reader_of(theirs, tokenizer, data.template)
    student = load_model(config, "student", where, tokenizer)
    share_vocabulary([student, *([] if theirs is None else [theirs])])
    student.read_up_to(max(len(prompt.ids) for prompt in prompts) + rollout.max_tokens)
    sampling = Sampling(
        max_tokens=rollout.max_tokens,
        num_samples=eval.samples,
        stop_ids=stop_ids(student, rollout.stop),
        seed=eval.seed,
    )
    engine = TorchEngine(student, rollout.max_rows)
    row, _ = Evaluator(student, engine, scorer, prompts, grader, sampling, data.split).run()
    return row
