"""A real model reads an invented company's handbook, forgets to follow instructions, and gets that back from its earlier self."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any

from kibitz.experiments import handbook, real
from kibitz.experiments.charts import Panel
from kibitz.experiments.claims.assistant import verdict
from kibitz.experiments.design import Arm, Experiment
from kibitz.experiments.evidence import Finding, Verdict
from kibitz.experiments.records import measure, share_with_interval
from kibitz.experiments.results import Results
from kibitz.experiments.shapes import compared
from kibitz.experiments.statistics import Estimate

BOTH = ("questions", "instructions")
WAYS = {"sampled": "temperature 1", "greedy": "greedy"}
MIXED = 70  # percent of documents; the rest is chat, which the model as it was answers
LEARNT, RECOVERED = f"documents-{MIXED}", f"recover-{MIXED}"
POLICIES = ("sentence", "german")
LEARNING, RECOVERING, ADAPTING = (4e-4,), (1e-4, 2e-4), (2e-3, 4e-3)
PUBLISHED = {"student": "18 / 85", "documents-100": "43 / 45", LEARNT: "36 / 79", RECOVERED: "41 / 83"}
OPD = {"teacher": {"model": "teacher"}, "method": {"type": "opd"}, "steps": 24}
LONG = 64  # steps of a recovery
FILLED = {"teacher": {"model": "teacher"}, "method": {"type": "sft", "fill": "teacher"}}


# ------------------------------------------------------------------ what it says


def find(results: Results) -> Finding:
    """The loss of instruction following in learning, its recovery by OPD, and the facts lost in the recovery: of each seed, at
    temperature 1 and greedy."""
    abouts = {arm.name: arm.about for arm in results.experiment.arms}
    names = [name for name in abouts if not name.startswith("policy") and results.has(name)]
    seeds = min(len(results.runs(LEARNT)), len(results.runs(RECOVERED)))
    changes = [_changes(results, how, seed) for how in WAYS for seed in range(seeds)]
    verdicts: set[Verdict] = {verdict(one["learnt"], one["lost"], one["back"], one["facts"]) for one in changes}
    rows = {name: {one: known(results, name, one) for one in BOTH} for name in names}
    numbers = {
        "student": {name: results.level("student", name=name) for name in BOTH},
        "greedy": {name: results.level("student", "greedy", name) for name in BOTH},
        "published": PUBLISHED,
        "changes": changes,
        "learnt": rows[LEARNT],
        "recovered": rows[RECOVERED],
        "documents": MIXED,
        "rows": [(name, abouts[name], by, {one: known(results, name, one, "greedy") for one in BOTH},
                  (results.mean(name, lambda run: run["test"]["measures"]["chat"]["reverse_kl"])[0], 0.0))
                 for name, by in rows.items()],
        "second": [(name, abouts[name], [known(results, name, "questions-2", how) for how in WAYS])
                   for name in names if name.endswith("learn-2")],
        "policies": [_of_policy(results, policy) for policy in POLICIES if results.has(f"policy-{policy}")],
        "seeds": seeds,
        "num": results.model("student")["num_prompts"],
        "instructed": measure(results.model("student"), "instructions")["num_prompts"],
    }  # fmt: skip
    panels = tuple(_panel(results, names, how) for how in WAYS)
    return Finding(verdicts.pop() if len(verdicts) == 1 else "partly", numbers, panels)


def _panel(results: Results, names: Sequence[str], how: str) -> Panel:
    series = {one: {name: known(results, name, one, how) for name in names} for one in BOTH}
    before = {f"{one} before": results.level("student", how, one) for one in BOTH}
    return compared(WAYS[how], "accuracy", names, series, levels=before)


def _changes(results: Results, how: str, seed: int) -> dict[str, Any]:
    return {
        "how": WAYS[how],
        "seed": seed,
        "learnt": changed(results, None, LEARNT, "questions", how, seed),
        "lost": changed(results, None, LEARNT, "instructions", how, seed),
        "back": changed(results, LEARNT, RECOVERED, "instructions", how, seed),
        "facts": changed(results, LEARNT, RECOVERED, "questions", how, seed),
    }


def changed(
    results: Results, before: str | None, after: str, name: str, how: str = "sampled", seed: int = 0
) -> Estimate:
    """The change of an accuracy from an arm (or the model as it was) to another, of one seed. Its interval is that of the
    problems of both, as if they had met different ones."""

    def of_one(arm: str | None) -> Estimate:
        if arm is None:
            return share_with_interval([results.level("student", how, name)], _num(results.model("student"), name))
        run = results.runs(arm)[seed]["test"]
        return share_with_interval([measure(run, name)[how]["accuracy"]], _num(run, name))

    (mean, half), (now, wide) = of_one(before), of_one(after)
    return now - mean, (half**2 + wide**2) ** 0.5


def known(results: Results, arm: str, name: str, how: str = "sampled") -> Estimate:
    """An accuracy, mean over seeds, with the interval of its problems alone: an interval of two seeds says nothing."""
    share = fmean(results.shares(arm, how, name))
    return share_with_interval([share], _num(results.runs(arm)[0]["test"], name))


def _num(measured: Any, name: str) -> int:
    return measure(measured, name)["num_prompts"]


def _of_policy(results: Results, policy: str) -> dict[str, Any]:
    """How often each policy is obeyed: by the model as it was, by its prompted self, and by the student that learnt from that."""
    return {
        "system": handbook.words()["policies"][policy]["system"],
        "before": [results.level("student", how, policy) for how in WAYS],
        "told": [results.level("student", how, f"{policy}-told") for how in WAYS],
        "after": [known(results, f"policy-{policy}", policy, how) for how in WAYS],
    }


# ------------------------------------------------------------------ arms


def _reading(name: str, about: str, data: str, **changes: Any) -> Arm:
    alone = data.startswith("documents-100")
    measures = (*BOTH, "chat") if not data.endswith("-2") else ("questions-2", "questions", "instructions", "chat")
    whole = ({} if alone else FILLED) | changes
    return Arm(name, about, whole, data=data, judge=measures[:1], measures=measures)


def _recovery(name: str, about: str, start: str) -> Arm:
    changes = OPD | {"student": {"model": f"arm:{start}"}, "steps": LONG}
    measures = ("questions-2", *BOTH, "chat") if start.endswith("-2") else (*BOTH, "chat")
    arm = Arm(name, about, changes, data="practised", judge=BOTH, measures=measures)
    return replace(arm, rates=RECOVERING) if name == RECOVERED else replace(arm, rate_of=RECOVERED)


def _policy(name: str) -> Arm:
    told = {"model": "teacher", "context": {"system": handbook.words()["policies"][name]["system"]}}
    about = f"OPD from itself with a policy in the teacher's system prompt: {name}"
    measures = (name, *(other for other in POLICIES if other != name))
    return Arm(f"policy-{name}", about, OPD | {"teacher": told}, rates=RECOVERING, measures=measures)


def _arms() -> tuple[Arm, ...]:
    lora = {"student": {"model": "student", "lora": {"rank": 16}}}
    return (
        _reading("documents-100", "documents alone", "documents-100"),
        replace(_reading(LEARNT, f"{MIXED}% documents, {100 - MIXED}% chat", LEARNT), rates=LEARNING),
        replace(_reading("lora-70", f"{MIXED}% documents, by LoRA", LEARNT, **lora), rates=ADAPTING),
        _recovery(RECOVERED, f"{MIXED}% documents, then OPD from the model as it was", LEARNT),
        _recovery("recover-100", "documents alone, then OPD", "documents-100"),
        replace(
            _reading("learn-2", "then a second handbook", f"{LEARNT}-2", student={"model": f"arm:{RECOVERED}"}),
            rate_of=LEARNT,
        ),
        _recovery("recover-learn-2", "then OPD again", "learn-2"),
        *(_policy(name) for name in POLICIES),
    )


def _told(name: str) -> dict[str, Any]:
    return {
        "prompts": f"made:{name}",
        "grader": "constraints_strict",
        "limit": 48,
        "system": handbook.words()["policies"][name]["system"],
    }


def _graded(name: str) -> dict[str, Any]:
    return {"prompts": f"made:{name}", "grader": "constraints_strict"}


EXPERIMENT = Experiment(
    name="real-assistant",
    question="Can a real model learn a company's handbook, and get back by OPD the instruction following that it lost meanwhile?",
    world="",
    recipe={
        "method": {"type": "sft"},
        "rollout": {"prompts_per_step": 8, "samples_per_prompt": 1, "max_tokens": 52},
        "optim": {"warmup_steps": 2},
        "steps": 60,
        "threads": 1,
        "device": "cpu",
    },
    arms=_arms(),
    rates=LEARNING,
    extensions=0,
    dev_problems=24,
    test_problems=192,
    seeds=2,
    quick_arms=("documents-100", LEARNT, RECOVERED, "learn-2", "policy-sentence"),
    models={"student": "made:itself", "teacher": "made:whole"},
    data={
        "prompts": {"prompts": "made:prompts"},
        "chat": {"prompts": "made:prompts", "limit": 24},
        "practised": {"prompts": "made:practised"},
        "documents-100": {"prompts": "made:documents-100"},
        LEARNT: {"prompts": f"made:{LEARNT}"},
        f"{LEARNT}-2": {"prompts": f"made:{LEARNT}-2"},
        **{name: _graded(name) for name in ("questions", "questions-2", "instructions")},
        **{name: _graded(name) | {"limit": 48} for name in POLICIES},
        **{f"{name}-told": _told(name) for name in POLICIES},
    },
    measures={
        "questions": "questions",
        "instructions": "instructions",
        "questions-2": "questions-2",
        "chat": "chat",
        **{name: name for name in (*POLICIES, *(f"{policy}-told" for policy in POLICIES))},
    },
    made={
        "itself": real.itself,
        "whole": real.whole,
        "prompts": real.prompts,
        "practised": handbook.train_file("practised", handbook.practised),
        "documents-100": handbook.train_file("documents-100", partial(handbook.documents, 1)),
        LEARNT: handbook.train_file(LEARNT, partial(handbook.mixed, 1, MIXED)),
        f"{LEARNT}-2": handbook.train_file(f"{LEARNT}-2", partial(handbook.mixed, 2, MIXED)),
        "questions": handbook.held_out("questions", partial(handbook.questions, 1)),
        "questions-2": handbook.held_out("questions-2", partial(handbook.questions, 2)),
        "instructions": handbook.held_out("instructions", handbook.demands),
        **{name: handbook.held_out(name, partial(handbook.obeyed, name)) for name in POLICIES},
    },
    outside=True,
    find=find,
)
