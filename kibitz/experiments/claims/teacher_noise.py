"""A teacher with a mistake of its own: does the student inherit it, and do a second teacher or some reward repair that?"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from kibitz.config import ModelConfig
from kibitz.data import load_grader, load_prompts
from kibitz.engines.torch import TorchEngine
from kibitz.evaluate.evaluate import grade
from kibitz.experiments.design import OF_ARM, TOY, Arm, Experiment
from kibitz.experiments.evidence import Finding, Verdict
from kibitz.experiments.make_world import MISLED
from kibitz.experiments.records import Record, share_with_interval
from kibitz.experiments.results import NotRun, Results
from kibitz.experiments.shapes import compared
from kibitz.experiments.statistics import Estimate, apart
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
    wrong = [rollout for rollout in written if rollout.reward is not None and rollout.reward < 1]
    mistakes = [rollout for rollout in wrong if _can_be_repeated(rollout, grader)]
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


def _can_be_repeated(mistake: Rollout, grader: Grader) -> bool:
    """Return whether a mistake is an answer at all: a text that says nothing, or nothing readable, cannot be made again."""
    try:
        grader(as_answer(mistake), "")
    except ValueError:
        return False
    return True


def as_answer(mistake: Rollout) -> Prompt:
    """The problem as if what was written were its answer: its last line in a toy world; graders of text find it themselves."""
    answer = mistake.text.rpartition("=")[2]
    return replace(mistake.prompt, answer=answer, columns={**mistake.prompt.columns, "answer": answer})


# ------------------------------------------------------------------ what it says


def inherited(results: Results, name: str, what: str = "mistake") -> Estimate:
    """Return the share of the misled teacher's wrong problems that a model answers with the same mistake."""
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
    """Report the answers of each arm to the problems that the misled teacher gets wrong."""
    arms = {arm.name: arm.about for arm in results.experiment.arms if results.has(arm.name)}
    shares = {name: results.accuracy(name) for name in arms}
    if ALONE not in shares:
        raise NotRun(ALONE)
    mistakes, right = (
        {name: inherited(results, name, what) for name in ("student", *arms)} for what in ("mistake", "right")
    )
    fixed, kdrl = repairs(shares, mistakes), results.has("kdrl", "reward")
    levels = {role: results.level(role) for role in ("student", "teacher", NOISY, OTHER)}
    numbers = {
        "num": sum(record["num_mistakes"] for record in results.probes()),
        "mistakes": mistakes,
        "end": shares[ALONE],
        "levels": {
            "student": levels["student"],
            "sound": levels["teacher"],
            "misled": levels[NOISY],
            "slips": levels[OTHER],
        },
        "repaired": [arms[name] for name in fixed],
        "repairing": fixed,
        "unrepaired": [arms[name] for name in REMEDIES if name in shares and name not in fixed],
        "over_reward": results.difference("kdrl", "reward") if kdrl else None,
        "over_kl": results.difference("kdrl", ALONE_SAMPLED) if kdrl else None,
        "rows": [(about, shares[name], right[name], mistakes[name]) for name, about in arms.items()],
        "student_right": right["student"],
    }
    before = {"student before": levels["student"], "misled teacher": levels[NOISY]}
    return Finding(
        verdict(shares, mistakes),
        numbers,
        (
            compared("accuracy", "accuracy", list(arms), {"accuracy": shares}, levels=before),
            compared("the teacher's own mistakes", "same wrong answer", list(arms), {"its mistake": mistakes},
                     levels={"student before": mistakes["student"][0]}),
        ),
    )  # fmt: skip


EXPERIMENT = Experiment(
    name="teacher-noise",
    question="Does a student inherit its teacher's systematic error, and do several teachers or some reward repair that?",
    world="arithmetic",
    recipe=TOY,
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
    find=find,
)
