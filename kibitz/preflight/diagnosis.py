"""A diagnosis without training: the student answers, the teacher comments, and what on-policy distillation could gain is told.

    found = diagnose(recipe, num_prompts=128)

Five looks at the same prompts. The student's own answers with the teacher's word on every token; the teacher's own answers;
what the teacher makes of beginnings of the student's answers (P(the teacher finishes right from the student's prefix) predicts
what OPD can gain: ReOrder-OPD, 2608.10905); the overlap of their likeliest tokens (2604.13016); and the clock of all that.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from statistics import fmean, quantiles
from typing import Any

from kibitz import worlds
from kibitz.config import LocalTeacherConfig, Recipe, StoredTeacherConfig
from kibitz.data import apart, joined
from kibitz.engines import Engine
from kibitz.evaluate.annotate import annotate
from kibitz.evaluate.evaluate import accuracy, grade
from kibitz.methods import teacher_engine
from kibitz.preflight import advice, forks, measured
from kibitz.preflight.forks import Answer
from kibitz.training.setup import Setup, prepare
from kibitz.types import Rollout

CUTS = (0.25, 0.5, 0.75)
"""Shares of the student's answers from which the teacher goes on."""
EXAMPLES = 24
AT_A_TIME = 32
Note = Callable[[str], object]


def diagnose(recipe: Recipe, num_prompts: int, price: float | None = None, note: Note = str) -> dict[str, Any]:
    """All findings as one tree that JSON can hold: `numbers`, `contexts`, `tokens`, `tasks`, `examples` (rows as in
    rollouts.jsonl), and `recipe`, the text of the one that follows. `note` is told what is being done."""
    if any(isinstance(one, StoredTeacherConfig) or not one.answers() for one in recipe.teachers):
        raise ValueError(
            "teacher: a diagnosis needs one that scores the student's new answers, which a chat endpoint and stored scores "
            "cannot: write --teacher FOLDER-OR-NAME, or teacher.url"
        )
    note("loading the models")
    setup = prepare(_asked(recipe, num_prompts), overwrite=True)
    try:
        return _diagnosed(setup, recipe, price, note)
    finally:
        setup.close()


def _asked(recipe: Recipe, num_prompts: int) -> Recipe:
    """The recipe for the answers of a diagnosis: one to each of so many prompts, as long as a world's answers are, unless the
    person says otherwise."""
    told, rollout = recipe.rollout.model_fields_set, {}
    if "samples_per_prompt" not in told:
        rollout["samples_per_prompt"] = 1
    if "max_tokens" not in told and recipe.data.world is not None:
        rollout["max_tokens"] = worlds.get(recipe.data.world).longest_response
    data = {"limit": min(num_prompts, recipe.data.limit or num_prompts)}
    changes = {"data": recipe.data.model_copy(update=data), "rollout": recipe.rollout.model_copy(update=rollout)}
    return recipe.model_copy(update=changes)


def _diagnosed(setup: Setup, recipe: Recipe, price: float | None, note: Note) -> dict[str, Any]:
    assert setup.parts.teacher is not None
    note("the student answers")
    began = time.perf_counter()
    rollouts = _write(setup, setup.engine)
    clock = {"writing": (time.perf_counter() - began) / len(rollouts)}
    note("the teacher reads")
    means, clock["reading"] = _means(setup, rollouts)
    answers = _answers(setup, rollouts)
    gain, after = _gain(setup, rollouts, answers, note)
    lengths = [rollout.num_tokens for rollout in rollouts]
    numbers = {
        "num_prompts": len(setup.stream.prompts),
        "num_answers": len(rollouts),
        "num_tokens": sum(lengths),
        "response_tokens": fmean(lengths),
        "most_tokens": _ninety_nine(lengths),
        "cut_off": fmean(rollout.cut_off for rollout in rollouts),
        "worst_percent": forks.share_of_worst(answers),
        **means,
        **gain,
    }
    found = forks.contexts(answers)
    tokens = forks.by_token(answers)
    examples, places = _examples(found, tokens, answers)
    note("what would be trained")
    shown = annotate(setup.parts.student, setup.parts.teacher, [rollouts[i] for i in examples])
    return {
        "student": recipe.student.model,
        "teacher": ", ".join(
            str(getattr(one, "model", None) or one.name or type(one).__name__) for one in recipe.teachers
        ),
        "numbers": numbers,
        "contexts": [asdict(one) | {"places": places(one.places)} for one in found],
        "tokens": [row | {"places": places(row["places"])} for row in tokens],
        "tasks": _with_teacher(forks.by_task(answers), after),
        "examples": shown,
        **advice.advise(setup, recipe, numbers, clock, price),
    }


