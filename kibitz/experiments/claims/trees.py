"""Can a policy be a tree or a formula that a person reads, and what do the student's own states and their weights add?"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from kibitz.experiments.charts import Line, Panel
from kibitz.experiments.design import Experiment, merged
from kibitz.experiments.evidence import Finding, Verdict
from kibitz.experiments.played import Play
from kibitz.experiments.records import Record, half_of_seeds, played
from kibitz.experiments.results import NotRun, Results
from kibitz.experiments.statistics import Estimate

WANTED = 475.0  # what gymnasium calls solved, of 500
TEACHER_SEED = 1000
EVAL = {"every": 5, "episodes": 20, "last": 100, "frames": 0}
TEACHERS: Mapping[str, Mapping[str, Any]] = {
    "cartpole": {
        "env": {"id": "CartPole-v1"},
        "ppo": {"lr": 1e-3, "num_steps": 128},
        "stop_at": 500.0,
        "steps": 100_000,
    },
    "acrobot": {"env": {"id": "Acrobot-v1"}, "ppo": {"lr": 1e-3}, "stop_at": -85.0, "steps": 100_000},
}
STUDENTS: Mapping[str, Mapping[str, Any]] = {
    "depth 1": {"type": "tree", "depth": 1},
    "depth 2": {"type": "tree", "depth": 2},
    "depth 3": {"type": "tree", "depth": 3},
    "2 terms": {"type": "polynomial", "terms": 2},
    "4 terms": {"type": "polynomial", "terms": 4},
    "linear": {"type": "linear"},
    "symbolic": {"type": "symbolic", "population": 200, "generations": 8},
}
TREES, FORMULAS = ("depth 1", "depth 2", "depth 3"), ("2 terms", "4 terms", "linear", "symbolic")
DEPTHS = (1, 2, 4)
LOOP = {"iterations": 6, "steps": 1000, "validation": 10, "most": 3000}
LOOPS = ("bc", "dagger", "viper")
QUICK_ENV = {"num_envs": 4, "options": {"max_episode_steps": 50}}
QUICK_LOOP = {"iterations": 2, "steps": 100, "validation": 1}


# ------------------------------------------------------------------ what is run


def play(run: Play) -> None:
    small = {"env": QUICK_ENV, "steps": 512, "eval": {"episodes": 2, "last": 2}} if run.quick else {}
    for env, tree in TEACHERS.items():
        whole = merged({"eval": EVAL}, tree, {"method": {"type": "ppo"}, "seed": TEACHER_SEED}, small)
        run.trained(f"{env}-teacher", "teacher", whole, env=env, seed=TEACHER_SEED)
    for seed in range(run.seeds):
        for name, student in STUDENTS.items():
            tried = {"population": 20, "generations": 2} if run.quick and name == "symbolic" else {}
            _run(run, "cartpole", name, {**student, **tried}, "viper", seed)
        for depth in DEPTHS[:2] if run.quick else DEPTHS:
            for loop in LOOPS:
                _run(run, "acrobot", f"{loop} {depth}", {"type": "tree", "depth": depth}, loop, seed)


def _run(run: Play, env: str, name: str, student: Mapping[str, Any], loop: str, seed: int) -> Record:
    method = {"type": loop, **LOOP, **(QUICK_LOOP if run.quick else {})}
    tree = {
        "env": {**TEACHERS[env]["env"], **(QUICK_ENV if run.quick else {})}, "teacher": {"run": f"{env}-teacher"},
        "student": dict(student), "method": method, "eval": {"last": 2 if run.quick else 100},
        "seed": seed,
    }  # fmt: skip
    return run.distilled(f"{env}-{name.replace(' ', '-')}-{seed}", name, tree, env=env, seed=seed)


# ------------------------------------------------------------------ what came out


def find(results: Results) -> Finding:
    records = whole_seeds(played(results.folder))
    teachers = {r["env"]: r["final"]["mean"] for r in records if r["policy"] == "teacher"}
    if set(teachers) != set(TEACHERS):
        raise NotRun("teachers")
    students = {name: _of(records, "cartpole", name) for name in STUDENTS}
    depths = sorted(
        {r["settings"]["student"]["depth"] for r in records if r["env"] == "acrobot" and r["policy"] != "teacher"}
    )
    loops = {loop: {depth: _of(records, "acrobot", f"{loop} {depth}") for depth in depths} for loop in LOOPS}
    viper = loops["viper"]
    numbers = {
        "teachers": teachers, "students": students, "loops": loops, "depths": depths, "wanted": WANTED,
        "best_tree": chosen(students, TREES), "tree": students[chosen(students, TREES)],
        "best_formula": chosen(students, FORMULAS), "formula": students[chosen(students, FORMULAS)], "loop": LOOP,
        "exported": sum(r["exported"]["mean"] == r["final"]["mean"] for r in records if "exported" in r),
        "exports": sum("exported" in r for r in records), "seeds": len(students["depth 3"]["finals"]),
        "own_states": _over_depths(loops["dagger"], loops["bc"]), "weights": _over_depths(viper, loops["dagger"]),
    }  # fmt: skip
    found = verdict(students, numbers["own_states"], numbers["weights"])
    return Finding(found, numbers, [_cartpole(students, teachers["cartpole"]), _acrobot(loops, teachers["acrobot"])])


def whole_seeds(records: Sequence[Record]) -> list[Record]:
    """The teachers, and the students of the seeds for which there are all students; of all seeds, if there is no such seed."""
    names = {(r["env"], r["policy"]) for r in records if r["policy"] != "teacher"}
    seeds = {r["seed"] for r in records}
    there = {(r["seed"], r["env"], r["policy"]) for r in records}
    whole = {seed for seed in seeds if all((seed, *name) in there for name in names)}
    return [r for r in records if r["policy"] == "teacher" or r["seed"] in (whole or seeds)]


def _of(records: Sequence[Record], env: str, name: str) -> dict[str, Any]:
    """A student's numbers over seeds, and the rules of the seed that was best in validation."""
    runs = sorted((r for r in records if r["env"] == env and r["policy"] == name), key=lambda r: r["seed"])
    if not runs:
        raise NotRun(f"{env} {name}")
    finals = [r["final"]["mean"] for r in runs]
    best = max(runs, key=lambda r: r["validation"])
    sizes = {key: fmean(r[key] for r in runs) for key in ("leaves", "terms", "nodes") if key in runs[0]}
    alike = [r["agreement_on_own_states"] for r in runs]
    return {
        "finals": finals, "final": (fmean(finals), half_of_seeds(finals)), "least": min(finals), "rules": best["rules"].strip(),
        "validation": fmean(r["validation"] for r in runs),
        "agreement": (fmean(alike), half_of_seeds(alike)), "sizes": sizes, "size": next(iter(sizes.values())),
    }  # fmt: skip


