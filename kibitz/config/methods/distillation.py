"""The settings of methods whose loss is a divergence to the teacher at each token."""

from typing import Literal

from pydantic import Field

from kibitz.config.methods.base import MethodConfig, Needs
from kibitz.config.teachers import SignalKind

DivergenceName = Literal[
    "reverse_kl", "forward_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation", "adaptive_kl"
]
DIVERGENCE_TITLES: dict[DivergenceName, str] = {
    "reverse_kl": "reverse KL divergence",
    "forward_kl": "forward KL divergence",
    "jsd": "Jensen–Shannon divergence",
    "skew_kl": "skewed KL divergence",
    "skew_reverse_kl": "skewed reverse KL divergence",
    "total_variation": "total variation distance",
    "adaptive_kl": "KL divergence, forward where the teacher is undecided and reverse elsewhere,",
}
"""The divergences' names in a report. `kibitz.losses.DIVERGENCES` has their functions; their options are fields below."""


class DistillationConfig(MethodConfig):
    """The settings that all methods with a per-token divergence share."""

    divergence: DivergenceName = Field("reverse_kl", description="reverse_kl: Thinking Machines 2025, MiniLLM.")
    support: Literal["full", "top_k"] = Field(
        "full", description="full: the whole vocabulary, exact; top_k: K tokens, the written one and a tail bucket."
    )
    top_k: int = Field(64, ge=1, description="K of support: top_k. Rethinking-OPD's 16 hold 97-99% of the mass.")
    top_k_of: Literal["student", "teacher", "union"] = Field(
        "student", description="The model that chooses the K tokens. student: nearest to the full reverse KL."
    )
    beta: float = Field(
        0.5, gt=0, lt=1, description="For jsd: near 0 it is the forward KL, near 1 the reverse KL (GKD, 2306.13649)."
    )
    alpha: float = Field(0.1, gt=0, lt=1, description="For the skewed divergences (DistiLLM, 2402.03898: 0.1).")
    threshold: float = Field(
        0.8,
        ge=0,
        description="For adaptive_kl: teacher entropy in nats above which the forward KL is added (EOPD, 2603.07079).",
    )
    temperature: float = Field(
        1.0, gt=0, description="Divides both models' logits in the loss; the loss is multiplied by its square."
    )
    token_weight: Literal["none", "entropy", "tip", "iw"] = Field(
        "none",
        description="entropy: only tokens where the student is uncertain are learnt (2603.25562); tip: or disagrees with "
        "the teacher (2604.14084); iw: early tokens count up to 1.5 (2606.22600). Costs one more forward pass.",
    )
    token_share: float = Field(
        0.5, gt=0, le=1, description="For entropy and tip: the share of a step's tokens that is learnt. 0.5: TIP."
    )

    def needs(self) -> Needs:
        return Needs(
            teacher=True,
            signals=self.signals(),
            top_k=self.top_k,
            temperature=self.temperature,
            scores_late=self.token_weight == "none",
            student_scores=self.token_weight != "none",
        )

    def signals(self) -> tuple[SignalKind, ...]:
        """Return the kinds of signal from which the divergence can be computed on this support, the cheapest first."""
        if self.support != "top_k" or self.top_k_of == "union":
            return ("dense",)
        return ("top_k", "dense") if self.top_k_of == "teacher" else ("dense", "named")
