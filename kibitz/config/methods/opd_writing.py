"""The source of opd's responses: the student, whole or a prefix; the student after a teacher's beginning; or stored rollouts."""

from pydantic import Field

from kibitz.config.base import Section
from kibitz.config.sections import RolloutConfig


class WritingConfig(Section):
    """Departures from the plain case, in which the student writes whole responses."""

    prefix_tokens: int | None = Field(
        None,
        ge=1,
        description="Stop responses after so many tokens; those stopped are not cut off, nor graded. Off: whole ones; "
        "Fast OPD (2602.15260) reports equal accuracy for 2-47x less compute; a fixed third lost 15-20 points on a toy.",
    )
    prefix_grows: bool = Field(
        True, description="From prefix_tokens to rollout.max_tokens, linearly over the run (2602.15260's schedule)."
    )
    seed_tokens: int = Field(
        0,
        ge=0,
        description="The teacher writes the first so many tokens, the student goes on. 0: off. A teacher's beginning helps "
        "the student finish (2602.15260); what it was not taught to begin, it does not learn.",
    )
    seed_decays: bool = Field(False, description="From seed_tokens to 0, linearly over the run.")
    learn_seed: bool = Field(False, description="Learn the teacher's tokens too. Off: they are context.")
    rollouts: str | None = Field(
        None,
        description="JSONL of stored rollouts to learn from; none are generated. Lightning OPD (2604.13010): the student's from "
        "before training, with the teacher of its SFT. rollout.store makes such a file.",
    )

    def check_writing(self, rollout: RolloutConfig, sampled: bool) -> None:
        """Raise ValueError for settings that exclude each other. `sampled`: the loss is a policy gradient on sampled tokens."""
        prefix, seed = self.prefix_tokens, self.seed_tokens
        for name, size in (("prefix_tokens", prefix or 0), ("seed_tokens", seed)):
            if size > rollout.max_tokens:
                raise ValueError(
                    f"{name} is {size} and a response ends after rollout.max_tokens={rollout.max_tokens}: "
                    f"write method.{name}={rollout.max_tokens} or less"
                )
            if size and self.rollouts is not None:
                raise ValueError(
                    f"rollouts are stored, and {name} applies to generated ones: drop method.{name} or method.rollouts"
                )
        if prefix is None and not self.prefix_grows:
            raise ValueError(
                "prefix_grows: false fixes the length of a prefix, and there is none: write method.prefix_tokens=N"
            )
        for name in ("seed_decays", "learn_seed"):
            if getattr(self, name) and not seed:
                raise ValueError(f"{name} needs a beginning of the teacher's: write method.seed_tokens=N")
        shortest = rollout.max_tokens if prefix is None else prefix
        if seed >= shortest and not self.learn_seed:
            raise ValueError(
                f"the teacher writes {seed} tokens of responses that end after {shortest}, and nothing is left to learn: "
                f"write method.seed_tokens={shortest - 1} or less, or method.learn_seed=true"
            )
        if sampled and self.learn_seed:
            raise ValueError(
                "learn_seed: tokens that the teacher drew have no advantage over it: write method.support=full"
            )
        if sampled and self.rollouts is not None:
            raise ValueError(
                "support: sampled needs rollouts of the current student, and stored ones are of an earlier one: "
                "write method.support=full or top_k"
            )
