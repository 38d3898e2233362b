"""A teacher with a mistake of its own: does the student inherit it, and do a second teacher or some reward repair that?"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from kibitz.config import ModelConfig
from kibitz.data import load_grader, load_prompts
from kibitz.engines.torch import TorchEngine
from kibitz.evaluate.evaluate import grade
from kibitz.experiments.charts import Line, Panel
from kibitz.experiments.design import OF_ARM, Arm, Claim, Experiment
from kibitz.experiments.evidence import Finding, Verdict, percent
from kibitz.experiments.make_world import MISLED
from kibitz.experiments.records import Record, share_with_interval
from kibitz.experiments.results import Estimate, NotRun, Results
from kibitz.experiments.statistics import apart
from kibitz.experiments.tables import table
from kibitz.graders import Grader
from kibitz.models.load import load_model, load_tokenizer, pick_device, stop_ids
from kibitz.types import Prompt, Rollout, Sampling

NOISY, OTHER = "teacher-misled", "teacher-slips"
GROUPS = {"prompts_per_step": 8, "samples_per_prompt": 8}
SAMPLED = {"type": "opd", "support": "sampled", "baseline": True}
ALONE, ALONE_SAMPLED = "misled", "misled-sampled"
REMEDIES = ("and-sound", "and-slips", "and-reward", "kdrl")
CONTROL: Mapping[str, str] = {"and-reward": ALONE_SAMPLED}
"""What a remedy is compared with, where that is not the misled teacher alone: the same method without it."""


def _planted(name: str, errors: str) -> Arm:
    """The sound teacher, taught an error."""
    changes = {"student": {"model": "teacher"}, "method": {"type": "sft"}, "optim": MISLED, "steps": 150}
    return Arm(name, f"the teacher, on solutions with {errors}", changes, rates=(MISLED["lr"],), data=errors)


def _taught(
    name: str, about: str, *teachers: str, method: Mapping[str, Any] | None = None, grouped: bool = False
) -> Arm:
    named = [{"model": teacher} for teacher in teachers]
    changes: dict[str, Any] = {"method": method or {"type": "opd"}, "teacher": named[0] if len(named) == 1 else named}
    return Arm(name, about, changes | ({"rollout": GROUPS} if grouped else {}))


ARMS = (
    _taught("sound", "the sound teacher", "teacher"),
    _taught(ALONE, "the misled teacher alone", NOISY),
    _taught("and-sound", "misled and sound teacher, mixed in equal shares", NOISY, "teacher"),
    _taught("and-slips", "misled teacher and one that slips at random, mixed in equal shares", NOISY, OTHER),
    _taught(
        ALONE_SAMPLED, "the misled teacher alone, sampled token, 8 samples a prompt", NOISY, method=SAMPLED, grouped=True
    ),
    _taught(
        "and-reward", "the same with the group-centred 0/1 reward", NOISY, method=SAMPLED | {"reward_coef": 1.0},
        grouped=True,
    ),
    _taught("kdrl", "0/1 reward, and a fading reverse KL to the misled teacher", NOISY, method={"type": "kdrl"}, grouped=True),
    Arm("reward", "the 0/1 reward alone (GRPO)", {"method": {"type": "grpo"}, "rollout": GROUPS}),
)  # fmt: skip


# ------------------------------------------------------------------ what is looked at


def probe(study: Any, seed: int) -> Record:
    """Greedy answers of all models to the problems that the misled teacher gets wrong: right, its own mistake, or another."""
    recipe, num = study.untrained(), study.experiment.test_problems
    arms = [f"{OF_ARM}{arm.name}" for arm in study.experiment.arms]
    tokenizer = load_tokenizer(ModelConfig(model=study.place("student", seed)), "student")
    data = study.asked("prompts", "test", num, recipe, None)
    prompts = load_prompts(data, tokenizer, seed)
    grader = load_grader(data, prompts)
    if grader is None:
        raise ValueError("teacher-noise compares answers: give prompts that have one")
    written = _greedy(study.place(NOISY, seed), prompts, grader, recipe.rollout.max_tokens)
    mistakes = [rollout for rollout in written if rollout.reward is not None and rollout.reward < 1]
    found = {"num_mistakes": len(mistakes), "num_problems": len(prompts), "models": {}}
    for name in ("student", *arms) if mistakes else ():
        answers = _greedy(study.place(name, seed), [m.prompt for m in mistakes], grader, recipe.rollout.max_tokens)
        right = sum(answer.reward or 0.0 for answer in answers)
        same = sum(grader(as_answer(mistake), answer.text) for mistake, answer in zip(mistakes, answers, strict=True))
        found["models"][name.removeprefix(OF_ARM)] = {"right": right / len(answers), "mistake": same / len(answers)}
    return found


def _greedy(model: str, prompts: Sequence[Prompt], grader: Grader, max_tokens: int) -> list[Rollout]:
    config = ModelConfig(model=model)
    loaded = load_model(config, "student", pick_device(), load_tokenizer(config, "student"))
    sampling = Sampling(max_tokens=max_tokens, temperature=0.0, stop_ids=stop_ids(loaded, []))
    rollouts = TorchEngine(loaded).generate(prompts, sampling)
    return grade(grader, loaded, rollouts)


def as_answer(mistake: Rollout) -> Prompt:
    """The problem as if what was written were its answer: its last line in a toy world; graders of text find it themselves."""
    answer = mistake.text.rpartition("=")[2]
    return replace(mistake.prompt, answer=answer, columns={**mistake.prompt.columns, "answer": answer})


# ------------------------------------------------------------------ what it says


def inherited(results: Results, name: str, what: str = "mistake") -> Estimate:
    """Of the problems that the misled teacher gets wrong, the share that a model answers by the same mistake."""
    seeds = [record for record in results.probes() if name in record["models"]]
    if not any(record["num_mistakes"] for record in results.probes()):
        return 0.0, 0.0
    if not seeds:
        raise NotRun(f"probe of {name}")
    return share_with_interval([r["models"][name][what] for r in seeds], sum(r["num_mistakes"] for r in seeds))


def verdict(shares: Mapping[str, Estimate], mistakes: Mapping[str, Estimate]) -> Verdict:
    """The claim has two halves: under the misled teacher its mistakes become more than the student made before; and a remedy
    brings more right answers and fewer of these mistakes than the same method without it."""
    learnt = apart(mistakes[ALONE], mistakes["student"])
    repaired = bool(repairs(shares, mistakes))
    return "reproduced" if learnt and repaired else "partly" if learnt or repaired else "not"


def repairs(shares: Mapping[str, Estimate], mistakes: Mapping[str, Estimate]) -> list[str]:
    """The remedies that bring more right answers, and fewer of the teacher's mistakes."""
    found = []
    for name in REMEDIES:
        control = CONTROL.get(name, ALONE)
        if {name, control} <= shares.keys() and apart(shares[name], shares[control]):
            found += [name] if apart(mistakes[control], mistakes[name]) else []
    return found


