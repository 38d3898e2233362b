"""Forking tokens: does the teacher punish the token where the reasoning goes wrong, or the wrong answer that it ends in?"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, median
from typing import Any

from kibitz.config import ModelConfig
from kibitz.data import load_grader, load_prompts
from kibitz.engines.torch import TorchEngine
from kibitz.evaluate.annotate import FORK_NATS, annotate
from kibitz.evaluate.evaluate import grade
from kibitz.experiments.charts import Heat, Line, Panel
from kibitz.experiments.design import Experiment
from kibitz.experiments.evidence import Finding, Verdict
from kibitz.experiments.records import Record, half_of_seeds, share_with_interval
from kibitz.experiments.results import NotRun, Results
from kibitz.experiments.statistics import Estimate
from kibitz.models.load import load_model, load_tokenizer, pick_device, stop_ids
from kibitz.report.heatmap import penalty
from kibitz.teachers.build import reader_of
from kibitz.types import Rollout, Sampling
from kibitz.worlds.arithmetic import first_wrong_step

ERRORS: dict[str, Callable[[str, str], int | None]] = {"arithmetic": first_wrong_step}
"""Worlds that know at which character a response stops being a derivation."""
RANKS, EXAMPLES, MOST = 8, 3, 0.8


# ------------------------------------------------------------------ what is looked at


def probe(study: Any, seed: int) -> Record:
    """The student's own wrong solutions on the test split, and what the teacher says of each of their tokens."""
    rows = wrong_solutions(study, seed)
    known = ERRORS.get(study.experiment.world) if not study.subject.files else None
    found = [one for row in rows if (one := _looked_at(row, known)) is not None]
    return {
        "num_problems": study.experiment.test_problems,
        "num_wrong": len(rows),
        "located": known is not None,
        "solutions": _summary(found),
        "examples": [_example(row) for row in _telling(rows)],
    }


def wrong_solutions(study: Any, seed: int) -> list[Record]:
    """Annotated; all solutions, where nobody can grade them."""
    recipe, device = study.untrained(), pick_device()
    student, teacher = (ModelConfig(model=study.place(role, seed)) for role in ("student", "teacher"))
    tokenizer = load_tokenizer(student, "student")
    ours, theirs = load_model(student, "student", device, tokenizer), load_model(teacher, "teacher", device)
    data = study.asked("prompts", "test", study.experiment.test_problems, recipe, None)
    prompts = load_prompts(data, tokenizer, seed)
    sampling = Sampling(max_tokens=recipe.rollout.max_tokens, stop_ids=stop_ids(ours, []), seed=seed)
    rollouts = TorchEngine(ours, recipe.rollout.max_rows).generate(prompts, sampling)
    rollouts = grade(load_grader(data, prompts), ours, rollouts)
    wrong = [rollout for rollout in rollouts if rollout.reward is None or rollout.reward < 1]
    return [row | {"at": _answer_at(r)} for row, r in
            zip(annotate(ours, reader_of(theirs, tokenizer, data.template), wrong, top=2), wrong, strict=True)]  # fmt: skip


def _answer_at(rollout: Rollout) -> int:
    """The last token that is no end of a sequence: of a solution, its answer."""
    return max(0, rollout.num_tokens - 1 - rollout.finished)


def _looked_at(row: Record, known: Callable[[str, str], int | None] | None) -> Record | None:
    """Return the penalties, in nats, of one solution: of the first wrong token, of the last token, and of the others. Without a
    judge of steps the token with the largest penalty stands for the first wrong one. None where no written step is wrong."""
    costs = [penalty(token) or 0.0 for token in row["tokens"]]
    worst = max(range(len(costs)), key=costs.__getitem__)
    wrong = worst if known is None else token_at(row["tokens"], known(row["prompt"], row["response"]))
    if wrong is None:
        return None
    return {
        "num_tokens": len(costs),
        "rank": sum(cost > costs[wrong] for cost in costs),
        "worst_is_later": worst > wrong,
        "wrong": costs[wrong],
        "answer": costs[row["at"]] if row["at"] > wrong else None,
        "answer_holds": row["at"] in holders(costs) if row["at"] > wrong else None,
        "others": [cost for place, cost in enumerate(costs) if place not in (wrong, row["at"])],
        "holders": len(holders(costs)) / len(costs),
    }


def token_at(tokens: Sequence[Record], character: int | None) -> int | None:
    """The token that a character of the text is in; the end of the text is the token after it, if one was written."""
    done = 0
    if character is None:
        return None
    for place, token in enumerate(tokens):
        special = token["text"].startswith("<") and token["text"].endswith(">") and len(token["text"]) > 1
        done += 0 if special else len(token["text"])
        if done > character or (special and done == character):
            return place
    return None


def holders(costs: Sequence[float], share: float = MOST) -> set[int]:
    """The fewest tokens that hold that share of all that was punished."""
    total, found = sum(cost for cost in costs if cost > 0), set()
    held = 0.0
    for place in sorted(range(len(costs)), key=lambda i: -costs[i]):
        if held >= share * total:
            break
        found.add(place)
        held += max(0.0, costs[place])
    return found


