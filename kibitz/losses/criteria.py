"""Criteria for `over_chunks`: logits and tokens in, the loss and the metrics of each token out.

A criterion composes the parts: a support, a divergence or a policy loss, a temperature. Metrics are detached and at
temperature 1, and bear the same name whatever the loss: a run is judged by `reverse_kl` even where it trains another.

What costs another pass over the vocabulary (entropies, the overlap of the top K, a KL that is not the loss) is computed for
`tokens.sample` alone: `[M]`, where the other values are `[C]`. That sample is all tokens wherever a value of each is needed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kibitz.logprobs import gather_tokens, log_probs, reverse_kl_of_logits
from kibitz.losses import policy_gradient
from kibitz.losses.checks import refuse_if
from kibitz.losses.divergences import entropy, reverse_kl
from kibitz.losses.overlap import top_k_overlap
from kibitz.losses.spans import span_sums
from kibitz.losses.supports import (
    Buckets,
    find_token,
    most_likely_but_one,
    signal_buckets,
    teacher_logits,
    top_k_buckets,
)
from kibitz.signals import Dense, Sampled, Signal, Spans, Tokens, TopK

PolicyLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logp_C with gradient, sampled_logp_C, advantage_C) -> [C]"""


@dataclass(frozen=True)
class CrossEntropy:
    """-log S(token): supervised fine-tuning on the text as it stands, whoever wrote it."""

    def __call__(self, logits_CV: Tensor, tokens: Tokens) -> dict[str, Tensor]:
        student_CV = log_probs(logits_CV)
        logp_C = gather_tokens(student_CV, tokens.token_T)
        return {"loss": -logp_C} | _student_metrics(student_CV.detach(), tokens)


@dataclass(frozen=True)
class Divergence:
    """tau^2 fn(S, T), both at temperature tau, on the full vocabulary or on the top k of one of them with the tail.

    `fn` is any function (student_CS, teacher_CS) -> [C] of log-probabilities: one of `DIVERGENCES`, with its options
    bound by `functools.partial`, or your own; the teacher carries no gradient. tau is the loss temperature and has
    nothing to do with the one that the rollouts were sampled at; tau^2 keeps the gradient's size (Hinton, 1503.02531).

    The signal must be able to answer: `Dense` gives every support, `TopK` only "teacher" at the signal's own
    temperature, `Sampled` none.
    """

    fn: Callable[[Tensor, Tensor], Tensor] = reverse_kl
    support: Literal["full", "student", "teacher", "union"] = "full"
    top_k: int = 32
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.support not in ("full", "student", "teacher", "union"):
            raise ValueError(f"Unknown support {self.support!r}: write full, student, teacher or union.")
        if self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1.")
        if self.temperature <= 0:
            raise ValueError(f"The loss temperature is {self.temperature}; it must be above 0.")

    def __call__(self, logits_CV: Tensor, tokens: Tokens) -> dict[str, Tensor]:
        if self._is_reverse_kl() and isinstance(tokens.signal, Dense):
            teacher_CV = log_probs(teacher_logits(tokens.signal, logits_CV))
            loss_C, student_CV = reverse_kl_of_logits(logits_CV, teacher_CV)
            return {"loss": loss_C} | _dense_metrics(student_CV, teacher_CV, tokens, loss_C.detach())
        student_CV = log_probs(logits_CV, self.temperature)
        masses: dict[str, Tensor] = {}
        match tokens.signal:
            case Dense() as signal:
                teacher_logits_CV = teacher_logits(signal, logits_CV)
                teacher_CV = log_probs(teacher_logits_CV, self.temperature)
                if self.support == "full":
                    loss_C = self.fn(student_CV, teacher_CV)
                else:
                    buckets = top_k_buckets(student_CV, teacher_CV, tokens.token_T, self.support, self.top_k)
                    loss_C, masses = self.fn(buckets.student_CS, buckets.teacher_CS), _masses(buckets)
                plain_CV = self._at_one(student_CV, logits_CV), self._at_one(teacher_CV, teacher_logits_CV)
                metrics = _dense_metrics(*plain_CV, tokens)
            case TopK() as signal:
                self._refuse(signal)
                buckets = signal_buckets(student_CV, signal)
                loss_C, masses = self.fn(buckets.student_CS, buckets.teacher_CS), _masses(buckets)
                metrics = _student_metrics(self._at_one(student_CV, logits_CV), tokens) | _signal_metrics(
                    student_CV.detach(), tokens, signal
                )
            case signal:
                raise ValueError(
                    f"A divergence needs the teacher's distribution, and the signal is {type(signal).__name__}. Use a "
                    "local teacher, or one that sends its top k, or the policy gradient of the sampled token."
                )
        return {"loss": self.temperature**2 * loss_C} | metrics | masses

    def _is_reverse_kl(self) -> bool:
        return self.fn is reverse_kl and self.support == "full" and self.temperature == 1.0

    def _at_one(self, logp_CV: Tensor, logits_CV: Tensor) -> Tensor:
        """The log-probabilities at temperature 1, detached; `logp_CV` are those at the loss temperature."""
        return logp_CV.detach() if self.temperature == 1.0 else log_probs(logits_CV.detach())

    def _refuse(self, signal: TopK) -> None:
        if self.support != "teacher" and not signal.named:
            raise ValueError(
                f"The teacher sends its own top {signal.ids_TK.shape[-1]} tokens, and the support is {self.support!r}: "
                "write support: teacher, or use a teacher whose hidden states are at hand."
            )
        if signal.temperature != self.temperature:
            raise ValueError(
                f"The teacher's log-probabilities are at temperature {signal.temperature} and the loss is at "
                f"{self.temperature}. Top-k log-probabilities cannot be changed to another: make the two equal."
            )