def find(results: Results) -> Finding:
    arms = [arm for arm in results.experiment.arms if results.has(arm.name)]
    shares = {arm.name: results.accuracy(arm.name) for arm in arms}
    if ALONE not in shares:
        raise NotRun(ALONE)
    mistakes = {name: inherited(results, name) for name in ("student", *shares)}
    right = {name: inherited(results, name, "right") for name in mistakes}
    rows = [
        (
            "the student before",
            percent(results.level("student")),
            percent(right["student"]),
            percent(mistakes["student"]),
        )
    ]
    rows += [
        (arm.about, percent(shares[arm.name]), percent(right[arm.name]), percent(mistakes[arm.name])) for arm in arms
    ]
    rows += [(f"*{words}*", percent(results.level(role)), "", "") for role, words in
             ((NOISY, "the misled teacher"), (OTHER, "the one that slips"), ("teacher", "the sound one"))]  # fmt: skip
    head = ("learnt from", "accuracy, %", "right where it errs, %", "its mistake there, %")
    return Finding(
        verdict(shares, mistakes),
        f"of a misled teacher's mistakes the student makes {percent(mistakes['student'])}% before and "
        f"{percent(mistakes[ALONE])}% after; repaired by {', '.join(repairs(shares, mistakes)) or 'nothing that was tried'}",
        _why(results, arms, shares, mistakes),
        (table(head, rows),),
        _panels(results, arms, shares, mistakes),
    )


def _names(arms: Sequence[Arm], names: Sequence[str]) -> str:
    abouts = {arm.name: arm.about for arm in arms}
    return "; ".join(abouts[name] for name in names) or "nothing that was tried"


