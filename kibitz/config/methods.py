"""The sections of methods: what they share, and those that came first."""

from typing import Literal

from pydantic import Field

from kibitz.config.alignment import AlignmentConfig
from kibitz.config.extras import ExtrasConfig
from kibitz.config.sections import ModelConfig, RolloutConfig
from kibitz.config.teachers import SignalKind, TeacherConfig
from kibitz.config.writing import WritingConfig

HOW_TO_ASK: dict[SignalKind, str] = {
    "dense": "full",
    "top_k": "top_k with method.top_k_of=teacher",
    "named": "top_k",
    "sampled": "sampled",
    "spans": "sampled with method.type=opd",
    "span_distributions": "full with method.type=opd and method.alignment=gold",
}


class MethodConfig(ExtrasConfig):
    """What a method shares with every other one."""

    type: str
    normalize: Literal["token", "sequence"] = Field(
        "token",
        description="token: the mean over the step's tokens; sequence: the mean over responses of each one's mean (GRPO's "
        "1/|o|), in which a token of a short response counts more.",
    )
    mask_tokens: list[str] = Field(
        default_factory=list,
        description="Single tokens, such as <think>, that are not learnt: student and teacher may differ on them "
        "(Revisiting OPD, 2603.25562).",
    )

    def needs_teacher(self) -> bool:
        """Whether the recipe must name a teacher."""
        return False

    def needs_reward(self) -> bool:
        """Whether there must be a grader."""
        return False

    def trains_an_opponent(self) -> bool:
        """Whether more than the student learns, and from all rollouts of a step: it then needs them in one process."""
        return False

    def needs_responses(self) -> bool:
        """Whether every row of the data must bring a response."""
        return False

    def wants_demonstrations(self) -> bool:
        """Whether it reads the data's responses, for itself or for `replay`."""
        return self.needs_responses() or self.replay > 0

    def fills_gaps(self) -> bool:
        """Whether somebody answers the prompts to which the data has no response."""
        return False

    def asks(self) -> tuple[SignalKind, ...]:
        """The signals that the loss can do with, the one with the least work first; none: no teacher scores."""
        return ()

    def scores_with_teacher(self) -> bool:
        """Whether the teacher reads each rollout: its cost then counts."""
        return bool(self.asks())

    def writes_with_teacher(self) -> bool:
        """Whether the teacher writes any of the text."""
        return False

    def judges_with_teacher(self) -> bool:
        """Whether a teacher reads the text while it is written, token by token."""
        return False

    def scores_with_student(self) -> bool:
        """Whether the student reads each rollout once more before it learns, to choose tokens."""
        return False

    def stored_rollouts(self) -> str | None:
        """The file of rollouts to learn from, if nobody is to write any."""
        return None

    def other_models(self) -> dict[str, ModelConfig]:
        """What it loads beside student and teacher, by the key of the recipe. They must share the student's tokenizer."""
        return {} if self.reference is None else {"method.reference": self.reference}

    def check(self, rollout: RolloutConfig) -> None:
        """Raise ValueError, with what to write instead, for settings that exclude each other."""

    def check_teacher(self, teacher: TeacherConfig) -> None:
        """Raise ValueError for a teacher that cannot give what this method asks for."""
        asked, given = self.asks(), teacher.answers()
        if asked and not set(asked) & set(given):
            raise ValueError(
                f"method {self.type} asks its teacher for {' or '.join(asked)} signals and this one gives "
                f"{' and '.join(given) or 'none'}: "
                + (f"write method.support={HOW_TO_ASK[given[0]]}" if given else "choose one that scores tokens")
            )
        if self.writes_with_teacher() and not teacher.writes():
            raise ValueError(f"method {self.type} lets the teacher write, and this one cannot: choose one that can")
        if self.judges_with_teacher() and not teacher.reads_along():
            raise ValueError(
                f"{self.type} judges a text while it is written: its teacher must be a model of its own in this process that "
                "reads the student's prompt: write teacher.model without teacher.context, or method.type=opd"
            )


PolicyLossName = Literal["sampled_token", "ppo_clip", "truncated", "banded", "one_sided"]

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
    token_weight: Literal["none", "entropy", "tip", "iw"] = Field(
        "none",
        description="entropy: only tokens where the student is uncertain are learnt (2603.25562); tip: or disagrees with "
        "the teacher (2604.14084); iw: early tokens count up to 1.5 (2606.22600). Costs one more forward pass.",
    )
    token_share: float = Field(
        0.5, gt=0, le=1, description="Of entropy and tip: the share of the step's tokens that is learnt. 0.5: TIP."
    )

    def needs_teacher(self) -> bool:
        return True

    def asks(self) -> tuple[SignalKind, ...]:
        if self.support != "top_k" or self.top_k_of == "union":
            return ("dense",)
        return ("top_k", "dense") if self.top_k_of == "teacher" else ("dense", "named")

    def scores_with_student(self) -> bool:
        return self.token_weight != "none"