def _write(setup: Setup, engine: Engine) -> list[Rollout]:
    """One answer to each prompt, or as many as the recipe says, at its temperature."""
    sampling = replace(setup.parts.sampling, seed=setup.parts.recipe.seed)
    prompts = setup.stream.prompts
    rollouts = joined(prompts, engine.generate(apart(prompts), sampling))
    return grade(setup.grader, setup.parts.student, rollouts)


def _means(setup: Setup, rollouts: Sequence[Rollout]) -> tuple[dict[str, float], float]:
    """The mean over all tokens of what a run would log at its first step, and the seconds that reading an answer takes."""
    began, size = time.perf_counter(), setup.parts.recipe.optim.tokens_per_micro_batch
    signals = setup.parts.teacher.score(rollouts, size)
    values = measured.values_of(setup.parts.student, rollouts, signals, measured.criterion_for(signals), size)
    names = ("reverse_kl", "student_entropy", "teacher_entropy", "top_k_overlap", "overlap_mass")
    found = {name: values[name].mean().item() for name in names if name in values}
    return found, (time.perf_counter() - began) / len(rollouts)


def _answers(setup: Setup, rollouts: Sequence[Rollout]) -> list[Answer]:
    """What the search for contexts looks at, some rollouts at a time: whole rows of many long ones would fill the memory."""
    student, found = setup.parts.student, []
    for start in range(0, len(rollouts), AT_A_TIME):
        part = rollouts[start : start + AT_A_TIME]
        for rollout, row in zip(part, annotate(student, setup.parts.teacher, part, top=1), strict=True):
            found.append(
                _answer(rollout, row["tokens"], [_text(student, i) for i in rollout.prompt.ids[-forks.WINDOW :]])
            )
    return found


def _text(student: Any, token: int) -> str:
    return student.tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _answer(rollout: Rollout, tokens: list[dict[str, Any]], before: list[str]) -> Answer:
    penalty = [0.0 if t["teacher_logp"] is None else t["student_logp"] - t["teacher_logp"] for t in tokens]
    return Answer(
        rollout.prompt.task,
        before,
        [token["text"] for token in tokens],
        [token["teacher_top"][0][0] if token["teacher_top"] else "" for token in tokens],
        [token["reverse_kl"] for token in tokens],
        penalty,
        rollout.reward,
    )


def _ninety_nine(lengths: Sequence[int]) -> int:
    return round(quantiles(lengths, n=100)[98]) if len(lengths) > 1 else lengths[0]


# ------------------------------------------------------------------ what can be gained


def _gain(
    setup: Setup, rollouts: list[Rollout], answers: Sequence[Answer], note: Note
) -> tuple[dict[str, Any], list[Rollout]]:
    """Accuracies with their intervals, who is right where the other is wrong, and what the teacher makes of beginnings; and the
    teacher's own answers. Without a grader, or a teacher that can go on with the student's tokens, less is known."""
    if setup.grader is None or all(rollout.reward is None for rollout in rollouts):
        return {}, []
    found: dict[str, Any] = {"accuracy": accuracy(rollouts)}
    if not all(section.writes() for section in setup.parts.recipe.teachers):
        return found, []
    note("the teacher answers")
    engine = teacher_engine(setup.parts)
    own = _write(setup, engine)
    found |= {"teacher_accuracy": accuracy(own), "both": _both(rollouts, own)}
    if not _goes_on(setup):
        return found, own
    note("the teacher goes on with what the student began")
    found["prefixes"] = [
        {"share": cut, **accuracy(_finished(setup, engine, rollouts, [round(cut * r.num_tokens) for r in rollouts]))}
        for cut in CUTS
    ]
    wrong = [
        (r, answer.fork) for r, answer in zip(rollouts, answers, strict=True) if r.reward is not None and r.reward < 1
    ]
    forked = [(rollout, fork) for rollout, fork in wrong if fork is not None]
    found |= {"wrong": len(wrong), "forked": len(forked)}
    if forked:
        mended = _finished(setup, engine, [rollout for rollout, _ in forked], [fork for _, fork in forked])
        gains = sum(
            max(0.0, (new.reward or 0.0) - (old.reward or 0.0)) for new, (old, _) in zip(mended, forked, strict=True)
        )
        found |= {"mended": gains / len(forked), "predicted": found["accuracy"]["accuracy"] + gains / len(rollouts)}
    return found, own


