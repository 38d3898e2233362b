"""The effect of a run's settings: temperature of the rollouts, prompts and samples of a step, learning rate."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kibitz.experiments.charts import Line, Panel
from kibitz.experiments.design import TOY, Arm, Experiment
from kibitz.experiments.evidence import Finding, Verdict
from kibitz.experiments.records import score
from kibitz.experiments.results import NotRun, Results
from kibitz.experiments.statistics import Estimate, apart

PROMPTS, STEPS, SHORT = 64, 24, 12
ROLLOUTS = PROMPTS * STEPS
WIDE = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)


def _arm(name: str, about: str, steps: int = STEPS, prompts: int = PROMPTS, **rollout: Any) -> Arm:
    """Warm-up is a quarter of the steps, however many there are."""
    changes = {"rollout": {"prompts_per_step": prompts, **rollout}, "steps": steps}
    return Arm(name, about, {**changes, "optim": {"warmup_steps": max(1, steps // 4)}})


BASE = Arm("opd", f"temperature 1, {PROMPTS} prompts of one sample, {STEPS} steps", _arm("", "").changes, WIDE)
TEMPERATURES = {value: f"temperature-{value:g}" for value in (0.5, 0.7, 1.3)} | {1.0: BASE.name}
AT_EQUAL_ROLLOUTS = {value: f"prompts-{value}" for value in (16, 32, 128, 256)} | {PROMPTS: BASE.name}
AT_EQUAL_STEPS = {value: f"steps-prompts-{value}" for value in (16, 32, 64, 256)} | {128: AT_EQUAL_ROLLOUTS[128]}
SAMPLES = {value: f"samples-{value}" for value in (2, 4, 8)} | {1: BASE.name}
assert ROLLOUTS // 128 == SHORT, "one arm stands in both series"


@dataclass(frozen=True, eq=False)
class Setting:
    """A setting, the arm of each of its values, and the values that are published as good."""

    words: str
    arms: Mapping[Any, str]
    good: tuple[float, float]

    def measured(self, results: Results) -> dict[float, Estimate]:
        return {value: results.accuracy(arm) for value, arm in sorted(self.arms.items()) if results.has(arm)}

    def is_good(self, value: float) -> bool:
        return self.good[0] <= value <= self.good[1]


SETTINGS = (
    Setting("temperature of the rollouts", TEMPERATURES, (0.7, 1.0)),
    Setting("prompts a step, equal rollouts", AT_EQUAL_ROLLOUTS, (64, 256)),
    Setting("prompts a step, equal steps", AT_EQUAL_STEPS, (64, 256)),
    Setting("samples a prompt, equal rollouts", SAMPLES, (2, 4)),
)


def judged(setting: Setting, found: Mapping[float, Estimate]) -> bool | None:
    """Return True if the best published value beats every other value by the interval of the difference; False if one of the
    others beats all published ones so; None if neither holds."""
    inside = {value: e for value, e in found.items() if setting.is_good(value)}
    outside = {value: e for value, e in found.items() if not setting.is_good(value)}
    if not inside or not outside:
        return None
    best, rival = (max(part.values(), key=lambda e: e[0]) for part in (inside, outside))
    if all(apart(best, other) for other in outside.values()):
        return True
    return False if all(apart(rival, other) for other in inside.values()) else None


def verdict(judgements: Sequence[bool | None]) -> Verdict:
    """Reproduced if all hold, partly if some do, not if none."""
    holds = sum(judgement is True for judgement in judgements)
    return "reproduced" if holds == len(judgements) else "partly" if holds else "not"


def rates(results: Results) -> bool | None:
    """Return True if OPD's best rate is below SFT's and at least a quarter of it; None if they are the same."""
    ratio = results.rate(BASE.name) / results.rate("sft")
    return None if ratio == 1 else 0.25 <= ratio < 1


def find(results: Results) -> Finding:
    """A curve for each setting, and which of its values are told apart."""
    if not results.has(BASE.name, "sft"):
        raise NotRun(BASE.name)
    found = {setting: values for setting in SETTINGS if (values := setting.measured(results))}
    judgements = {setting.words: judged(setting, values) for setting, values in found.items()}
    judgements["learning rate"] = rates(results)
    ours, sft = results.rate(BASE.name), results.rate("sft")
    by_temperature = found[SETTINGS[0]]
    numbers = {
        "settings": [_row(setting, values, judgements[setting.words]) for setting, values in found.items()],
        "told": {
            words: [name for name, said in judgements.items() if said is judgement] for judgement, words in TOLD.items()
        },
        "best": max(by_temperature.items(), key=lambda item: item[1][0]),
        "rate": ours,
        "sft_rate": sft,
        "ratio": ours / sft,
        "rate_told": TOLD[judgements["learning rate"]],
        "rollouts": ROLLOUTS,
        "short": SHORT,
    }
    return Finding(verdict(list(judgements.values())), numbers, _panels(results, found))


TOLD: Mapping[bool | None, str] = {True: "holds", False: "the opposite", None: "not told apart"}


def _row(setting: Setting, values: Mapping[float, Estimate], judgement: bool | None) -> dict[str, Any]:
    ordered = sorted(values, key=lambda value: values[value][0])
    spread = values[ordered[-1]][0] - values[ordered[0]][0]
    return {"words": setting.words, "good": setting.good, "accuracies": values, "told": TOLD[judgement],
            "worst": ordered[0], "best": ordered[-1], "spread": spread}  # fmt: skip


def _panels(results: Results, found: Mapping[Setting, Mapping[float, Estimate]]) -> tuple[Panel, ...]:
    curves = {setting.words: [(v, *e) for v, e in values.items()] for setting, values in found.items()}
    heat, rollouts, steps, samples = (curves.get(setting.words, []) for setting in SETTINGS)
    sweeps = {words: results.sweeps[arm] for words, arm in (("OPD", BASE.name), ("SFT on right solutions", "sft"))}
    return (
        Panel(
            "temperature of the rollouts", "temperature", "accuracy", [Line("", heat)],
            ticks={v: f"{v:g}" for v, *_ in heat},
        ),
        Panel(
            "prompts a step", "prompts", "accuracy",
            [Line(f"{ROLLOUTS} rollouts", rollouts), Line(f"{SHORT} steps", steps)],
            log_x=True, ticks={v: f"{v:g}" for v, *_ in (*rollouts, *steps)},
        ),
        Panel(
            "samples a prompt", "samples", "accuracy", [Line("", samples)],
            log_x=True, ticks={v: f"{v:g}" for v, *_ in samples},
        ),
        Panel(
            "learning rate (dev split, one seed)", "rate", "accuracy",
            [Line(words, [(rate, score(run), 0.0) for rate, run in sweep.items()]) for words, sweep in sweeps.items()],
            log_x=True, ticks={rate: f"{rate:g}" for sweep in sweeps.values() for rate in sweep},
        ),
    )  # fmt: skip


EXPERIMENT = Experiment(
    name="temperature",
    question="How much do the temperature of the rollouts, the batch, the samples of a prompt and the rate matter?",
    world="arithmetic",
    recipe=TOY,
    arms=(
        BASE,
        *(_arm(arm, f"rollouts at temperature {value:g}", temperature=value)
          for value, arm in TEMPERATURES.items() if arm != BASE.name),
        *(_arm(arm, f"{value:g} prompts a step, {ROLLOUTS // value} steps", ROLLOUTS // value, value)
          for value, arm in AT_EQUAL_ROLLOUTS.items() if arm != BASE.name),
        *(_arm(arm, f"{value:g} prompts a step, {SHORT} steps", SHORT, value)
          for value, arm in AT_EQUAL_STEPS.items() if value != 128),
        *(_arm(arm, f"{value:g} samples of {PROMPTS // value} prompts a step", prompts=PROMPTS // value,
               samples_per_prompt=value)
          for value, arm in SAMPLES.items() if arm != BASE.name),
        Arm("sft", "cross-entropy on right solutions, for the learning rate",
            {**BASE.changes, "method": {"type": "sft"}}, WIDE),
    ),
    rates=(1e-3, 2e-3),
    reference=BASE.name,
    dev_problems=256,
    seeds=3,
    quick_arms=(BASE.name, "temperature-0.5", "prompts-16", "steps-prompts-16", "samples-4", "sft"),
    find=find,
)  # fmt: skip