class PolicyGradientConfig(MethodConfig):
    """What every method shares that learns from the sampled token alone."""

    policy_loss: PolicyLossName = Field(
        "sampled_token",
        description="What becomes of a token whose probability has moved since it was sampled. sampled_token: weighed by the "
        "ratio; ppo_clip: no gain past the bound; truncated: weighed by at most ratio_cap; banded: dropped outside "
        "the band; one_sided: dropped once it has fallen by max_drop. All alike at a ratio of 1.",
    )
    clip_ratio: float = Field(0.2, gt=0, description="Of ppo_clip: how far the ratio may be from 1 (1707.06347).")
    ratio_cap: float = Field(5.0, ge=1, description="Of truncated, and the band's upper end. 5: ExOPD, IcePop.")
    ratio_floor: float = Field(0.5, ge=0, le=1, description="Of banded: the band's lower end. 0.5: IcePop.")
    max_drop: float = Field(0.2, gt=0, le=1, description="Of one_sided: a fall in probability. 0.2: prime-rl.")


class OPDConfig(WritingConfig, AlignmentConfig, DistillationConfig, PolicyGradientConfig):
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
    extrapolation: float = Field(
        1.0,
        gt=0,
        description="Of support: sampled; the teacher's advance over the reference counts this much: above 1 goes past the "
        "teacher (ExOPD, 2602.12125: 1.25). 1: off.",
    )
    reward_coef: float = Field(
        0.0,
        ge=0,
        description="Of support: sampled; adds this times the group-centred reward to the advantage (slime, KDRL).",
    )

    def needs_reward(self) -> bool:
        return self.reward_coef > 0

    def asks(self) -> tuple[SignalKind, ...]:
        if kinds := self.asks_for_spans():
            return kinds
        if self.support != "sampled":
            return super().asks()
        return ("dense", "top_k") if self.baseline else ("sampled", "spans")

    def writes_with_teacher(self) -> bool:
        return self.seed_tokens > 0

    def needs_reference(self) -> bool:
        return super().needs_reference() or self.extrapolation != 1

    def check_teacher(self, teacher: TeacherConfig) -> None:
        by_token = "discount" if self.discount else "extrapolation" if self.extrapolation != 1 else None
        self.check_aligned(teacher, by_token)
        super().check_teacher(teacher)

    def check(self, rollout: RolloutConfig) -> None:
        self.check_writing(rollout, sampled=self.support == "sampled")
        self.check_alignment(self.support, self.temperature)
        if self.support != "sampled":
            for name in ("discount", "clip_advantage", "baseline", "reward_coef"):
                if getattr(self, name):
                    raise ValueError(f"{name} belongs to the policy gradient: write method.support=sampled, or drop it")
            if self.extrapolation != 1:
                raise ValueError(
                    "extrapolation belongs to the policy gradient: write method.support=sampled, or drop it"
                )
            if self.policy_loss != "sampled_token":
                raise ValueError("policy_loss belongs to the policy gradient: write method.support=sampled, or drop it")
            return
        if rollout.truncated or rollout.epsilon or rollout.temperature != 1:
            raise ValueError(
                "support: sampled needs rollouts from the student's own distribution: "
                "write rollout.temperature=1 without top_p, top_k and epsilon, or method.support=full"
            )
        if self.divergence != "reverse_kl":
            raise ValueError(
                "support: sampled estimates reverse_kl only: write method.support=full for another divergence"
            )
        if self.token_weight == "tip" and not self.baseline:
            raise ValueError(
                "token_weight: tip needs the teacher's distribution, of which support: sampled sees one token: "
                "write method.token_weight=entropy, or method.baseline=true"
            )
        if self.mask_tokens and self.discount:
            raise ValueError(
                "discount credits a token with later ones, those of mask_tokens too: write method.discount=0"
            )
        if self.baseline and (self.discount or self.extrapolation != 1):
            raise ValueError(
                "the baseline is that of a token's own log-ratio: drop it, or write method.discount=0 without extrapolation"
            )
        if self.reward_coef and (self.prefix_tokens is not None or self.seed_tokens):
            raise ValueError(
                "reward_coef rewards whole responses of the student: drop method.prefix_tokens and method.seed_tokens"
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
    on_policy_end: float | None = Field(
        None, ge=0, le=1, description="Where on_policy ends, linearly over the run. Off: constant, as in the paper."
    )
    source: Literal["dataset", "teacher"] = Field("dataset", description="Who writes the other steps.")

    def needs_responses(self) -> bool:
        end = self.on_policy if self.on_policy_end is None else self.on_policy_end
        return self.source == "dataset" and min(self.on_policy, end) < 1

    def writes_with_teacher(self) -> bool:
        return self.source == "teacher"


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

    def writes_with_teacher(self) -> bool:
        return True

    def judges_with_teacher(self) -> bool:
        return True
