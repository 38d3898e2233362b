"""Does a policy go beyond a mediocre teacher, and get there sooner, when it hears the teacher and the reward?"""

import random
from collections.abc import Mapping, Sequence
from math import inf
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
}
REFINED = ("rpd", "rpd-anneal")


# ------------------------------------------------------------------ what is run


def play(run: Play) -> None:
    """For each environment the teacher, then each arm: its rates with seed 0, the best of them with all seeds."""
    for name, env in ENVS.items():
        small = {"steps": 4096, "eval": {**EVAL, "episodes": 2, "last": 2}} if run.quick else {}
        teacher = merged(env["student"], env["teacher"], {"method": {"type": "ppo"}, "seed": TEACHER_SEED}, small)
        run.trained(f"{name}-teacher", "teacher", teacher, env=name, lr=teacher["ppo"]["lr"], seed=TEACHER_SEED)
        for seed in range(run.seeds):
            asked = merged(env["student"], {"seed": seed}, small)
            run.measured(f"{name}-teacher-{seed}", f"{name}-teacher", asked, env=name, seed=seed)
        for arm in ARMS:
            rates = RATES[:1] if run.quick else RATES
            sweep = [_run(run, name, arm, rate, 0, small) for rate in rates]
            best = max(sweep, key=score)["lr"]
            for seed in range(1, run.seeds):
                _run(run, name, arm, best, seed, small)


def _run(run: Play, env: str, arm: str, rate: float, seed: int, small: Mapping[str, Any]) -> Record:
    heard = {} if arm == "ppo" else {"teacher": {"run": f"{env}-teacher"}}
    tree = merged(ENVS[env]["student"], {"method": ARMS[arm], "ppo": {"lr": rate}, "seed": seed}, heard, small)
    return run.trained(f"{env}-{arm}-{rate:g}-{seed}", arm, tree, env=env, lr=rate, seed=seed)


def score(record: Record) -> float:
    """What chooses the rate: the mean return over the evaluations of the second half, of episodes that the result is not of."""
    curve = record["curve"]
    return fmean(mean for _, mean in curve[len(curve) // 2 :])


# ------------------------------------------------------------------ what came out


def find(results: Results) -> Finding:
    records = played(results.folder)
    envs = {env: _env(env, [r for r in records if r["env"] == env]) for env in ENVS}
    panels = [_panel(env, found) for env, found in envs.items()]
    numbers = {"envs": envs, "seeds": min(found["seeds"] for found in envs.values()), "rates": RATES}
    return Finding(verdict(list(envs.values())), numbers, panels)


def _env(env: str, records: Sequence[Record]) -> dict[str, Any]:
    """The numbers of one environment."""
    made = [r for r in records if r["policy"] == "teacher"]
    again = {r["seed"]: r for r in records if r["policy"] == "teacher again"}
    if not made or not again:
        raise NotRun(f"{env}-teacher")
    arms = {arm: _arm(env, arm, records, again) for arm in ARMS}
    theirs = [again[seed]["final"]["mean"] for seed in sorted(again)]
    for one in arms.values():
        one["above"] = _paired(one["finals"], theirs)
    best = max(REFINED, key=lambda arm: arms[arm]["last"])  # of episodes that the result is not of
    sooner = _ratio(arms["ppo"]["reached"], arms[best]["reached"], arms["ppo"]["budget"])
    beyond_opd = _paired(arms[best]["finals"], arms["opd"]["finals"])
    return {
        "teacher": (fmean(theirs), half_of_seeds(theirs)), "teacher_steps": made[0]["steps"], "arms": arms,
        "best": best, "above": arms[best]["above"], "sooner": sooner, "beyond_opd": beyond_opd, "opd_gap": arms["opd"]["above"],
        "seeds": len(arms[best]["finals"]), "beyond_ppo": _paired(arms[best]["finals"], arms["ppo"]["finals"]),
    }  # fmt: skip


def _arm(env: str, arm: str, records: Sequence[Record], again: Mapping[int, Record]) -> dict[str, Any]:
    runs = [r for r in records if r["policy"] == arm]
    sweep = [r for r in runs if r["seed"] == 0]
    if not sweep:
        raise NotRun(f"{env}-{arm}")
    rate = max(sweep, key=score)["lr"]
    chosen = sorted((r for r in runs if r["lr"] == rate), key=lambda r: r["seed"])
    finals = [r["final"]["mean"] for r in chosen]
    reached = [reaches(r["curve"], again[r["seed"]]["level"]) for r in chosen]
    curve = [
        (points[0][0], fmean(p[1] for p in points), half_of_seeds([p[1] for p in points]))
        for points in zip(*(r["curve"] for r in chosen), strict=False)
    ]
    return {
        "rate": rate, "last": fmean(r["curve"][-1][1] for r in chosen),
        "finals": finals, "final": (fmean(finals), half_of_seeds(finals)), "reached": reached,
        "num_reached": sum(steps < inf for steps in reached), "median_reached": median(reached), "curve": curve,
        "budget": max(r["steps"] for r in chosen), "gflop": fmean(r["gflop"] for r in chosen),
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
    """reproduced: everywhere the refined policy ends above its teacher and is at the teacher's level sooner than PPO, beyond the
    intervals, and distillation alone ends below the refined one. partly: some of it somewhere."""
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
    world="", recipe={}, arms=(), rates=(), seeds=5, play=play, find=find,
)  # fmt: skip