def _why(
    results: Results, arms: Sequence[Arm], shares: Mapping[str, Estimate], mistakes: Mapping[str, Estimate]
) -> str:
    num = sum(record["num_mistakes"] for record in results.probes())
    fixed = repairs(shares, mistakes)
    helpless = [name for name in REMEDIES if name in shares and name not in fixed]
    beats = "more" if shares[ALONE][0] > results.level(NOISY) else "not more"
    sound = f", after learning from the sound one to {percent(mistakes['sound'])}%" if "sound" in mistakes else ""
    return (
        f"The misled teacher was taught an error that the student does not have, and keeps what the student lacks. Of the {num} "
        f"greedy answers that it gets wrong, the student before gives the same wrong answer to {percent(mistakes['student'])}%, "
        f"after learning from it to {percent(mistakes[ALONE])}%{sound}. Its accuracy ends at {percent(shares[ALONE])}%, {beats} "
        f"than the teacher's own {percent(results.level(NOISY))}%. Told apart as a repair, in accuracy and these mistakes, from "
        f"the misled teacher alone (with sampled tokens, where the remedy has these): {_names(arms, fixed)}. Not told apart: "
        f"{_names(arms, helpless) if helpless else 'none'}. "
        f"{_of_kdrl(results)}What differs from what is told: the error is planted, not grown."
    )


def _of_kdrl(results: Results) -> str:
    if not results.has("kdrl", "reward"):
        return ""
    more, alone = results.difference("kdrl", "reward"), results.difference("kdrl", ALONE_SAMPLED)
    return (
        f"Reward and reverse KL together (KDRL) are {percent(more)} points above reward alone and {percent(alone)} above the "
        "KL alone, here with a teacher that is wrong. "
    )


def _panels(
    results: Results, arms: Sequence[Arm], shares: Mapping[str, Estimate], mistakes: Mapping[str, Estimate]
) -> tuple[Panel, ...]:
    places = {float(place): arm.name for place, arm in enumerate(arms)}
    ticks = {place: name.replace("-", "\n") for place, name in places.items()}
    levels = {"student before": results.level("student"), "misled teacher": results.level(NOISY)}
    return (
        Panel("accuracy", "", "accuracy", [Line("accuracy", [(x, *shares[n]) for x, n in places.items()], joined=False)],
              levels=levels, ticks=ticks),
        Panel("the teacher's own mistakes", "", "same wrong answer",
              [Line("its mistake", [(x, *mistakes[n]) for x, n in places.items()], joined=False)],
              levels={"student before": mistakes["student"][0]}, ticks=ticks),
    )  # fmt: skip


EXPERIMENT = Experiment(
    name="teacher-noise",
    question="Does a student inherit its teacher's systematic error, and do several teachers or some reward repair that?",
    world="arithmetic",
    recipe={
        "rollout": {"prompts_per_step": 64, "samples_per_prompt": 1, "max_tokens": 64},
        "optim": {"warmup_steps": 10},
        "threads": 1,
        "steps": 40,
    },
    makers=(_planted("backwards", "backwards"), _planted("slips", "slips")),
    arms=ARMS,
    rates=(5e-4, 1e-3, 2e-3),
    dev_problems=256,
    extensions=1,
    seeds=5,
    quick_arms=("sound", ALONE, "and-sound", ALONE_SAMPLED, "and-reward"),
    models={
        "student": "arithmetic/student",
        "teacher": "arithmetic/teacher",
        NOISY: f"{OF_ARM}backwards",
        OTHER: f"{OF_ARM}slips",
    },
    data={
        "prompts": {"world": "arithmetic"},
        "backwards": {"world": "arithmetic", "options": {"backwards": 0.9}},
        "slips": {"world": "arithmetic", "options": {"slips": 0.1}},
    },
    probe=probe,
    claim=Claim(
        says="The teacher's systematic error is inherited, because the student is drawn to whatever the teacher says; several "
        "teachers, or some reward of the environment beside it, repair that. Told as a caveat; published beside it: reward and "
        "reverse KL together (KDRL) 2.6 points above reward alone and 1.1 above the KL alone.",
        source="[KDRL](https://arxiv.org/abs/2506.02208)",
        short="the teacher's systematic error is inherited; teachers mixed or some reward repair it",
    ),
    find=find,
)
