"""A teacher with a tokenizer of its own: it reads the student's text in its own tokens, and scores span by span.

It reads the prompt as its own chat template renders it, so that only the response is ever compared; the templates' tokens
are nobody's to learn. Its score is of one way to cut the text into tokens, its own, not of all ways: less than the
probability of the text, by little for the usual tokenizers.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kibitz.config import SignalKind
from kibitz.data import encode_prompt
from kibitz.signals import Dense, FirstTokens, Sampled, Signal, Spans
from kibitz.teachers import MakeEngine, ScoreRequest, Teacher
from kibitz.teachers.alignment import Aligner, Span
from kibitz.teachers.local import reduced
from kibitz.types import Prompt, Rollout

KINDS: tuple[SignalKind, ...] = ("spans", "span_distributions")
MANY_INCOMPARABLE = 0.1
"""Of the response tokens: beyond this somebody should know."""


@dataclass
class Coverage:
    """Counts the response tokens, and those that the teacher could not score."""

    tokens: int = 0
    incomparable: int = 0

    def add(self, rollouts: Sequence[Rollout], signals: Sequence[Spans]) -> None:
        tokens, incomparable = (
            sum(r.num_tokens for r in rollouts),
            sum(int((s.comparable_T == 0).sum()) for s in signals),
        )
        if incomparable > MANY_INCOMPARABLE * tokens:
            warnings.warn(
                f"{incomparable} of {tokens} response tokens cannot be compared with what the teacher reads, and are not learnt: "
                "the two tokenizers do not agree on the text itself (case, accents, unknown characters, special tokens)",
                stacklevel=2,
            )
        self.tokens, self.incomparable = self.tokens + tokens, self.incomparable + incomparable

    def take(self) -> dict[str, float]:
        row = {"unaligned": self.incomparable / self.tokens} if self.tokens else {}
        self.tokens = self.incomparable = 0
        return row


@dataclass(frozen=True)
class Reader:
    """Turns the student's rollouts into the teacher's, and keeps them as long as the same ones are asked for."""

    aligner: Aligner
    template: dict[str, Any]
    last: dict[int, tuple[Rollout, Rollout, list[Span]]] = field(default_factory=dict)

    def __call__(self, rollouts: Sequence[Rollout]) -> list[tuple[Rollout, list[Span]]]:
        kept = {id(r): found for r in rollouts if (found := self.last.get(id(r))) is not None and found[0] is r}
        self.last.clear()
        self.last.update({id(r): kept.get(id(r)) or (r, *self._read(r)) for r in rollouts})
        return [self.last[id(r)][1:] for r in rollouts]

    def prompt(self, prompt: Prompt) -> Prompt:
        messages = prompt.messages or ({"role": "user", "content": prompt.text},)
        ids = encode_prompt(self.aligner.teacher, [dict(message) for message in messages], self.template, prompt.tools)
        return replace(prompt, ids=tuple(ids))

    def _read(self, rollout: Rollout) -> tuple[Rollout, list[Span]]:
        """A response of which the teacher reads nothing is its EOS to it, whose score nobody asks for."""
        alignment = self.aligner.align(rollout.response_ids, rollout.finished)
        ids = alignment.teacher_ids or [self.aligner.teacher.eos_token_id]
        read = Rollout(self.prompt(rollout.prompt), ids, torch.zeros(len(ids)), rollout.finished)
        return read, alignment.spans


def aligned(teacher: Teacher, aligner: Aligner, template: dict[str, Any]) -> Teacher:
    """`teacher` for a student with another tokenizer; `template` are the arguments of its chat template. It writes nothing:
    its tokens are not the student's."""
    reader, coverage = Reader(aligner, template), Coverage()

    def refuse(make: MakeEngine):
        raise ValueError("a teacher with its own tokenizer cannot write in the student's: drop what it is to write")

    scorer = partial(SpanScorer, teacher, reader, coverage)
    return replace(
        teacher,
        kinds=KINDS,
        scorer=scorer,
        examiner=scorer,
        writer=refuse,
        check=lambda prompts, max_tokens: teacher.check([reader.prompt(prompt) for prompt in prompts], 1),
        metrics=lambda: teacher.metrics() | coverage.take(),
    )


@dataclass(frozen=True)
class SpanScorer:
    teacher: Teacher
    reader: Reader
    coverage: Coverage
    request: ScoreRequest

    @torch.no_grad()
    def score(self, rollouts: Sequence[Rollout]) -> list[Signal]:
        read = self.reader(rollouts)
        longest = max((r for r, _ in read), key=lambda r: len(r.prompt.ids) + r.num_tokens)
        self.teacher.check([longest.prompt], longest.num_tokens)
        inner = replace(self.request, kind="dense" if self.request.kind == "span_distributions" else "sampled")
        signals = self.teacher.scorer(inner).score([r for r, _ in read])
        spans = [
            self._of_spans(rollout, theirs, cut, signal)
            for rollout, (theirs, cut), signal in zip(rollouts, read, signals, strict=True)
        ]
        self.coverage.add(rollouts, spans)
        return [*spans]

    def _of_spans(self, rollout: Rollout, theirs: Rollout, spans: list[Span], signal: Signal) -> Spans:
        dense = signal if isinstance(signal, Dense) else None
        if dense is not None:
            token_T = torch.tensor(theirs.response_ids, device=dense.hidden_TD.device)
            signal = reduced(dense, token_T, replace(self.request, kind="sampled"), self.request.tokens_per_micro_batch)
        assert isinstance(signal, Sampled)
        device = signal.logp_T.device
        place_T = torch.repeat_interleave(torch.tensor([span.num_student for span in spans])).to(device)
        student_S = _sums(rollout.logp_T.to(device), [span.student for span in spans])
        teacher_S = _sums(signal.logp_T, [span.teacher for span in spans])
        comparable_S = torch.tensor([span.comparable and _one_writer(rollout, span) for span in spans], device=device)
        first = None
        if dense is not None:
            first_S = torch.tensor([min(span.teacher[0], theirs.num_tokens - 1) for span in spans], device=device)
            rest_S = torch.where(comparable_S, teacher_S - signal.logp_T[first_S], 0.0)
            ours, its = (torch.tensor(ids, device=device) for ids in self.reader.aligner.shared_ids)
            begins = dense[first_S[place_T].to(dense.hidden_TD.device)]
            first = FirstTokens(begins, rest_S[place_T], (ours, its))
        return Spans(
            span_T=place_T,
            size_T=torch.tensor([float(span.num_student) for span in spans], device=device)[place_T],
            bytes_T=torch.tensor([float(span.num_bytes) for span in spans], device=device)[place_T],
            teacher_logp_T=torch.where(comparable_S, teacher_S, student_S)[place_T],
            student_logp_T=student_S[place_T],
            comparable_T=comparable_S.float()[place_T],
            first=first,
        )


def _sums(logp_T: Tensor, parts: Sequence[tuple[int, int]]) -> Tensor:
    """Return the sum of each stretch of tokens, `[S]`; parts follow each other and may be empty."""
    index_T = torch.repeat_interleave(torch.tensor([end - start for start, end in parts])).to(logp_T.device)
    return logp_T.new_zeros(len(parts)).index_add(0, index_T, logp_T[: len(index_T)])


def _one_writer(rollout: Rollout, span: Span) -> bool:
    return rollout.writer_T is None or len(rollout.writer_T[slice(*span.student)].unique()) == 1