def _summary(found: list[Record]) -> Record:
    """Summarize all solutions of a seed; `num` is 0 if there are none."""
    if not found:
        return {"num": 0}
    later = [one for one in found if one["answer"] is not None]
    ranks = Counter(min(one["rank"], RANKS) for one in found)
    missed = [one for one in found if one["rank"]]
    return {
        "num": len(found),
        "exact": ranks[0] / len(found),
        "ranks": [ranks[rank] / len(found) for rank in range(RANKS + 1)],
        "later": fmean(one["worst_is_later"] for one in missed) if missed else 0.0,
        "median_rank": median(one["rank"] for one in found),
        "chance": fmean(1 / one["num_tokens"] for one in found),
        "tokens": fmean(one["num_tokens"] for one in found),
        "holders": fmean(one["holders"] for one in found),
        "wrong_nats": median(one["wrong"] for one in found),
        "other_nats": median(cost for one in found for cost in one["others"]) if any(o["others"] for o in found) else 0,
        "num_later": len(later),
        "answer_nats": median(one["answer"] for one in later) if later else 0.0,
        "answer_punished": fmean(one["answer"] > FORK_NATS for one in later) if later else 0.0,
        "answer_holds": fmean(one["answer_holds"] for one in later) if later else 0.0,
    }


def _telling(rows: list[Record]) -> list[Record]:
    """A few with a clear fork, of different lengths; the same ones for the same seed."""
    forked = sorted((row for row in rows if row["fork"] is not None), key=lambda row: len(row["tokens"]))
    return [forked[len(forked) * (2 * i + 1) // (2 * EXAMPLES)] for i in range(EXAMPLES)] if forked else rows[:EXAMPLES]


def _example(row: Record) -> Record:
    fork = row["fork"] if row["fork"] is not None else 0
    return {
        "prompt": row["prompt"],
        "answer": row["answer"],
        "fork": row["fork"],
        "instead": row["tokens"][fork]["teacher_top"][0][0],
        "tokens": [token["text"] for token in row["tokens"]],
        "nats": [round(penalty(token) or 0.0, 3) for token in row["tokens"]],
    }


# ------------------------------------------------------------------ what it says

MEASURED = ("exact", "chance", "later", "tokens", "median_rank", "wrong_nats", "answer_nats", "other_nats", "answer_punished",
            "holders")  # fmt: skip


def find(results: Results) -> Finding:
    """Report how often the first wrong token has the largest penalty, and how often the final answer is punished."""
    seeds = [record for record in results.probes() if record["solutions"]["num"]]
    if not seeds:
        raise NotRun("solution that is wrong")
    exact, answer = _share(seeds, "exact", "num"), _share(seeds, "answer_holds", "num_later")
    means = {name: _mean(seeds, name) for name in MEASURED}
    numbers = {
        "located": seeds[0]["located"],
        "num": sum(record["solutions"]["num"] for record in seeds),
        "wrong": sum(record["num_wrong"] for record in seeds),
        "seeds": len(seeds),
        "most": MOST,
        "fork_nats": FORK_NATS,
        "first": exact,
        "answer_holds": answer,
        "mean": means,
    }
    return Finding(verdict(exact, answer, means, seeds[0]["located"]), numbers, _panels(seeds))


def verdict(exact: Estimate, answer: Estimate, means: Mapping[str, Estimate], located: bool) -> Verdict:
    """Reproduced if the first wrong token is surely punished most in over half of the solutions, and the answer is among the
    tokens that hold most of the penalty in surely less than half. Where nobody knows the wrong token, partly at best."""
    alone = answer[0] + answer[1] < 0.5
    if not located:
        return "partly" if alone and means["holders"][0] < 0.5 else "not"
    if exact[0] - exact[1] > 0.5 and alone:
        return "reproduced"
    return "partly" if exact[0] > 3 * means["chance"][0] else "not"


def _panels(seeds: list[Record]) -> tuple[Panel | Heat, ...]:
    shares = [[record["solutions"]["ranks"][rank] for record in seeds] for rank in range(RANKS + 1)]
    points = [(float(rank), fmean(values), half_of_seeds(values)) for rank, values in enumerate(shares)]
    texts = []
    for one in seeds[0]["examples"]:
        instead = (
            ""
            if one["fork"] is None
            else f"; instead of {one['tokens'][one['fork']]} the teacher says {one['instead']}"
        )
        words = f"{one['prompt'][-40:]}, right is {one['answer']}{instead}"
        texts.append((words, list(zip(one["tokens"], one["nats"], strict=True))))
    ranks = Panel(
        "rank of the first wrong token among all penalties", "rank, 0 is the most punished", "wrong solutions",
        [Line("first wrong token", points)],
        levels={"chance": _mean(seeds, "chance")[0]},
        ticks={float(rank): str(rank) if rank < RANKS else f"{RANKS}+" for rank in range(RANKS + 1)},
    )  # fmt: skip
    heat = Heat("wrong solutions, each token by its penalty", texts)
    return (ranks, heat) if seeds[0]["located"] else (heat,)


def _mean(seeds: list[Record], name: str) -> Estimate:
    values = [record["solutions"][name] for record in seeds]
    return fmean(values), half_of_seeds(values)


def _share(seeds: list[Record], name: str, of: str) -> Estimate:
    """Return a share of the solutions with its interval. Seeds sample different problems, so all their solutions count."""
    total = sum(record["solutions"][of] for record in seeds)
    return share_with_interval([record["solutions"][name] for record in seeds], max(1, total))


EXPERIMENT = Experiment(
    name="forking",
    question="Does the teacher punish the token where the reasoning goes wrong, or the wrong answer that it ends in?",
    world="arithmetic",
    recipe={"rollout": {"max_tokens": 64}, "threads": 1},
    arms=(),
    rates=(1e-3,),
    test_problems=1024,
    seeds=5,
    probe=probe,
    find=find,
)
