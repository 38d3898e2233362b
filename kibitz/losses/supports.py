"""Student and teacher on one support: the vocabulary, or K tokens with a tail bucket.

A truncated support always carries the tail: one more bucket that holds the rest of the probability. Without it the
reverse KL goes wrong in either of two ways: raw truncation pushes mass out of the support, and renormalising removes
all pressure on the mass outside, so that its gradient may point away from the true one (Many Faces of OPD, 2605.11182;
TA-OPD, 2608.14728). With the tail, the divergence is that of the two distributions after merging tokens, hence never
negative and never above the full one (data processing inequality).

All log-probabilities are float32 or wider and finite.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kibitz.logprobs import NOTHING, log1mexp
from kibitz.losses.checks import refuse_if
from kibitz.signals import Dense, TopK

TopKOf = Literal["student", "teacher", "union"]


class Buckets(NamedTuple):
    """Both distributions over K tokens and, last, the tail. `mass` is the probability of the K tokens together.

    A place that holds no token (a duplicate) is an empty bucket in both."""

    student_CS: Tensor
    teacher_CS: Tensor
    student_mass_C: Tensor
    teacher_mass_C: Tensor


def teacher_logits(signal: Dense, like_CV: Tensor) -> Tensor:
    """The teacher's logits, without a graph, checked against the student's `like_CV`."""
    with torch.no_grad():
        logits_CV = signal.head(signal.hidden_TD).to(like_CV)
    if logits_CV.shape[-1] != like_CV.shape[-1]:
        raise ValueError(
            f"The teacher scores {logits_CV.shape[-1]} tokens and the student {like_CV.shape[-1]}. Cut both to the "
            "tokenizer's size; if the tokenizers differ, use a method that aligns them."
        )
    _refuse_non_finite(logits_CV, "logits")
    return logits_CV


def top_k_buckets(student_CV: Tensor, teacher_CV: Tensor, token_C: Tensor, of: TopKOf, k: int) -> Buckets:
    """The `k` most likely tokens of the student, the teacher or both, the token that was written, and the tail.

    Both distributions are known in full, so the tail is summed, not got as 1 - sum: it is exact however small it is,
    and its gradient too. Ties go as `torch.topk` breaks them. Student top-k with its tail is close to the full reverse
    KL; teacher top-k suits the forward KL.
    """
    k = min(k, student_CV.shape[-1])
    chosen = [token_C.unsqueeze(-1)]
    if of in ("student", "union"):
        chosen.append(student_CV.detach().topk(k, dim=-1).indices)
    if of in ("teacher", "union"):
        chosen.append(teacher_CV.topk(k, dim=-1).indices)
    ids_CK = torch.cat(chosen, dim=-1).sort(dim=-1).values
    repeated_CK = _repeated(ids_CK)
    student_CS = torch.cat([_take(student_CV, ids_CK, repeated_CK), _rest(student_CV, ids_CK)], dim=-1)
    teacher_CS = torch.cat([_take(teacher_CV, ids_CK, repeated_CK), _rest(teacher_CV, ids_CK)], dim=-1)
    return _with_masses(student_CS, teacher_CS)


def signal_buckets(student_CV: Tensor, signal: TopK) -> Buckets:
    """The tokens that the teacher sent, and the tail. The student's temperature must be the signal's.

    The student's tail is exact, and so is the teacher's where the signal has it. Otherwise it is what is left of 1:
    log(1 - sum p) = log(-expm1(logsumexp)), and a tail below the precision of the numbers counts as that precision (1e-7 in
    float32).
    """
    ids_CK, order_CK = signal.ids_TK.long().sort(dim=-1)
    repeated_CK = _repeated(ids_CK)
    logp_CK = signal.logp_TK.detach().to(student_CV.dtype).gather(-1, order_CK)
    _refuse_non_finite(logp_CK, "log-probabilities")
    logp_CK = logp_CK.masked_fill(repeated_CK, NOTHING)
    log_mass_C1 = logp_CK.logsumexp(-1, keepdim=True)
    if log_mass_C1.numel():
        most = log_mass_C1.max()
        refuse_if(most > 0.05, lambda: ValueError(  # exp(0.05): room for rounding in bfloat16
            f"The teacher's top-k probabilities add up to {most.exp():.3g}. They must be natural "
            "log-probabilities over the whole vocabulary, not logits and not renormalised over the k tokens."
        ))  # fmt: skip
    tail_C1 = _told_rest(signal, log_mass_C1.squeeze(-1)).unsqueeze(-1)
    if logp_CK.shape[-1] >= student_CV.shape[-1]:
        everything_C1 = (~repeated_CK).sum(-1, keepdim=True) == student_CV.shape[-1]
        tail_C1 = tail_C1.masked_fill(everything_C1, NOTHING)
    student_CS = torch.cat([_take(student_CV, ids_CK, repeated_CK), _rest(student_CV, ids_CK)], dim=-1)
    return _with_masses(student_CS, torch.cat([logp_CK, tail_C1], dim=-1))


def most_likely_but_one(signal: TopK) -> TopK:
    """The K - 1 most likely of the K tokens that the teacher sent; a duplicate is the least likely of all.

    A server sends its top k and the sampled token, so that the tokens sent depend on the one sampled. A baseline must
    not: from what is left here, the sampled token is gone unless it was in the top k anyway."""
    logp_CK = signal.logp_TK.masked_fill(_repeated_unsorted(signal.ids_TK), NOTHING)
    best_CK, rest_C = logp_CK.topk(logp_CK.shape[-1] - 1, dim=-1).indices, signal.rest_logp_T
    if rest_C is not None:
        rest_C = torch.logaddexp(rest_C, logp_CK.amin(-1))
    best, logp = signal.ids_TK.gather(-1, best_CK), logp_CK.gather(-1, best_CK)
    return TopK(best, logp, signal.temperature, rest_logp_T=rest_C)


def find_token(signal: TopK, token_C: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher's log-probability of each written token, and whether it was among the K that the teacher sent.

    Where it was not, the value is that of the tail bucket: the most that it can be."""
    here_CK = signal.ids_TK == token_C.unsqueeze(-1)
    logp_CK = signal.logp_TK.float()
    found_C = here_CK.any(-1)
    logp_C = logp_CK.masked_fill(~here_CK, -torch.inf).amax(-1)
    log_mass_C = logp_CK.masked_fill(_repeated_unsorted(signal.ids_TK), NOTHING).logsumexp(-1)
    return torch.where(found_C, logp_C, _told_rest(signal, log_mass_C)), found_C


