"""The guards of a run together: rows in, alarms out."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch

from kibitz.config import GuardConfig
from kibitz.training.guards import symptoms
from kibitz.training.guards.rollouts import shows_symptom
from kibitz.training.guards.symptoms import CALM, NOTHING, Numbers, Reading, Series
from kibitz.types import Rollout


@dataclass(frozen=True)
class Alarm:
    """Says what went wrong, by which sign, and what to do. `action` is `warn`, `mask` or `stop`, as the recipe has it."""

    name: str
    symptom: str
    remedy: str
    step: int
    action: str

    def as_row(self) -> dict[str, Any]:
        """A line for `alarms.jsonl`."""
        return asdict(self)


class Guard(NamedTuple):
    """A guard names the number it needs, how to read it (None: not a series of steps), and the remedy."""

    needs: str
    read: Callable[[Numbers, GuardConfig], Reading] | None
    remedy: str


GUARDS = {
    "length_inflation": Guard(
        "response_tokens",
        symptoms.length_inflation,
        "read some responses. If they ramble: check that both models end with the same EOS, lower optim.lr, "
        "write method.support=full, or hold it to its start by method.reference_kl=0.05 and mix in gold responses by "
        "method.replay=0.25 (both: StableOPD, 2604.08527)",
    ),
    "cut_off": Guard(
        "cut_off",
        symptoms.cut_off,
        "read some responses. If they are sound, raise rollout.max_tokens; if they ramble, write guards.cut_off=mask "
        "and do what helps against length inflation",
    ),
    "repetition": Guard(
        "repetition",
        symptoms.repetition,
        "go back to an earlier checkpoint: teachers find repeated text likely, so it feeds itself (2604.08527). Lower "
        "optim.lr, write guards.repetition=mask, method.replay=0.25 (gold responses) or method.reference_kl=0.05",
    ),
    "entropy_collapse": Guard(
        "student_entropy",
        symptoms.entropy_collapse,
        "lower optim.lr, use more varied prompts, write method.divergence=adaptive_kl or forward_kl",
    ),
    "overlap_falling": Guard(
        "top_k_overlap",
        symptoms.overlap_falling,
        "lower optim.lr or rollout.max_tokens (the last tokens go first); before that, SFT on the teacher's responses or "
        "prompts like those it was trained on raise the overlap (2604.13016)",
    ),
    "kl_rising": Guard(
        "reverse_kl",
        symptoms.kl_rising,
        "go back to the best checkpoint and lower optim.lr; write method.support=full, or with support: sampled "
        "method.policy.clip_advantage=3",
    ),
    "reward_falling": Guard(
        "reward",
        symptoms.reward_falling,
        "go back to the best checkpoint and lower optim.lr; with support: sampled write method.support=full or "
        "method.policy.clip_advantage=3; with a forward KL and a small student write method.divergence=reverse_kl",
    ),
    "student_stuck": Guard(
        "grad_norm",
        symptoms.student_stuck,
        "with equal rewards: prompts that the student solves sometimes, more rollout.samples_per_prompt, or a teacher (or "
        "stop, if it solves them all); with no gradient: check what is trained and that optim.lr is not tiny",
    ),
    "style_overfit": Guard(
        "pass_at_k",
        None,
        "go back to the best checkpoint; use a teacher that solves what the student cannot, add a reward, or keep "
        "variety with method.divergence=adaptive_kl",
    ),
    "not_finite": Guard(
        "grad_norm",
        None,
        "the step was skipped. If it comes again, lower optim.lr, load the models in bfloat16 or float32 rather than "
        "float16, and look for -inf in a loss of your own",
    ),
}

WATCHED = {"loss", "equal_groups", "teacher_entropy", "shortened", "longest_response"} | {
    guard.needs for guard in GUARDS.values() if guard.read
}


class Guards:
    """All guards of a run. With the `state` of a checkpoint they go on as if there had been no break."""

    def __init__(self, config: GuardConfig, state: dict[str, Any] | None = None):
        state = state or {}
        self.config = config
        self.series = {name: Series(**kept) for name, kept in state.get("series", {}).items()}
        self.raised: dict[str, int] = dict(state.get("raised", {}))  # name -> for how long it has been calm
        self.best_eval: dict[str, float] | None = state.get("best_eval")
        self.num_falls: int = state.get("num_falls", 0)
        self.num_skipped: int = state.get("num_skipped", 0)

    def state(self) -> dict[str, Any]:
        """All that the next alarms depend on, fit for JSON."""
        counts = {"best_eval": self.best_eval, "num_falls": self.num_falls, "num_skipped": self.num_skipped}
        return {
            "series": {name: asdict(one) for name, one in self.series.items()},
            "raised": dict(self.raised),
            **counts,
        }

    def mask(self, rollouts: Sequence[Rollout]) -> tuple[list[Rollout], float]:
        """The rollouts, with weight 0 at every token of one that a guard whose action is `mask` takes out of this step, and
        the share of those taken out among the method's own."""
        series = self.series.get("longest_response")
        longest = series.start if series is not None and series.ready else None
        wrong = [shows_symptom(rollout, self.config, longest) for rollout in rollouts]
        masked = [
            replace(r, learn_T=torch.zeros(r.num_tokens)) if is_wrong else r
            for r, is_wrong in zip(rollouts, wrong, strict=True)
        ]
        return masked, sum(wrong) / max(1, sum(not r.objective for r in rollouts))

    def watch_step(self, row: dict[str, Any]) -> list[Alarm]:
        """The alarms that this row of `metrics.jsonl` sets off. NaN, or the null that JSON has for it, in `loss` or
        `grad_norm` means that the step was skipped."""
        for name in WATCHED & row.keys():
            if _is_finite(row[name]):
                self.series.setdefault(name, Series(self.config.window, self.config.early)).add(float(row[name]))
        alarms = self._judge("not_finite", self._finiteness(row), row["step"], self.config.window)
        run = {name: series for name, series in self.series.items() if series.ready}
        for name, guard in GUARDS.items():
            if guard.read is not None and guard.needs in run and self._action(name) != "off":
                alarms += self._judge(name, guard.read(run, self.config), row["step"], self.config.window)
        return alarms

    def _finiteness(self, row: dict[str, Any]) -> Reading:
        wrong = [name for name in ("loss", "grad_norm") if name in row and not _is_finite(row[name])]
        if not wrong:
            return NOTHING
        self.num_skipped += 1
        return Reading(math.inf, f"{' and '.join(wrong)} not finite; {self.num_skipped} steps skipped so far")

    def watch_eval(self, row: dict[str, Any]) -> list[Alarm]:
        """The alarms that this row of `evals.jsonl` sets off: pass@k, at the largest k, is below its best by `style_drop`
        and by 3 standard errors at two evaluations running, while the reverse KL is lower than at that best."""
        passes, kl = row.get("pass_at_k"), row.get("reverse_kl")
        if not passes or kl is None:
            return []
        k = max(passes, key=int)
        now = {"pass": passes[k], "variance": passes[k] * (1 - passes[k]) / row["num_prompts"], "reverse_kl": kl}
        best = self.best_eval
        if best is None or now["pass"] >= best["pass"]:
            self.best_eval, self.num_falls, reading = now, 0, NOTHING
        else:
            drop, error = best["pass"] - now["pass"], math.sqrt(best["variance"] + now["variance"])
            fallen = drop >= max(self.config.style_drop, 3 * error) and kl < best["reverse_kl"]
            self.num_falls = self.num_falls + 1 if fallen else 0
            text = f"pass@{k} fell from {best['pass']:.3g} to {now['pass']:.3g} while the reverse KL fell from "
            reading = Reading(self.num_falls / 2, f"{text}{best['reverse_kl']:.3g} to {kl:.3g}")
        return self._judge("style_overfit", reading, row["step"], 1)

    def _judge(self, name: str, reading: Reading, step: int, patience: int) -> list[Alarm]:
        """An alarm at severity 1, then none until the severity has been low for `patience` readings running."""
        if name in self.raised:
            self.raised[name] = self.raised[name] + 1 if reading.severity < CALM else 0
            if self.raised[name] >= patience:
                del self.raised[name]
            return []
        action = self._action(name)
        if reading.severity < 1 or action == "off":
            return []
        self.raised[name] = 0
        return [Alarm(name, reading.symptom, GUARDS[name].remedy, step, action)]

    def _action(self, name: str) -> str:
        return getattr(self.config, name)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
