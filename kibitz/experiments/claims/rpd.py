"""Does a policy go beyond a mediocre teacher, and get there sooner, when it hears the teacher and the reward?"""

import random
from collections.abc import Mapping, Sequence
from math import inf, log
from statistics import fmean, median
from typing import Any

from kibitz.experiments.charts import Line, Panel
from kibitz.experiments.design import Experiment, merged
from kibitz.experiments.evidence import Finding, Verdict
from kibitz.experiments.played import Play
from kibitz.experiments.records import Record, half_of_seeds, played
from kibitz.experiments.results import NotRun, Results
from kibitz.experiments.statistics import NUM_DRAWS, Estimate, interval

TEACHER_SEED = 1000
CHOOSING = 3
"""Seeds that choose: 0 each arm's rate, all three the better of the two refined policies. The result is of those after them."""
RATES = (1e-3, 3e-3)
ARMS: Mapping[str, Mapping[str, Any]] = {
    "ppo": {"type": "ppo"},
    "bc": {"type": "bc"},
    "opd": {"type": "opd"},
    "rpd": {"type": "rpd"},
    "rpd-anneal": {"type": "rpd", "anneal": 0.5},
}
PPO = {"batch": 512, "num_steps": 128}
EVAL = {"every": 2, "episodes": 10, "last": 50, "frames": 0}
ENVS: Mapping[str, Mapping[str, Any]] = {
    "pendulum": {
        "student": {
            "env": {"id": "Pendulum-v1", "num_envs": 16},
            "ppo": {**PPO, "gamma": 0.9},
            "eval": EVAL,
            "steps": 32_768,
        },
        "teacher": {"stop_at": -800.0, "steps": 100_000, "ppo": {"lr": 3e-3}},
    },
    "acrobot": {
        "student": {"env": {"id": "Acrobot-v1", "num_envs": 16}, "ppo": PPO, "eval": EVAL, "steps": 24_576},
        "teacher": {"stop_at": -250.0, "steps": 100_000, "ppo": {"lr": 1e-3}},
    },
    "reacher": {
        "student": {
            "env": {"id": "Reacher-v5", "num_envs": 32, "sparse_info": "reward_dist", "sparse_above": -0.05},
            "ppo": {"batch": 512, "num_steps": 64, "gamma": 0.95, "log_std": -1.0},
            "eval": {**EVAL, "every": 4, "episodes": 20},
            "steps": 65_536,
        },
        "teacher": {
            "env": {"sparse_info": None, "sparse_above": None},
            "ppo": {"lr": 1e-3, "gamma": 0.9},
            "eval": {"every": 8},
            "steps": 131_072,
        },
        "weight": 10.0,
    },
}
"""`weight`: lambda of the refined arms, where it is not 1. Actions on Reacher differ by so little that with 1 little is heard but
the reward."""
REFINED = ("rpd", "rpd-anneal")
QUICK = {
    "env": {"num_envs": 4, "options": {"max_episode_steps": 50}},
    "ppo": {"num_steps": 32, "batch": 64},
    "eval": {"every": 1, "episodes": 2, "last": 2},
    "steps": 256,
}
"""Two iterations, an evaluation after each."""
WHY = {"distribution": {**ARMS["rpd-anneal"]}, "action": {**ARMS["rpd-anneal"], "loss": "bc"}}
"""Acrobot's `rpd-anneal` once more, with all that the teacher says or with its likeliest action alone: whether the policies lose
the goal, or only their likeliest actions do."""
WHY_RATE = 1e-3


# ------------------------------------------------------------------ what is run


def play(run: Play) -> None:
    """The teachers; each arm's rates with seed 0; then each arm at its best, seed by seed, so that what is there is whole."""
    small = QUICK if run.quick else {}
    rates = RATES[:1] if run.quick else RATES
    best: dict[tuple[str, str], float] = {}
    for name, env in ENVS.items():
        teacher = merged(env["student"], env["teacher"], {"method": {"type": "ppo"}, "seed": TEACHER_SEED}, small)
        run.trained(f"{name}-teacher", "teacher", teacher, env=name, lr=teacher["ppo"]["lr"], seed=TEACHER_SEED)
        for arm in ARMS:
            sweep = [_run(run, name, arm, rate, 0, small) for rate in rates]
            best[name, arm] = max(sweep, key=score)["lr"]
    for seed in range(run.seeds):
        for name, env in ENVS.items():
            asked = merged(env["student"], {"seed": seed}, small)
            run.measured(f"{name}-teacher-{seed}", f"{name}-teacher", asked, env=name, seed=seed)
            for arm in ARMS:
                _run(run, name, arm, best[name, arm], seed, small)
    for seed in range(run.seeds)[CHOOSING:] or range(1):
        for heard in WHY:
            why(run, heard, seed, small)


