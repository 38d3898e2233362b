"""The settings of opd for a teacher with its own tokenizer."""

from typing import Literal

from pydantic import Field

from kibitz.config.base import Section
from kibitz.config.teachers import SignalKind, TeacherConfig


class AlignmentConfig(Section):
    """Alignment by spans of text that are whole tokens for both models; see docs/tokenizers.md."""

    alignment: Literal["spans", "alm", "gold", "uld"] = Field(
        "spans",
        description="For a teacher with its own tokenizer. spans: with support: sampled, the log-ratio of a span as the "
        "advantage of its tokens; alm (2503.20083), gold (TRL, by method.divergence) and uld (2402.12030) are losses.",
    )
    alm_tau: float | None = Field(
        100.0,
        gt=0,
        description="For alm: tau, the root taken of probabilities. 100: the paper; null: the limit of large tau.",
    )

    def asks_for_spans(self) -> tuple[SignalKind, ...]:
        """Return the kinds of signal that the alignment's own loss needs; empty if it has none (`spans`)."""
        kinds: dict[str, tuple[SignalKind, ...]] = {"spans": (), "alm": ("spans",)}
        return kinds.get(self.alignment, ("span_distributions",))

    def check_alignment(self, support: str, temperature: float) -> None:
        if self.alignment != "spans" and support != "full":
            raise ValueError(f"alignment: {self.alignment} has a loss of its own: write method.support=full")
        if self.alignment != "spans" and temperature != 1:
            raise ValueError(
                f"alignment: {self.alignment} compares probabilities at temperature 1: drop method.temperature"
            )

    def check_aligned(self, teacher: TeacherConfig, by_token: str | None) -> None:
        """Raise ValueError if the alignment does not fit the teacher. `by_token`: a setting that credits single tokens."""
        speaks_of_spans = "spans" in teacher.answers()
        if self.alignment != "spans" and not speaks_of_spans:
            raise ValueError(
                f"alignment: {self.alignment} is for a teacher with a tokenizer of its own: write teacher.tokenizer=own, "
                "or drop method.alignment"
            )
        if by_token and speaks_of_spans:
            raise ValueError(
                f"{by_token} credits tokens one by one and this teacher scores spans of text: drop method.policy.{by_token}"
            )