def _goes_on(setup: Setup) -> bool:
    """Whether the teacher can write behind the student's own tokens: a model of the same vocabulary in this process that reads
    the same prompt."""
    (section, *others) = setup.parts.recipe.teachers
    alike = isinstance(section, LocalTeacherConfig) and section.tokenizer != "own" and section.context is None
    return alike and not others


def _both(rollouts: Sequence[Rollout], own: Sequence[Rollout]) -> dict[str, int]:
    """The answers by who is right: `both`, `teacher`, `student`, `neither`."""
    counts: dict[str, int] = {"both": 0, "teacher": 0, "student": 0, "neither": 0}
    for ours, theirs in zip(rollouts, own, strict=True):
        if ours.reward is not None and theirs.reward is not None:
            right = ours.reward >= 1, theirs.reward >= 1
            names = {
                (True, True): "both",
                (False, True): "teacher",
                (True, False): "student",
                (False, False): "neither",
            }
            counts[names[right]] += 1
    return counts


def _finished(setup: Setup, engine: Engine, rollouts: Sequence[Rollout], cuts: Sequence[int]) -> list[Rollout]:
    """The student's beginnings, up to `cuts` tokens, with the teacher's ends, graded as whole answers."""
    prompts, sampling = [], replace(setup.parts.sampling, num_samples=1, seed=setup.parts.recipe.seed)
    for number, (rollout, cut) in enumerate(zip(rollouts, cuts, strict=True)):
        ids = (*rollout.prompt.ids, *rollout.response_ids[:cut])
        prompts.append(replace(rollout.prompt, ids=ids, key=f"{rollout.prompt.key}/{number}/{cut}"))
    ends = engine.generate(prompts, sampling)
    whole = [
        replace(end, prompt=rollout.prompt, response_ids=[*rollout.response_ids[:cut], *end.response_ids])
        for rollout, cut, end in zip(rollouts, cuts, ends, strict=True)
    ]
    return grade(setup.grader, setup.parts.student, whole)


def _with_teacher(tasks: list[dict[str, Any]], own: Sequence[Rollout]) -> list[dict[str, Any]]:
    for row in tasks:
        rewards = [r.reward for r in own if r.prompt.task == row["task"] and r.reward is not None]
        row["teacher"] = fmean(rewards) if rewards else None
    return tasks


# ------------------------------------------------------------------ examples


def _examples(
    found: list[forks.Context], tokens: list[dict[str, Any]], answers: Sequence[Answer]
) -> tuple[list[int], Callable[[Sequence[forks.Place]], list[forks.Place]]]:
    """The answers that are shown, those that contexts and tokens point to first; and how their places are called on the page."""
    wanted = [one.places for one in found] + [row["places"] for row in tokens]
    rounds = [places[i] for i in range(forks.EXAMPLES) for places in wanted if i < len(places)]
    by_nats = sorted(range(len(answers)), key=lambda a: -sum(answers[a].nats))
    chosen = list(dict.fromkeys([a for a, _ in rounds] + by_nats))[:EXAMPLES]
    number = {answer: place for place, answer in enumerate(chosen)}
    return chosen, lambda places: [(number[a], t) for a, t in places if a in number]
