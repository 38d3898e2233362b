"""The `method` section: one class per method, chosen by `type`."""

from typing import Annotated, Any, Literal, Union

from pydantic import Discriminator, Field, Tag

from kibitz.config.base import Section
from kibitz.config.sections import RolloutConfig


class MethodConfig(Section):
    """What a method shares with every other one."""

    type: str

    def needs_teacher(self) -> bool:
        """Whether the recipe must name a teacher."""
        return False

    def needs_reward(self) -> bool:
        """Whether there must be a grader."""
        return False

    def needs_responses(self) -> bool:
        """Whether every row of the data must bring a response."""
        return False

    def scores_with_teacher(self) -> bool:
        """Whether the teacher reads each rollout: its cost then counts."""
        return False

    def check(self, rollout: RolloutConfig) -> None:
        """Raise ValueError, with what to write instead, for settings that exclude each other."""


DivergenceName = Literal[
    "reverse_kl", "forward_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation", "adaptive_kl"
]


class DistillationConfig(MethodConfig):
    """What every method shares that learns a divergence to the teacher at each token."""

    divergence: DivergenceName = Field("reverse_kl", description="reverse_kl: Thinking Machines 2025, MiniLLM.")
    support: Literal["full", "top_k"] = Field(
        "full", description="full: the whole vocabulary, exact; top_k: K tokens, the written one and a tail bucket."
    )
    top_k: int = Field(64, ge=1, description="K of support: top_k. Rethinking-OPD's 16 hold 97-99% of the mass.")
    top_k_of: Literal["student", "teacher", "union"] = Field(
        "student", description="Whose K. student: nearest to the full reverse KL."
    )
    beta: float = Field(0.5, gt=0, lt=1, description="Of jsd: near 0 forward KL, near 1 reverse KL (GKD, 2306.13649).")
    alpha: float = Field(0.1, gt=0, lt=1, description="Of the skewed divergences (DistiLLM, 2402.03898: 0.1).")
    threshold: float = Field(
        0.8,
        ge=0,
        description="Of adaptive_kl: forward KL joins where the teacher's entropy is above (nats; EOPD, 2603.07079).",
    )
    temperature: float = Field(
        1.0, gt=0, description="Divides both models' logits in the loss; gradients are scaled by its square."
    )

    def needs_teacher(self) -> bool:
        return True

    def scores_with_teacher(self) -> bool:
        return True


class OPDConfig(DistillationConfig):
    """On-policy distillation: the student writes, the teacher scores every token, the divergence is the loss."""

    type: Literal["opd"] = "opd"
    support: Literal["full", "top_k", "sampled"] = Field(
        "full",
        description="full: the whole vocabulary, exact (its gradient has no sampling noise); top_k: K tokens, the written one "
        "and a tail bucket; sampled: the published policy gradient on the sampled token.",
    )
    kl_coef: float = Field(1.0, gt=0, description="Of support: sampled; the cookbook's kl_penalty_coef.")
    discount: float = Field(
        0.0, ge=0, le=1, description="Of support: sampled; credit for later tokens. 0: published, more gained nothing."
    )
    clip_advantage: float | None = Field(
        None,
        gt=0,
        description="Of support: sampled; bounds the log-ratio: its lower tail is heavy (REOPOLD). 3 saved toy runs.",
    )
    baseline: bool = Field(
        False,
        description="Of support: sampled; adds KL(S || T) to the advantage: unbiased, less variance (vOPD, 2605.07865).",
    )
    reward_coef: float = Field(
        0.0,
        ge=0,
        description="Of support: sampled; adds this times the group-centred reward to the advantage (slime, KDRL).",
    )

    def needs_reward(self) -> bool:
        return self.reward_coef > 0

    def check(self, rollout: RolloutConfig) -> None:
        if self.support != "sampled":
            for name in ("discount", "clip_advantage", "baseline", "reward_coef"):
                if getattr(self, name):
                    raise ValueError(f"{name} belongs to the policy gradient: write method.support=sampled, or drop it")
            return
        if rollout.truncated or rollout.temperature != 1:
            raise ValueError(
                "support: sampled needs rollouts from the student's own distribution: "
                "write rollout.temperature=1 without top_p and top_k, or method.support=full"
            )
        if self.divergence != "reverse_kl":
            raise ValueError(
                "support: sampled estimates reverse_kl only: write method.support=full for another divergence"
            )
        if self.baseline and self.discount:
            raise ValueError(
                "the baseline is that of a token's own advantage: write method.discount=0, or drop baseline"
            )
        if self.reward_coef and rollout.samples_per_prompt < 2:
            raise ValueError(
                "reward_coef compares the samples of a prompt: write rollout.samples_per_prompt of 2 or more"
            )


