"""Divergences between student and teacher: log-probabilities in, one number per position out.

Every function takes `student_CS` and `teacher_CS`, natural log-probabilities over the same support (the vocabulary, or
K tokens and a tail bucket), and returns `[C]` in nats; any leading shape will do. Nothing here knows of masks, means,
temperatures or chunks. The gradient reaches the student only. Inputs must be finite: an impossible token has a very
negative log-probability, never -inf, because 0 * inf is NaN in the gradient even where a mask hides the value.

Direction: for `torch.nn.functional.kl_div(input, target, log_target=True)` = KL(target || input), so what torch calls
the KL of (student, teacher) is the *forward* KL.
"""

from collections.abc import Callable

from torch import Tensor

from kibitz.logprobs import kl, mixture


def entropy(logp_CS: Tensor) -> Tensor:
    """H(p) = -sum_s p_s log p_s."""
    return -(logp_CS.exp() * logp_CS).sum(-1)


def forward_kl(student_CS: Tensor, teacher_CS: Tensor) -> Tensor:
    """KL(T || S) = sum_s T_s (log T_s - log S_s): mean-seeking; what cross-entropy on the teacher's text estimates."""
    return kl(teacher_CS.detach(), student_CS)


def reverse_kl(student_CS: Tensor, teacher_CS: Tensor) -> Tensor:
    """KL(S || T) = sum_s S_s (log S_s - log T_s): mode-seeking; the loss of on-policy distillation.

    Summed over the whole support, so it has no variance from the action that was sampled (MiniLLM 2306.08543;
    Lu, "On-Policy Distillation", 2025)."""
    return kl(student_CS, teacher_CS.detach())


def jsd(student_CS: Tensor, teacher_CS: Tensor, beta: float = 0.5, plain: bool = False) -> Tensor:
    """Generalised Jensen-Shannon divergence (GKD, 2306.13649), divided by beta (1 - beta):

        JSD_beta = beta KL(T || M) + (1 - beta) KL(S || M),   M = beta T + (1 - beta) S

    The published form vanishes at both ends (JSD/beta -> forward KL, JSD/(1-beta) -> reverse KL), so that beta = 0.999
    is a thousand times smaller than the reverse KL it stands for. Divided, beta -> 0 and beta -> 1 *are* the forward
    and the reverse KL, and beta moves without moving the learning rate. `plain` gives the published form, at the ends
    too: there it is zero and teaches nothing.
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta of the Jensen-Shannon divergence is {beta}; it must lie between 0 and 1.")
    if not plain and beta == 0.0:
        return forward_kl(student_CS, teacher_CS)
    if not plain and beta == 1.0:
        return reverse_kl(student_CS, teacher_CS)
    teacher_CS = teacher_CS.detach()
    mixture_CS = mixture(teacher_CS, student_CS, beta)
    value_C = beta * kl(teacher_CS, mixture_CS) + (1 - beta) * kl(student_CS, mixture_CS)
    return value_C if plain else value_C / (beta * (1 - beta))


def skew_kl(student_CS: Tensor, teacher_CS: Tensor, alpha: float | Tensor = 0.1) -> Tensor:
    """KL(T || alpha T + (1 - alpha) S), at most -log alpha (DistiLLM, 2402.03898; alpha = 0.1 there)."""
    teacher_CS = teacher_CS.detach()
    return kl(teacher_CS, mixture(teacher_CS, student_CS, alpha))


def skew_reverse_kl(student_CS: Tensor, teacher_CS: Tensor, alpha: float | Tensor = 0.1) -> Tensor:
    """KL(S || alpha S + (1 - alpha) T), at most -log alpha (DistiLLM, 2402.03898).

    The student inside the mixture has a gradient too: this is the derivative of the formula. DistiLLM-2's code detaches
    it there."""
    return kl(student_CS, mixture(student_CS, teacher_CS.detach(), alpha))


def adaptive_alpha(gap_N: Tensor, alpha: float = 0.1) -> Tensor:
    """clip(1 - (1 - alpha) mean(gap) / (gap_i + 1e-5), 0.01, alpha): the skew of each of N responses (DistiLLM-2, 2503.07067).

    `gap_i` is by how much likelier a response is to the model that wrote it than to the other, as the difference of
    exp(mean log-probability). A gap of the mean, or a wider one, has the whole alpha, a narrower one less: easy responses
    are compared more sharply. As in the paper's code a gap below zero, where the reader finds the text likelier than its
    writer, has the whole alpha too (with a mean above zero)."""
    return (1 - (1 - alpha) * gap_N.mean() / (gap_N + 1e-5)).clamp(0.01, alpha)


def total_variation(student_CS: Tensor, teacher_CS: Tensor) -> Tensor:
    """TV = 1/2 sum_s |S_s - T_s|, between 0 and 1."""
    return 0.5 * (student_CS.exp() - teacher_CS.detach().exp()).abs().sum(-1)


def adaptive_kl(student_CS: Tensor, teacher_CS: Tensor, threshold: float = 0.8, coefficient: float = 1.0) -> Tensor:
    """Reverse KL, and forward KL on top where the teacher is uncertain (EOPD, 2603.07079):

        KL(S || T) + coefficient * 1[H(T) > threshold] * KL(T || S)

    Reverse KL alone makes the student pick one of the teacher's ways; where there are several, forward KL keeps them.
    `threshold` is in nats. On K tokens and a tail the entropy is that of the buckets, a lower bound. The paper uses the
    clipped sampled-token form for its first term; here both terms are exact."""
    uncertain_C = (entropy(teacher_CS.detach()) > threshold).to(student_CS.dtype)
    return reverse_kl(student_CS, teacher_CS) + coefficient * uncertain_C * forward_kl(student_CS, teacher_CS)


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "jsd": jsd,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "total_variation": total_variation,
    "adaptive_kl": adaptive_kl,
}