@dataclass(frozen=True)
class PolicyGradient:
    """loss(log S, log S_sampled, A) on the sampled token: rewards, distillation, or both at once.

        A = A_given + clip(c (log T - log S_sampled) + c KL(S || T))

    A_given is `tokens.advantage_T`, where there is one; the rest is there when the teacher's signal is and the
    coefficient c is not 0. The KL is the vOPD baseline: it needs `Dense` or `TopK`. Only the distillation part is
    clipped, with its baseline, because a mean cut off afterwards is no longer the mean.

    `temperature` is the one that the rollouts were sampled at, so that the ratio compares like with like; a `Dense`
    teacher is taken at it too. Credit over later tokens needs whole sequences: put it into `advantage_T` with
    `discounted`, and set c to 0.

    `mismatch` is |log S - log S_sampled|: at the first step on fresh rollouts, what engine and trainer disagree by.
    """

    loss: PolicyLoss = policy_gradient.sampled_token
    coefficient: float = 1.0
    baseline: bool = False
    advantage_clip: tuple[float, float] | None = None
    temperature: float = 1.0

    def __call__(self, logits_CV: Tensor, tokens: Tokens) -> dict[str, Tensor]:
        student_CV = log_probs(logits_CV, self.temperature)
        logp_C = gather_tokens(student_CV, tokens.token_T)
        advantage_C, metrics = self._advantage(student_CV.detach(), logits_CV.detach(), tokens)
        loss_C = self.loss(logp_C, tokens.logp_T, advantage_C)
        with torch.no_grad():
            metrics["ratio"] = policy_gradient.importance_ratio(logp_C, tokens.logp_T)
            metrics["mismatch"] = (logp_C - tokens.logp_T).abs()
            uncorrected_C = policy_gradient.sampled_token(logp_C, tokens.logp_T, advantage_C)
            metrics["ratio_clipped"] = (loss_C != uncorrected_C).to(loss_C.dtype)
        return {"loss": loss_C, "advantage": advantage_C} | metrics

    def _advantage(self, student_CV: Tensor, logits_CV: Tensor, tokens: Tokens) -> tuple[Tensor, dict[str, Tensor]]:
        plain_CV = student_CV if self.temperature == 1.0 else log_probs(logits_CV)
        signal, given_C = tokens.signal, tokens.advantage_T
        if signal is None or self.coefficient == 0.0:
            if given_C is None:
                raise ValueError("The policy gradient has neither an advantage nor a teacher's signal to learn from.")
            if signal is None:
                return given_C, _student_metrics(plain_CV, tokens)
            return given_C, self._scores(student_CV, plain_CV, tokens, signal)[2]
        teacher_C, kl_C, metrics = self._scores(student_CV, plain_CV, tokens, signal)
        sampled_C = tokens.logp_T
        if isinstance(signal, Spans):  # the joint probability of a span is what all of its tokens are credited with
            sampled_C, teacher_C = signal.student_logp_T, signal.teacher_logp_T
        distilled_C = policy_gradient.distillation_advantage(sampled_C, teacher_C, self.coefficient)
        if self.baseline:
            if kl_C is None:
                raise ValueError("The vOPD baseline needs the teacher's distribution; it sent the sampled token only.")
            distilled_C = policy_gradient.with_baseline(distilled_C, kl_C, self.coefficient)
        if self.advantage_clip is not None:
            distilled_C, metrics["advantage_clipped"] = policy_gradient.clipped(distilled_C, *self.advantage_clip)
        return (distilled_C if given_C is None else given_C + distilled_C), metrics

    def _scores(
        self, student_CV: Tensor, plain_CV: Tensor, tokens: Tokens, signal: Signal
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """The teacher's log-probability of each token, the reverse KL of each if the baseline needs it and it can be had, and the
        metrics."""
        kl_C = None
        match signal:
            case Dense():
                logits_CV = teacher_logits(signal, plain_CV)
                teacher_CV = log_probs(logits_CV, self.temperature)
                if self.baseline:
                    kl_C = reverse_kl(student_CV, teacher_CV)
                at_one = self.temperature == 1.0
                at_one_CV = teacher_CV if at_one else log_probs(logits_CV)
                metrics = _dense_metrics(plain_CV, at_one_CV, tokens, kl_C if at_one else None)
                return gather_tokens(teacher_CV, tokens.token_T), kl_C, metrics
            case TopK():
                if signal.temperature != self.temperature:
                    raise ValueError(
                        f"The rollouts were sampled at temperature {self.temperature} and the teacher's "
                        f"log-probabilities are at {signal.temperature}: make the two equal."
                    )
                metrics = _student_metrics(plain_CV, tokens) | _signal_metrics(student_CV, tokens, signal)
                if self.coefficient != 0.0:
                    refuse_if(~find_token(signal, tokens.token_T)[1].all(), lambda: ValueError(
                        "The teacher's top k lacks tokens that were sampled. Ask it for the sampled token's "
                        "log-probability as well (a server's prompt log-probabilities hold it)."
                    ))  # fmt: skip
                if self.baseline:
                    buckets = signal_buckets(student_CV, most_likely_but_one(signal))
                    kl_C = reverse_kl(buckets.student_CS, buckets.teacher_CS)
                return metrics["teacher_logp"], kl_C, metrics
            case Sampled() | Spans():
                metrics = _student_metrics(plain_CV, tokens) | _signal_metrics(student_CV, tokens, signal)
                return metrics["teacher_logp"], None, metrics


@dataclass(frozen=True)
class SpanLoss:
    """A loss of `kibitz.losses.spans`, with the metrics that a teacher with another tokenizer leaves."""

    loss: Callable[[Tensor, Tokens], Tensor]

    def __call__(self, logits_CV: Tensor, tokens: Tokens) -> dict[str, Tensor]:
        return ReverseKL()(logits_CV.detach(), tokens) | {"loss": self.loss(logits_CV, tokens)}


@dataclass(frozen=True)
class ReverseKL:
    """The metrics of any signal, its `reverse_kl` as the loss: what evaluation reports, and nobody learns from."""

    def __call__(self, logits_CV: Tensor, tokens: Tokens) -> dict[str, Tensor]:
        student_CV = log_probs(logits_CV)
        match tokens.signal:
            case Dense() as signal:
                metrics = _dense_metrics(student_CV, log_probs(teacher_logits(signal, logits_CV)), tokens)
            case TopK() | Sampled() | Spans() as signal:
                metrics = _student_metrics(student_CV, tokens) | _signal_metrics(student_CV, tokens, signal)
            case None:
                raise ValueError("There is no teacher's signal to measure the student against.")
        return {"loss": metrics["reverse_kl"]} | metrics


# -------------------------------------------------------------------------------------------------------- metrics


@torch.no_grad()
def _student_metrics(student_CV: Tensor, tokens: Tokens) -> dict[str, Tensor]:
    logp_C = gather_tokens(student_CV, tokens.token_T)
    return {"student_entropy": entropy(student_CV[tokens.sample]), "student_logp": logp_C}


@torch.no_grad()
def _dense_metrics(
    student_CV: Tensor, teacher_CV: Tensor, tokens: Tokens, kl_C: Tensor | None = None
) -> dict[str, Tensor]:
    """`kl_C` is the reverse KL of each token, if it was computed for the loss."""
    student_MV, teacher_MV = student_CV[tokens.sample], teacher_CV[tokens.sample]
    overlap = top_k_overlap(student_MV, teacher_MV)
    return _student_metrics(student_CV, tokens) | {
        "top_k_overlap": overlap.share_C,
        "overlap_mass": overlap.student_mass_C,
        "teacher_entropy": entropy(teacher_MV),
        "teacher_logp": gather_tokens(teacher_CV, tokens.token_T),
        "reverse_kl": reverse_kl(student_MV, teacher_MV) if kl_C is None else kl_C,
    }


@torch.no_grad()
def _signal_metrics(student_CV: Tensor, tokens: Tokens, signal: TopK | Sampled | Spans) -> dict[str, Tensor]:
    """`reverse_kl` is a lower bound from K tokens and the tail, or the k3 estimate from the sampled token or span, whose
    tokens share it equally; all at the temperature of the teacher's numbers."""
    if isinstance(signal, TopK):
        buckets = signal_buckets(student_CV[tokens.sample], signal[tokens.sample])
        logp_C = find_token(signal, tokens.token_T)[0].to(student_CV.dtype)
        return {"teacher_logp": logp_C, "reverse_kl": reverse_kl(buckets.student_CS, buckets.teacher_CS)}
    student_C, size = gather_tokens(student_CV, tokens.token_T), 1.0
    if isinstance(signal, Spans):
        student_C, size = span_sums(student_C, signal), signal.size_T
        heard_C = signal.comparable_T > 0
        teacher_C = torch.where(heard_C, signal.teacher_logp_T.to(student_CV.dtype), student_C)
    else:
        teacher_C = signal.logp_T.to(student_CV.dtype)
    refuse_if(~torch.isfinite(teacher_C.sum()), lambda: ValueError(
        "The teacher's log-probabilities of the sampled tokens hold NaN or -inf: it gives one of them probability "
        "zero. Score without top-p or top-k on the teacher's side, and check that both use the same tokenizer."
    ))  # fmt: skip
    return {"teacher_logp": teacher_C / size, "reverse_kl": policy_gradient.k3(student_C, teacher_C) / size}


@torch.no_grad()
def likeliest(signal: Signal, num: int) -> tuple[Tensor, Tensor]:
    """The teacher's likeliest tokens at each position and their log-probabilities `[C, num]`, as many as it told."""
    match signal:
        case Dense(hidden_CD, head):
            logp_CV = log_probs(head(hidden_CD).float())
            best = logp_CV.topk(min(num, logp_CV.shape[-1]), dim=-1)
            return best.indices, best.values
        case TopK(ids_CK, logp_CK):
            best = logp_CK.topk(min(num, logp_CK.shape[-1]), dim=-1)
            return ids_CK.gather(-1, best.indices), best.values
        case Sampled(logp_C) | Spans(teacher_logp_T=logp_C):
            nothing_C0 = logp_C[:, None][:, :0]
            return nothing_C0.long(), nothing_C0


def _masses(buckets: Buckets) -> dict[str, Tensor]:
    return {"student_mass": buckets.student_mass_C, "teacher_mass": buckets.teacher_mass_C}