class GKDConfig(DistillationConfig):
    """Generalised KD: a share of the steps on the student's own text, the rest on the data's or the teacher's."""

    type: Literal["gkd"] = "gkd"
    divergence: DivergenceName = Field("jsd", description="jsd: the paper (2306.13649).")
    on_policy: float = Field(
        0.5, ge=0, le=1, description="Share of the steps on student text, lambda. 0.5: the paper's mix."
    )
    source: Literal["dataset", "teacher"] = Field("dataset", description="Who writes the other steps.")

    def needs_responses(self) -> bool:
        return self.source == "dataset" and self.on_policy < 1


class SKDConfig(DistillationConfig):
    """Speculative KD: the student drafts, the teacher replaces what is not among its K likeliest tokens, and scores all."""

    type: Literal["skd"] = "skd"
    divergence: DivergenceName = Field("forward_kl", description="forward_kl: the paper (2410.11325).")
    accept_top_k: int = Field(
        25, ge=1, description="K. 25: the paper; 1 follows the teacher, the vocabulary's size is on-policy."
    )
    draft_tokens: int = Field(
        5, ge=1, description="Drafted between two passes of the teacher; a matter of speed. 5: the paper."
    )
    decay: int | None = Field(
        None,
        ge=1,
        description="Blocks of a response over which K falls to 1: the authors' expected_seq_len. Off: their default.",
    )
    teacher_temperature: float = Field(
        1.0, ge=0, description="Of the teacher's draws; 0: its likeliest. The paper's runs: 0.2."
    )
    teacher_top_p: float = Field(1.0, gt=0, le=1, description="Of the teacher's draws. The paper's runs: 0.5.")


class SFTConfig(MethodConfig):
    """Supervised fine-tuning: cross-entropy on demonstrations, or on what the teacher writes (off-policy distillation)."""

    type: Literal["sft"] = "sft"
    source: Literal["dataset", "teacher"] = Field("dataset", description="Who wrote the responses.")

    def needs_teacher(self) -> bool:
        return self.source == "teacher"

    def needs_responses(self) -> bool:
        return self.source == "dataset"


class GRPOConfig(MethodConfig):
    """RL with a reward per response: advantages centred in the group of a prompt's samples (GRPO, 2402.03300)."""

    type: Literal["grpo"] = "grpo"
    normalize_std: bool = Field(
        False, description="Divide by the group's deviation. Off: it favours extreme prompts (2503.20783)."
    )
    clip_ratio: float = Field(0.2, gt=0, description="PPO clip of the importance ratio (2402.03300).")

    def needs_reward(self) -> bool:
        return True

    def check(self, rollout: RolloutConfig) -> None:
        if rollout.samples_per_prompt < 2:
            raise ValueError("grpo compares the samples of a prompt: write rollout.samples_per_prompt of 2 or more")
        if rollout.truncated:
            raise ValueError("grpo's importance ratio needs untruncated rollouts: drop rollout.top_p and rollout.top_k")


METHOD_CONFIGS: dict[str, type[MethodConfig]] = {
    "sft": SFTConfig,
    "opd": OPDConfig,
    "gkd": GKDConfig,
    "skd": SKDConfig,
    "grpo": GRPOConfig,
}


def method_type(value: Any) -> str | None:
    """The `type` of a method's section, read or not."""
    return value.get("type") if isinstance(value, dict) else getattr(value, "type", None)


def method_union() -> Any:
    """All sections of `METHOD_CONFIGS` as one type that pydantic tells apart by `type`."""
    members = tuple(Annotated[section, Tag(name)] for name, section in METHOD_CONFIGS.items())
    return Annotated[Union[members], Discriminator(method_type)]  # noqa: UP007  # of a tuple made at run time
