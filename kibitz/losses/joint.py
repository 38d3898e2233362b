"""Criteria that join others: a second loss on the same tokens, in the same pass over the logits."""

from dataclasses import dataclass

from torch import Tensor

from kibitz.logprobs import gather_tokens, log_probs, reverse_kl_of_logits
from kibitz.losses import policy_gradient
from kibitz.losses.chunked import Criterion
from kibitz.losses.supports import teacher_logits
from kibitz.signals import Deferred, Dense, Sampled, Signal, Tokens


@dataclass(frozen=True)
class Sum:
    """Both losses, and the values of both; `second` may say no more than its loss."""

    first: Criterion
    second: Criterion

    def __call__(self, logits_CV: Tensor, tokens: Tokens) -> dict[str, Tensor]:
        first, second = self.first(logits_CV, tokens), self.second(logits_CV, tokens)
        return first | second | {"loss": first["loss"] + second["loss"]}


def anchor_kl(logits_CV: Tensor, tokens: Tokens) -> dict[str, Tensor]:
    """The anchor's coefficient times KL(S || R)."""
    assert tokens.anchor is not None
    kl_C = exact_reverse_kl(logits_CV, tokens.anchor.signal)
    return {"loss": tokens.anchor.coefficient * kl_C, "reference_kl": kl_C}


def single_step(logits_CV: Tensor, tokens: Tokens) -> dict[str, Tensor]:
    """sum_v S(v) (log S(v) - log T(v)): a token's own part of MiniLLM's gradient (2306.08543), without sampling noise."""
    assert tokens.signal is not None
    return {"loss": exact_reverse_kl(logits_CV, tokens.signal)}


def sampled_reverse_kl(logits_CV: Tensor, tokens: Tokens) -> dict[str, Tensor]:
    """c_t (log S - log T)^2 / 2 on the written token, c_t = `tokens.numbers["kl_coef"]`: k2, whose gradient is that of the
    reverse KL on text that the student samples (KDRL, 2506.02208)."""
    assert isinstance(tokens.signal, Sampled)
    logp_C = gather_tokens(log_probs(logits_CV), tokens.token_T)
    k2_C = policy_gradient.k2(logp_C, tokens.signal.logp_T.to(logp_C.dtype))
    return {"loss": tokens.numbers["kl_coef"] * k2_C}


def exact_reverse_kl(logits_CV: Tensor, signal: Signal | Deferred) -> Tensor:
    """KL(S || T) over the vocabulary, at temperature 1."""
    assert isinstance(signal, Dense)
    return reverse_kl_of_logits(logits_CV, log_probs(teacher_logits(signal, logits_CV)))[0]
