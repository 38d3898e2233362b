"""Losses on spans: the same stretch of text in the tokens of two vocabularies (see `kibitz.teachers.alignment`).

The span advantage needs nothing of its own: it is the policy gradient, given the two log-probabilities of a span. The
losses here go by gradients through the student's probability of a span. Each is given once per span; criteria share it
equally among the span's tokens. `_S` is one entry per span; teachers carry no gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kibitz.logprobs import gather_tokens, log1mexp, log_probs
from kibitz.signals import FirstTokens, Spans, Tokens

CERTAIN = -1e-6
"""A span's log-probability is kept below this (ALM's epsilon), where the log of its complement is still finite."""


def span_sums(value_C: Tensor, spans: Spans) -> Tensor:
    """`[C]`: at each token the sum over the tokens of its span; whole spans only."""
    index_C = _places(spans)
    num = int(index_C[-1]) + 1 if len(index_C) else 0
    return value_C.new_zeros(num).index_add(0, index_C, value_C)[index_C]


def _places(spans: Spans) -> Tensor:
    return torch.unique_consecutive(spans.span_T, return_inverse=True)[1]


def _is_first(spans: Spans) -> Tensor:
    """`[C]`: whether a token is the first of its span."""
    return torch.cat([torch.ones_like(spans.span_T[:1], dtype=torch.bool), spans.span_T[1:] != spans.span_T[:-1]])


# ------------------------------------------------------------------------------------------------------- formulas


def alm(student_S: Tensor, teacher_S: Tensor, tau: float | None = 100.0) -> Tensor:
    """Approximate likelihood matching (2503.20083): the KL of two coins, "this span" against anything else,

        tau KL(T^(1/tau) || S^(1/tau)),   KL(t || s) = t log(t / s) + (1 - t) log((1 - t) / (1 - s))

    and its limit for tau = None: log T - log S + log T (log(-log S) - log(-log T)).

    The paper's loss is the cross-entropy; less the coin's entropy, and times tau, it is zero for equals, has a limit, and
    tau does not change the learning rate."""
    student_S, teacher_S = student_S.clamp(max=CERTAIN), teacher_S.detach().clamp(max=CERTAIN)
    if tau is None:
        return teacher_S - student_S + teacher_S * (torch.log(-student_S) - torch.log(-teacher_S))
    student_S, teacher_S = student_S.double() / tau, teacher_S.double() / tau
    rest_of_student_S, rest_of_teacher_S = log1mexp(student_S), log1mexp(teacher_S)
    share_S = teacher_S.exp()
    kl_S = share_S * (teacher_S - student_S) - torch.expm1(teacher_S) * (rest_of_teacher_S - rest_of_student_S)
    return tau * kl_S


def sorted_l1(student_SV: Tensor, teacher_SU: Tensor) -> Tensor:
    """ULD (2402.12030): sum_i |sort(S)_i - sort(T)_i| over the probabilities, the shorter one filled up with zeros. Which
    token has which probability does not count."""
    student, teacher = (logp.exp().sort(dim=-1, descending=True).values for logp in (student_SV, teacher_SU.detach()))
    common = min(student.shape[-1], teacher.shape[-1])
    rest = student[..., common:].sum(-1) + teacher[..., common:].sum(-1)
    return (student[..., :common] - teacher[..., :common]).abs().sum(-1) + rest


def merged(
    student_SV: Tensor,
    teacher_SU: Tensor,
    shared: tuple[Tensor, Tensor],
    divergence: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """GOLD's hybrid loss (TRL 1.x): w divergence(S, T) on the M tokens that mean the same in both vocabularies and
    (1 - w) ULD on the others, w = M / V.

    The inputs are log-probabilities of a span's first token times that of the later ones which were written, so that they
    do not add up to 1; the divergences of kibitz are defined for those too. One vocabulary: the divergence itself."""
    ours, theirs = shared
    weight = len(ours) / student_SV.shape[-1]
    value_S = student_SV.new_zeros(len(student_SV))
    if weight > 0:
        value_S = value_S + weight * divergence(student_SV[:, ours], teacher_SU[:, theirs])
    if weight < 1:
        value_S = value_S + (1 - weight) * sorted_l1(_others(student_SV, ours), _others(teacher_SU, theirs))
    return value_S


def _others(logp_SV: Tensor, ids: Tensor) -> Tensor:
    keep = torch.ones(logp_SV.shape[-1], dtype=torch.bool, device=logp_SV.device)
    keep[ids] = False
    return logp_SV[:, keep]


# ------------------------------------------------------------------------------------------------------- criteria


@dataclass(frozen=True)
class SpanLikelihood:
    """`alm` of the student's and the teacher's probability of each span."""

    tau: float | None = 100.0

    def __call__(self, logits_CV: Tensor, tokens: Tokens) -> Tensor:
        spans = _spans(tokens)
        student_C = span_sums(gather_tokens(log_probs(logits_CV), tokens.token_T), spans)
        loss_C = alm(student_C, spans.teacher_logp_T.to(student_C), self.tau).to(student_C)
        return loss_C / spans.size_T


@dataclass(frozen=True)
class MergedDistributions:
    """`merged`, or with no divergence `sorted_l1`, of the distributions over each span's first token times the probability
    of the later tokens as they were written.

    Position t of either model scores its token t+1: the first distribution is the one that the first token was drawn
    from. TRL's "observed" merge takes the one after it."""

    divergence: Callable[[Tensor, Tensor], Tensor] | None

    def __call__(self, logits_CV: Tensor, tokens: Tokens) -> Tensor:
        spans = _spans(tokens)
        first = spans.first
        assert isinstance(first, FirstTokens), "the teacher was asked for spans without distributions"
        student_CV, first_C = log_probs(logits_CV), _is_first(spans)
        later_C = torch.where(first_C, 0.0, gather_tokens(student_CV, tokens.token_T))
        student_SV = student_CV[first_C] + span_sums(later_C, spans)[first_C, None]
        with torch.no_grad():
            hidden_TD = first.dense.hidden_TD  # on the CPU, if they wait there
            teacher_SU = log_probs(first.dense.head(hidden_TD[first_C.to(hidden_TD.device)]).to(student_SV))
            teacher_SU = teacher_SU + first.rest_logp_T[first_C, None].to(student_SV)
        if self.divergence is None:
            loss_S = sorted_l1(student_SV, teacher_SU)
        else:
            loss_S = merged(student_SV, teacher_SU, first.shared, self.divergence)
        return loss_S[_places(spans)] / spans.size_T


def _spans(tokens: Tokens) -> Spans:
    if not isinstance(tokens.signal, Spans):
        raise ValueError(
            f"This loss is of spans, and the teacher's signal is {type(tokens.signal).__name__}: "
            "write teacher.tokenizer=own."
        )
    return tokens.signal
