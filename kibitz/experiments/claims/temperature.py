"""How much the settings of a run matter: temperature of the rollouts, prompts and samples of a step, learning rate."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kibitz.experiments.charts import Line, Panel
from kibitz.experiments.design import Arm, Claim, Experiment
from kibitz.experiments.evidence import Finding, Verdict, percent
from kibitz.experiments.records import score
from kibitz.experiments.results import Estimate, NotRun, Results
from kibitz.experiments.tables import table

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
    """Whether the best of the published values beats every other by the interval of the difference; False if one of the others
    beats all of them so; None if neither is told."""
    inside = {value: e for value, e in found.items() if setting.is_good(value)}
    outside = {value: e for value, e in found.items() if not setting.is_good(value)}
    if not inside or not outside:
        return None
    best, rival = (max(part.values(), key=lambda e: e[0]) for part in (inside, outside))
    if all(_above(best, other) for other in outside.values()):
        return True
    return False if all(_above(rival, other) for other in inside.values()) else None


def _above(one: Estimate, other: Estimate) -> bool:
    return one[0] - other[0] > math.hypot(one[1], other[1])


def verdict(judgements: Sequence[bool | None]) -> Verdict:
    """Reproduced if all hold, partly if some do, not if none."""
    holds = sum(judgement is True for judgement in judgements)
    return "reproduced" if holds == len(judgements) else "partly" if holds else "not"


def rates(results: Results) -> bool | None:
    """Whether OPD's best rate is below SFT's and not below a quarter of it; None if they are the same."""
    ratio = results.rate(BASE.name) / results.rate("sft")
    return None if ratio == 1 else 0.25 <= ratio < 1


def find(results: Results) -> Finding:
    """A curve for each setting, and which of its values are told apart."""
    found = {setting: setting.measured(results) for setting in SETTINGS}
    if not results.has(BASE.name, "sft"):
        raise NotRun(BASE.name)
    found = {setting: values for setting, values in found.items() if values}
    judgements = {setting.words: judged(setting, values) for setting, values in found.items()}
    judgements["learning rate"] = rates(results)
    words = {True: "holds", False: "the opposite", None: "not told apart"}
    rows = [
        (setting.words, _range(setting), ", ".join(f"{v:g}: {percent(e)}" for v, e in values.items()),
         words[judgements[setting.words]])
        for setting, values in found.items()
    ]  # fmt: skip
    ours, sft = results.rate(BASE.name), results.rate("sft")
    rows.append(
        ("learning rate", "a little below SFT's", f"{ours:g}; SFT's {sft:g}", words[judgements["learning rate"]])
    )
    best = max(found[SETTINGS[0]], key=lambda value: found[SETTINGS[0]][value][0])
    return Finding(
        verdict(list(judgements.values())),
        f"best at temperature {best:g} ({percent(found[SETTINGS[0]][best])}); best rate {ours / sft:g} x SFT's",
        _why(found, judgements, ours / sft),
        (table(("setting", "published as good", "accuracy, %", "here"), rows),),
        _panels(results, found),
    )


def _range(setting: Setting) -> str:
    return f"{setting.good[0]:g}–{setting.good[1]:g}"


def _why(found: Mapping[Setting, Mapping[float, Estimate]], judgements: Mapping[str, bool | None], ratio: float) -> str:
    spans = "; ".join(
        f"{setting.words}, {_spread(values):.1f} points between the worst, {min(values, key=lambda v: values[v][0]):g}, and "
        f"the best, {max(values, key=lambda v: values[v][0]):g}"
        for setting, values in found.items()
    )
    named = {
        judgement: [words for words, j in judgements.items() if j is judgement] for judgement in (True, False, None)
    }
    said = {
        True: "The published values are told apart above the others in",
        False: "Others are told apart above them in",
        None: "Neither is told apart in",
    }
    read = " ".join(f"{said[judgement]}: {'; '.join(names)}." for judgement, names in named.items() if names)
    return (
        f"What each setting moves: {spans}. {read} OPD's best learning rate is {ratio:g} times that of SFT on right solutions. "
        f"Equal rollouts are {ROLLOUTS}, equal steps {SHORT}: a short budget. Each value has its own best learning rate, which "
        "takes away a part of what a bad one costs at a fixed rate: a setting that is not told apart is one that needs no care."
    )


def _spread(values: Mapping[float, Estimate]) -> float:
    means = [estimate[0] for estimate in values.values()]
    return 100 * (max(means) - min(means))


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
    recipe={
        "rollout": {"samples_per_prompt": 1, "max_tokens": 64},
        "threads": 1,
    },
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
    claim=Claim(
        says="Rollouts at temperature 0.7 to 1.0, 64 to 256 prompts a step, 2 to 4 samples of each, and a learning rate a little "
        "below that of SFT (the cookbook: temperature 1, 4 samples, and half of SFT's rate for full fine-tuning).",
        source="popular advice around [Thinking Machines 2025](https://thinkingmachines.ai/blog/on-policy-distillation/), and "
        "[its cookbook](https://github.com/thinking-machines-lab/tinker-cookbook)",
        short="rollouts at 0.7–1.0, batch 64–256, 2–4 samples a prompt, a rate a little below SFT's",
    ),
    find=find,
)  # fmt: skip