def _over_depths(ours: Mapping[int, Any], theirs: Mapping[int, Any]) -> Estimate:
    """The mean difference in return over all depths, seed by seed, and half its interval over seeds."""
    by_seed = [
        fmean(ours[depth]["finals"][seed] - theirs[depth]["finals"][seed] for depth in ours)
        for seed in range(min(len(one["finals"]) for one in (*ours.values(), *theirs.values())))
    ]
    return fmean(by_seed), half_of_seeds(by_seed)


def chosen(students: Mapping[str, Any], names: Sequence[str]) -> str:
    """The student that is best in validation, of equals the first: of episodes that the result is not of."""
    return max(names, key=lambda name: students[name]["validation"])


def verdict(students: Mapping[str, Any], own_states: Estimate, weights: Estimate) -> Verdict:
    """reproduced: on CartPole the tree of depth 3 or less and the formula that are best in validation solve it in the mean of all
    seeds, and on Acrobot DAgger is above cloning and VIPER above DAgger, beyond the intervals. partly: some of these."""
    solved = [students[chosen(students, names)]["final"][0] >= WANTED for names in (TREES, FORMULAS)]
    several = len(students[TREES[0]]["finals"]) > 1  # one seed has no interval that a gain could be beyond
    held = [*solved, *(several and gain[0] > gain[1] for gain in (own_states, weights))]
    return "reproduced" if all(held) else "partly" if any(held) else "not"


def _cartpole(students: Mapping[str, Any], teacher: float) -> Panel:
    """A point for each student; the ticks name them."""
    points = [(float(place), *one["final"]) for place, one in enumerate(students.values())]
    ticks = {float(place): name.replace("depth ", "tree ") for place, name in enumerate(students)}
    levels = {"teacher": teacher, "solved": WANTED}
    return Panel(
        "CartPole", "student", "mean return", [Line("VIPER", points, joined=False)], levels, percent=False, ticks=ticks
    )


def _acrobot(loops: Mapping[str, Any], teacher: float) -> Panel:
    lines = [Line(loop, [(float(d), *one["final"]) for d, one in by.items()]) for loop, by in loops.items()]
    return Panel("Acrobot", "depth of the tree", "mean return", lines, {"teacher": teacher}, percent=False)


EXPERIMENT = Experiment(
    name="trees",
    question="Can a policy be a tree or a formula that a person reads, and what do the student's own states add?",
    world="", recipe={}, arms=(), rates=(), seeds=5, play=play, find=find,
)  # fmt: skip