def _told_rest(signal: TopK, log_mass_C: Tensor) -> Tensor:
    """The log-probability of the tokens that were not sent: as it was told, else by `rest_of`."""
    return rest_of(log_mass_C) if signal.rest_logp_T is None else signal.rest_logp_T.detach().to(log_mass_C.dtype)


def rest_of(log_mass: Tensor) -> Tensor:
    """log(1 - mass), at least the precision of the numbers."""
    return log1mexp(log_mass.clamp(max=-torch.finfo(log_mass.dtype).eps))


def rest_beside(logp_CV: Tensor, ids_CK: Tensor) -> Tensor:
    """log of the probability of all tokens but these, `[C]`, summed: exact however small it is. With none left it is nothing,
    and has no gradient."""
    return logp_CV.scatter(-1, ids_CK, NOTHING).logsumexp(-1)


def _take(logp_CV: Tensor, ids_CK: Tensor, repeated_CK: Tensor) -> Tensor:
    return logp_CV.gather(-1, ids_CK).masked_fill(repeated_CK, NOTHING)


def _rest(logp_CV: Tensor, ids_CK: Tensor) -> Tensor:
    return rest_beside(logp_CV, ids_CK).unsqueeze(-1)


def _repeated(sorted_ids_CK: Tensor) -> Tensor:
    """True where an id stands a second time."""
    repeated_CK = torch.zeros_like(sorted_ids_CK, dtype=torch.bool)
    repeated_CK[..., 1:] = sorted_ids_CK[..., 1:] == sorted_ids_CK[..., :-1]
    return repeated_CK


def _repeated_unsorted(ids_CK: Tensor) -> Tensor:
    sorted_CK, order_CK = ids_CK.sort(dim=-1, stable=True)
    return torch.zeros_like(ids_CK, dtype=torch.bool).scatter(-1, order_CK, _repeated(sorted_CK))


def _with_masses(student_CS: Tensor, teacher_CS: Tensor) -> Buckets:
    masses = [-torch.expm1(logp_CS[..., -1].detach()) for logp_CS in (student_CS, teacher_CS)]
    return Buckets(student_CS, teacher_CS, *masses)


def _refuse_non_finite(values: Tensor, what: str) -> None:
    # The sum is finite only if every number is, and needs no mask as large as the logits.
    refuse_if(~torch.isfinite(values.sum()), lambda: ValueError(
        f"The teacher's {what} hold NaN or infinite numbers. Tokens that it rules out need a very negative finite "
        "value; rows of a padded vocabulary must be cut off; NaN often means float16 overflow: load it in bfloat16."
    ))  # fmt: skip