def _run(run: Play, env: str, arm: str, rate: float, seed: int, small: Mapping[str, Any]) -> Record:
    heard = {} if arm == "ppo" else {"teacher": {"run": f"{env}-teacher"}}
    weight = {"weight": ENVS[env]["weight"]} if arm in REFINED and "weight" in ENVS[env] else {}
    method = {**ARMS[arm], **weight}
    tree = merged(ENVS[env]["student"], {"method": method, "ppo": {"lr": rate}, "seed": seed}, heard, small)
    return run.trained(f"{env}-{arm}-{rate:g}-{seed}", arm, tree, env=env, lr=rate, seed=seed)


def why(run: Play, heard: str, seed: int, small: Mapping[str, Any]) -> Record:
    """An annealed run on Acrobot that hears the teacher's distribution, or its action."""
    changes = {"method": WHY[heard], "ppo": {"lr": WHY_RATE}, "seed": seed, "teacher": {"run": "acrobot-teacher"}}
    tree = merged(ENVS["acrobot"]["student"], changes, small)
    return run.trained(f"why-{heard}-{seed}", f"why: {heard}", tree, env="acrobot", lr=WHY_RATE, seed=seed)


def score(record: Record) -> float:
    """What chooses the rate: the mean return over the evaluations of the second half, of episodes that the result is not of."""
    curve = record["curve"]
    return fmean(mean for _, mean in curve[len(curve) // 2 :])


# ------------------------------------------------------------------ what came out


def find(results: Results) -> Finding:
    records = played(results.folder)
    there = [env for env in ENVS if any(r["env"] == env for r in records)] or list(ENVS)[:1]
    envs = {env: _env(env, [r for r in records if r["env"] == env]) for env in there}
    panels = [_panel(env, found) for env, found in envs.items()]
    numbers = {
        "envs": envs, "seeds": [found["seeds"] for found in envs.values()], "rates": RATES, "choosing": CHOOSING,
        "fresh": all(found["fresh"] for found in envs.values()), "why": _why(records),
        "weights": {env: ENVS[env]["weight"] for env in there if "weight" in ENVS[env]},
    }  # fmt: skip
    return Finding(verdict(list(envs.values())), numbers, panels)


def _env(env: str, records: Sequence[Record]) -> dict[str, Any]:
    """The numbers of one environment."""
    made = [r for r in records if r["policy"] == "teacher"]
    again = {r["seed"]: r for r in records if r["policy"] == "teacher again"}
    if not made or not again:
        raise NotRun(f"{env}-teacher")
    rates = {arm: _rate(env, arm, records) for arm in ARMS}
    runs = {arm: {r["seed"]: r for r in records if r["policy"] == arm and r["lr"] == rates[arm]} for arm in ARMS}
    whole = [seed for seed in sorted(again) if all(seed in by_seed for by_seed in runs.values())]
    fresh = [seed for seed in whole if seed >= CHOOSING] or whole
    heard = [seed for seed in range(CHOOSING) if all(seed in runs[arm] for arm in REFINED)]
    choosing = heard or whole
    last = {arm: fmean(runs[arm][seed]["curve"][-1][1] for seed in choosing) for arm in REFINED}
    arms = {arm: _arm([runs[arm][seed] for seed in fresh], rates[arm], again) for arm in ARMS}
    theirs = [again[seed]["final"]["mean"] for seed in fresh]
    for one in arms.values():
        one["above"] = _paired(one["finals"], theirs)
    best = max(REFINED, key=lambda arm: last[arm])
    sooner = _ratio(arms["ppo"]["reached"], arms[best]["reached"], arms["ppo"]["budget"])
    return {
        "teacher": (fmean(theirs), half_of_seeds(theirs)), "teacher_steps": made[0]["steps"], "arms": arms,
        "best": best, "above": arms[best]["above"], "sooner": sooner, "opd_gap": arms["opd"]["above"],
        "beyond_opd": _paired(arms[best]["finals"], arms["opd"]["finals"]), "seeds": len(fresh),
        "beyond_ppo": _paired(arms[best]["finals"], arms["ppo"]["finals"]), "fresh": fresh[0] >= CHOOSING,
    }  # fmt: skip


def _why(records: Sequence[Record]) -> dict[str, Any] | None:
    """Acrobot's annealed runs by what they heard: returns with the likeliest actions and with drawn ones, and the entropy; None
    where they were not run."""
    heard = {name: [r for r in records if r["policy"] == f"why: {name}"] for name in WHY}
    teacher = next(
        (r["sampled"] for r in records if r["policy"] == "teacher" and "sampled" in r and r["env"] == "acrobot"), None
    )
    if teacher is None or not all(heard.values()):
        return None
    found = {}
    for name, runs in heard.items():
        finals, drawn = [r["final"]["mean"] for r in runs], [r["sampled"]["mean"] for r in runs]
        found[name] = {
            "final": (fmean(finals), half_of_seeds(finals)), "sampled": (fmean(drawn), half_of_seeds(drawn)),
            "least": min(finals), "entropy": fmean(r["sampled"]["entropy"] for r in runs),
            "seeds": len(runs),
        }  # fmt: skip
    return {**found, "teacher": teacher, "most": log(3), "rate": WHY_RATE}


def _rate(env: str, arm: str, records: Sequence[Record]) -> float:
    """The rate that is better with seed 0."""
    sweep = [r for r in records if r["policy"] == arm and r["seed"] == 0]
    if not sweep:
        raise NotRun(f"{env}-{arm}")
    return max(sweep, key=score)["lr"]


def _arm(runs: Sequence[Record], rate: float, again: Mapping[int, Record]) -> dict[str, Any]:
    finals = [r["final"]["mean"] for r in runs]
    reached = [reaches(r["curve"], again[r["seed"]]["level"]) for r in runs]
    curve = [
        (points[0][0], fmean(p[1] for p in points), half_of_seeds([p[1] for p in points]))
        for points in zip(*(r["curve"] for r in runs), strict=False)
    ]
    return {
        "rate": rate, "finals": finals, "final": (fmean(finals), half_of_seeds(finals)), "reached": reached,
        "num_reached": sum(steps < inf for steps in reached), "median_reached": median(reached), "curve": curve,
        "budget": max(r["steps"] for r in runs), "gflop": fmean(r["gflop"] for r in runs),
    }  # fmt: skip


def reaches(curve: Sequence[Sequence[float]], level: float) -> float:
    """The steps after which an evaluation is first at the level; infinite if none is."""
    return next((steps for steps, mean in curve if mean >= level), inf)


def _paired(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """The mean difference, seed by seed, and half its 95% interval."""
    found = [above - below for above, below in zip(ours, theirs, strict=True)]
    return fmean(found), half_of_seeds(found)


def _ratio(slow: Sequence[float], fast: Sequence[float], budget: float) -> tuple[float, float, float]:
    """How many times as many steps the slow arm takes on average, with a bootstrap over seeds. A run that never
    arrives counts with its whole budget, so the ratio is a lower bound; one that is there at step 0 counts as one step."""
    counted = [[max(1.0, min(steps, budget)) for steps in arm] for arm in (slow, fast)]
    rng = random.Random(0)
    draws = [
        fmean(rng.choices(counted[0], k=len(slow))) / fmean(rng.choices(counted[1], k=len(fast)))
        for _ in range(NUM_DRAWS)
    ]
    return (fmean(counted[0]) / fmean(counted[1]), *interval(draws))


def verdict(envs: Sequence[Mapping[str, Any]]) -> Verdict:
    """Of the seeds that chose nothing. reproduced: everywhere the refined policy ends above its teacher and is at the teacher's
    level sooner than PPO, beyond the intervals, and distillation alone ends below the refined one. partly: some of it."""
    held = [
        (env["above"][0] > env["above"][1], env["sooner"][1] > 1, env["beyond_opd"][0] > env["beyond_opd"][1])
        for env in envs
    ]
    if all(all(env) for env in held):
        return "reproduced"
    return "partly" if any(any(env) for env in held) else "not"


def _panel(env: str, found: Mapping[str, Any]) -> Panel:
    lines = [Line(arm, [(x / 1000, y, half) for x, y, half in one["curve"]]) for arm, one in found["arms"].items()]
    return Panel(
        env, "thousand steps of the environment", "mean return", lines, {"teacher": found["teacher"][0]}, percent=False
    )


EXPERIMENT = Experiment(
    name="rpd",
    question="Does a policy go beyond a mediocre teacher, and sooner, when it hears the teacher and the reward?",
    world="", recipe={}, arms=(), rates=(), seeds=8, play=play, find=find,
)  # fmt: skip
