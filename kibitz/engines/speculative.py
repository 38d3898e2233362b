"""Speculative knowledge distillation: the student drafts, the teacher lets pass what it finds likely enough.

The rule (Xu et al., ICLR 2025, 2410.11325, algorithm 1), block by block:

1.  the student samples gamma tokens d_1..d_gamma
2.  the teacher reads them in one forward pass and gives P_1..P_gamma
3.  d_i passes iff it is one of the K likeliest tokens of P_i
4.  the first that does not pass is replaced by a token t ~ P_i, and drafting starts again behind it

Not speculative decoding, which would sample from the teacher alone: t comes from P_i itself and not from the residual
max(P_i - S_i, 0), and no token of the teacher's follows a block that passed whole. Written out, a position gets

    p(token) = S(token) [token in top-K of P] + P(token) * sum of S outside the top-K of P

whatever gamma is, unless K decays by the block: gamma is a matter of speed. K = V writes on-policy, K = 1 with a greedy
teacher writes what that would have written, and the share of rejected tokens says where a student stands between them.

Where this leaves the released code, on purpose: K is counted on the teacher's raw distribution, because after a top-p of
0.5 most of the "25 likeliest" have probability 0; and the token that is judged is the one that is written (there it is
drawn a second time).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from kibitz.engines import OnReady, nobody_waits
from kibitz.engines.asked import Student, check_prompts, check_sampling, longest_text
from kibitz.engines.blocks import BlockDecoder, choose_block_decoder, rank
from kibitz.engines.cache import Decoder, prefill, switches
from kibitz.engines.sampling import row_seed, sample, uniforms
from kibitz.engines.torch import TorchEngine, evaluating
from kibitz.ledger import Count, uncounted
from kibitz.models.rotary import hold_rotations, holds_rotations
from kibitz.types import Prompt, Rollout, Sampling, Writer


def decayed_top_k(top_k: int, expected_blocks: int | None, block: int) -> int:
    """K of a response's block (from 0): with n = max(L // K, 1), less by max(ceil(K / L), 1) after blocks 0, n, 2n, ...
    and never below 1. L, `expected_seq_len` in the authors' code, counts blocks there and here."""
    if expected_blocks is None:
        return top_k
    every = max(expected_blocks // top_k, 1)
    step = max(-(-top_k // expected_blocks), 1)
    return max(top_k - step * -(-block // every), 1)


class SpeculativeEngine:
    """Rollouts that student and teacher write together; `Rollout.writer_T` says who wrote which token.

    `logp_T` is under the distribution that the token was drawn from, the student's or the teacher's: no importance ratio
    comes from it. `teacher_temperature` and `teacher_top_p` shape the teacher's draws and nothing else. The memory is
    that of two KV caches of `max_rows` rows, and of the teacher's logits, `max_rows` x `draft_tokens` x V.

    What the last `generate` cost: `num_drafted` tokens, each one position of the student and one of the teacher, and
    `num_forwards` passes of the teacher over blocks, a block of every row in one.
    """

    def __init__(
        self,
        student: Student,
        teacher: Student,
        top_k: int = 25,
        draft_tokens: int = 5,
        decay: int | None = None,
        max_rows: int = 256,
        teacher_temperature: float = 1.0,
        teacher_top_p: float = 1.0,
    ):
        for name, value in {"top_k": top_k, "draft_tokens": draft_tokens, "decay": decay}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, and is {value}")
        if student.vocab_size != teacher.vocab_size:
            raise ValueError(
                f"the teacher judges the student's token ids, and the vocabularies have {student.vocab_size} and "
                f"{teacher.vocab_size} tokens: choose a teacher of the student's family"
            )
        self.teacher, self.top_k, self.draft_tokens, self.decay = teacher, top_k, draft_tokens, decay
        self.teacher_sampling = Sampling(temperature=teacher_temperature, top_p=teacher_top_p)
        check_sampling(self.teacher_sampling)
        self.num_drafted = self.num_forwards = 0
        self.max_rows = max_rows
        self._writer = TorchEngine(student, max_rows)
        self._judge: BlockDecoder | None = None
        self._longest = 0  # the length up to which it was checked

    @property
    def student(self) -> Student:
        return self._writer.student

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, on_ready: OnReady = nobody_waits, count: Count = uncounted
    ) -> list[Rollout]:
        """The rollouts, prompt by prompt. `sampling` is the student's; its `max_tokens` and `stop_ids` hold for both."""
        check_sampling(sampling)
        check_prompts(prompts, sampling, self.student)
        self.num_drafted = self.num_forwards = 0
        if not prompts:
            return []
        jobs = [(prompt, index) for prompt in prompts for index in range(sampling.num_samples)]
        with torch.no_grad(), evaluating(self.student.model), evaluating(self.teacher.model):
            longest = longest_text(prompts, sampling)
            decoders = self._writer.decoder(longest), self._block_decoder(longest)
            rollouts = _Flight(self, decoders, jobs, sampling, on_ready).run()
        count(self.student, rollouts)
        count(self.teacher, rollouts)
        return rollouts

    def _block_decoder(self, longest: int) -> BlockDecoder:
        """The teacher's, checked on texts of up to `longest` tokens."""
        model, known = self.teacher.model, self._judge
        if known is None or switches(model, longest) != switches(model, min(longest, self._longest)):
            if not holds_rotations(model):
                hold_rotations(model, longest)
            known, self._longest = choose_block_decoder(model, self.teacher.vocab_size, longest), longest
        self._judge = known
        return known

    def sync(self, student: Student) -> None:
        """Nothing to copy: the engine reads the student's weights."""
        self._writer.sync(student)

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None: ...


# ------------------------------------------------------------------ rows in flight


@dataclass
class _Row:
    """A response in the making. Its last token is pending: written, and not yet read by either model."""

    job: int
    prompt: Prompt
    sample: int
    seed: int
    top_k: int
    num_blocks: int = 0
    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    writers: list[Writer] = field(default_factory=list)

    @property
    def pending(self) -> int:
        return self.ids[-1] if self.ids else self.prompt.ids[-1]

    @property
    def count(self) -> int:
        return len(self.ids)

    @property
    def position(self) -> int:
        """The position of the pending token, counted from the prompt's first."""
        return len(self.prompt.ids) + len(self.ids) - 1

    def write(self, ids: list[int], logps: list[float], writer: Writer) -> None:
        self.ids += ids
        self.logps += logps
        self.writers += [writer] * len(ids)


class _Draft(NamedTuple):
    """A block of every row. What the student read to write token i stands in column i, and is what the teacher reads to
    judge it. Where `real_NQ` is false, a row that drafts no more read its last token once again."""

    read_NQ: Tensor
    position_NQ: Tensor
    token_NQ: Tensor
    logp_NQ: Tensor
    real_NQ: Tensor


class _Verdict(NamedTuple):
    num_accepted_N: Tensor
    rejected_N: Tensor
    token_N: Tensor  # the teacher's, where a draft was rejected
    logp_N: Tensor


class _Flight:
    """The rows of one `generate`: row i of both decoders is `rows[i]`."""

    def __init__(
        self,
        engine: SpeculativeEngine,
        decoders: tuple[Decoder, BlockDecoder],
        jobs: list[tuple[Prompt, int]],
        sampling: Sampling,
        on_ready: OnReady,
    ):
        self.engine, self.jobs, self.sampling, self.on_ready = engine, jobs, sampling, on_ready
        self.writer, self.judge = decoders
        self.num_rows = min(engine.max_rows, len(jobs))
        self.num_slots = max(len(prompt.ids) for prompt, _ in jobs) + sampling.max_tokens
        self.device, self.teacher_device = engine.student.device, engine.teacher.device
        self.vocab_size = engine.student.vocab_size
        self.stop_1K = torch.tensor([sorted(sampling.stop_ids)], dtype=torch.long, device=self.device)
        self.waiting = iter(enumerate(jobs))
        self.rows: list[_Row] = []
        self.rollouts: dict[int, Rollout] = {}

    def run(self) -> list[Rollout]:
        self.writer.start(self.num_rows, self.num_slots)
        self.judge.start(self.num_rows, self.num_slots)
        try:
            while len(self.rollouts) < len(self.jobs):
                self.admit()
                draft = self.draft()
                self.write(draft, self.judged(draft))
                self.release()
        finally:
            self.writer.stop()
            self.judge.stop()
        return [self.rollouts[job] for job in range(len(self.jobs))]

    def admit(self) -> None:
        first = len(self.rows)
        for job, (prompt, index) in islice(self.waiting, self.num_rows - first):
            seed = row_seed(self.sampling.seed, prompt.key, index)
            self.rows.append(_Row(job, prompt, index, seed, self.engine.top_k))
        prefixes = [row.prompt.ids[:-1] for row in self.rows[first:]]
        prefill(self.writer, prefixes, first, self.device)
        prefill(self.judge, prefixes, first, self.teacher_device)

    def draft(self) -> _Draft:
        """Up to gamma tokens of every row; a row stops at a stop token and at the limit.

        The student's uniform number of a position is the one that `TorchEngine` uses there."""
        token_N, position_N = self._each("pending"), self._each("position")
        seed_N, count_N = self._each("seed"), self._each("count")
        left_N = self.sampling.max_tokens - count_N
        real_N, columns = left_N > 0, []
        num_steps = min(self.engine.draft_tokens, self.sampling.max_tokens - min(row.count for row in self.rows))
        for step in range(num_steps):
            logits_NV = self.writer.step(token_N, position_N, self._num_slots(step + 1))[:, : self.vocab_size]
            draft_N, logp_N = sample(logits_NV, uniforms(seed_N, count_N + step), self.sampling)
            columns.append((token_N, position_N, draft_N, logp_N, real_N))
            real_N = real_N & ~(draft_N[:, None] == self.stop_1K).any(1) & (left_N > step + 1)
            token_N, position_N = torch.where(real_N, draft_N, token_N), position_N + real_N
        draft = _Draft(*(torch.stack(column, dim=1) for column in zip(*columns, strict=True)))
        self._refuse_nan("student", draft.logp_NQ.sum(1))
        return draft

    def judged(self, draft: _Draft) -> _Verdict:
        """One forward pass of the teacher: which drafts pass, and its own token for the first that does not.

        P_(gamma+1) is not asked for, since nobody would draw from it."""
        draft = _Draft(*(part.to(self.teacher_device) for part in draft))
        num_drafted = draft.token_NQ.shape[1]
        logits_NQV = self.judge.block(draft.read_NQ, draft.position_NQ, self._num_slots(num_drafted))
        logits_NQV = logits_NQV[..., : self.vocab_size]
        seed_N, count_N, k_N = (self._each(name).to(self.teacher_device) for name in ("seed", "count", "top_k"))
        rejected_NQ = draft.real_NQ & (rank(logits_NQV, draft.token_NQ) >= k_N.clamp(max=self.vocab_size)[:, None])
        rejected_N = rejected_NQ.any(1)
        accepted_N = torch.where(rejected_N, rejected_NQ.int().argmax(1), draft.real_NQ.sum(1))
        place_N = accepted_N.clamp(max=num_drafted - 1)  # where all passed there is a draw too, and nobody looks at it
        logits_NV = logits_NQV[torch.arange(len(self.rows), device=self.teacher_device), place_N]
        # The teacher's uniform numbers have the counters -2, -3, ..., so that they are not those of rejected drafts.
        uniform_N = uniforms(seed_N, -2 - count_N - place_N)
        token_N, logp_N = sample(logits_NV, uniform_N, self.engine.teacher_sampling)
        self._refuse_nan("teacher", logp_N)
        return _Verdict(accepted_N, rejected_N, token_N, logp_N)

    def write(self, draft: _Draft, verdict: _Verdict) -> None:
        ids, logps = draft.token_NQ.tolist(), draft.logp_NQ.tolist()
        accepted, rejected, teacher_ids, teacher_logps = (part.tolist() for part in verdict)
        for i, row in enumerate(self.rows):
            row.write(ids[i][: accepted[i]], logps[i][: accepted[i]], Writer.STUDENT)
            if rejected[i]:
                row.write([teacher_ids[i]], [teacher_logps[i]], Writer.TEACHER)
            row.num_blocks += 1
            row.top_k = decayed_top_k(self.engine.top_k, self.engine.decay, row.num_blocks)
        self.engine.num_drafted += int(draft.real_NQ.sum())
        self.engine.num_forwards += 1

    def release(self) -> None:
        """Hand out the rollouts of finished rows, and close the gaps with the last live rows."""
        done = [i for i, row in enumerate(self.rows) if self._finished(row) or row.count == self.sampling.max_tokens]
        for i in done:
            row = self.rows[i]
            writer_T = torch.tensor(row.writers, dtype=torch.uint8)
            self.rollouts[row.job] = Rollout(
                row.prompt, row.ids, torch.tensor(row.logps), self._finished(row), sample=row.sample, writer_T=writer_T
            )
        self.on_ready([self.rollouts[self.rows[i].job] for i in done])
        kept, gone = len(self.rows) - len(done), set(done)
        targets = [i for i in done if i < kept]
        sources = [i for i in range(kept, len(self.rows)) if i not in gone]
        for source, target in zip(sources, targets, strict=True):
            self.rows[target] = self.rows[source]
        del self.rows[kept:]
        if targets:
            for decoder, device in ((self.writer, self.device), (self.judge, self.teacher_device)):
                decoder.move(torch.tensor(sources, device=device), torch.tensor(targets, device=device))

    def _finished(self, row: _Row) -> bool:
        return row.pending in self.sampling.stop_ids

    def _refuse_nan(self, who: str, logp_N: Tensor) -> None:
        for row in (~logp_N.isfinite()).nonzero():
            raise ValueError(
                f"the {who}'s logits were not finite at prompt {self.rows[int(row)].prompt.key!r}: its weights have "
                "diverged or overflow their dtype; lower the learning rate, clip gradients, or use bfloat16 or float32"
            )

    def _num_slots(self, num_read: int) -> int:
        """A bound of the slots in use when every row has read so many tokens more."""
        return min(max(row.position for row in self.rows) + num_read, self.num_slots)

    def _each(self, name: str) -> Tensor:
        return torch.tensor([getattr(row, name) for row in self.rows], dtype=torch.long, device=self.device)
