"""The data of an experiment: one recipe, arms that change it, and the models and problems that it is run on."""

import difflib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kibitz import config, worlds
from kibitz.config import Recipe

SPLITS = ("train", "dev", "test")
OF_ARM = "arm:"
"""Before the name of an arm, in the place of a model: the checkpoint that the arm left, of the same seed."""
BLANK = "blank:"
"""Before a shape, in the place of a model: `blank:64x3` has random weights, 64 wide and 3 layers deep."""
MADE = "made:"
"""Before a name of `Experiment.made`, in the place of a model or of a file of prompts: what that function leaves."""

TOY: Mapping[str, Any] = {
    "rollout": {"prompts_per_step": 64, "samples_per_prompt": 1, "max_tokens": 64},
    "optim": {"warmup_steps": 10},
    "threads": 1,
    "steps": 40,
}
"""The recipe that most experiments start from: 40 steps of 64 rollouts, seconds of one CPU core."""


@dataclass(frozen=True)
class Arm:
    """One way to train. `changes` go over the experiment's recipe, section by section; models are named by their role
    (`student`, `teacher`, or another of the experiment's), or as `arm:NAME`, the checkpoint of another arm.

    `rates` replaces the experiment's where an arm needs others. Of the arms of one `family` only the best on the dev
    split gets all seeds: so a batch size is chosen like a rate. `data` is the name of the experiment's data that it
    trains on. `every`: its checkpoints of so many steps are all measured on the dev split, a curve; with `stop: best`
    the best of them is the arm's result, not the last. `judge` names the measures whose mean accuracy on the dev
    split chooses rates and checkpoints, the first measure if empty. `measures`: the names of those of the experiment's
    that are taken of it, all if empty; the first of them is then its main one. `rate_of`: a maker or another arm, whose
    best rate it takes instead of sweeping one of its own.
    """

    name: str
    about: str
    changes: Mapping[str, Any]
    rates: tuple[float, ...] = ()
    family: str = ""
    data: str = "prompts"
    every: int = 0
    stop: str = "last"
    judge: tuple[str, ...] = ()
    measures: tuple[str, ...] = ()
    rate_of: str = ""

    def needs(self) -> list[str]:
        """The names of the arms whose checkpoints it is made of."""
        return list(
            dict.fromkeys(name.removeprefix(OF_ARM) for name in models_of(self.changes) if name.startswith(OF_ARM))
        )


@dataclass(frozen=True)
class Experiment:
    """A recipe without models, data, rate and seed; its arms; how they are measured; what they say about a claim.

    Every arm tries each of `rates` once, on seed 0, and the best on the dev split is run with all seeds and measured on
    the test split. `reference` is the arm that the others are compared with, if any.

    `models`: the role of each model and the shipped one it is on the toy world. `data`: the name of each source of
    prompts and its section of a recipe; a `limit` in it is how many problems are measured at most. `measures`: the name
    of each measure and the data it is taken on; the first is the main one. `runs_in`: the experiment in whose folder
    the runs are, where two ask different questions of the same runs; what a probe sees stays in its own.

    `until`: rates and batches are chosen not by accuracy, but by the FLOPs up to this share of the way from the student's
    accuracy to the teacher's, by the curves of the arms.

    `outside`: its models are not shipped, so that `all` leaves it out where nobody names a teacher.

    `makers`: arms that make a model which no world ships and a role stands for (`{"teacher-large": "arm:large"}` of
    `models`). They are run with seed 0, once, and only where nobody names another model for the role. `probe`: what is
    looked at beside training, or instead of it, for each seed, from the `Study` and the seed to a record. `made`: models and
    files of prompts that code writes, from the `Study` to the path, named `made:NAME` in recipes and data. `series`: metrics
    of each step that are kept with the record of a run. `play`: what runs in the place of arms where no language model has a part
    (`kibitz.experiments.played`); then arms, models and data are empty.

    `find`: what the results say about a published claim, from `Results` to a `Finding`. The claim itself, and the page, stand
    in the Markdown file beside the experiment's. An experiment without `find` compares its arms and claims nothing.
    """

    name: str
    question: str
    world: str
    recipe: Mapping[str, Any]
    arms: tuple[Arm, ...]
    rates: tuple[float, ...]
    reference: str = ""
    dev_problems: int = 512
    test_problems: int = 1024
    extensions: int = 2
    seeds: int = 3
    quick_arms: tuple[str, ...] = ()
    models: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    measures: Mapping[str, str] = field(default_factory=lambda: {"accuracy": "prompts"})
    series: tuple[str, ...] = ()
    runs_in: str = ""
    outside: bool = False
    until: float | None = None
    makers: tuple[Arm, ...] = ()
    made: Mapping[str, Callable[[Any], Path]] = field(default_factory=dict)
    probe: Callable[[Any, int], Mapping[str, Any]] | None = None
    play: Callable[[Any], None] | None = None
    find: Callable[[Any], Any] | None = None

    @property
    def roles(self) -> Mapping[str, str]:
        """role -> `world/model`."""
        return self.models or {role: f"{self.world}/{role}" for role in ("student", "teacher")}

    @property
    def sources(self) -> Mapping[str, Mapping[str, Any]]:
        """Name -> the `data` section on the toy worlds."""
        return self.data or {"prompts": {"world": self.world}}

    @property
    def home(self) -> str:
        """The folder of its runs below the results."""
        return self.runs_in or self.name

    def probed_in(self, folder: Path) -> Path:
        """The folder of what its probe sees, from that of its runs."""
        return folder.with_name(self.name) if self.runs_in else folder

    def quick(self) -> "Experiment":
        """The same in seconds, to see that all of it runs; its numbers say nothing."""
        arms, makers = (
            tuple(_quick(arm, self.recipe) for arm in arms) for arms in (self.choose(self.quick_arms), self.makers)
        )
        return replace(
            self, arms=arms, makers=makers, rates=self.rates[1:2] or self.rates, dev_problems=16, test_problems=16,
            extensions=0, seeds=1
        )  # fmt: skip

    def arm(self, name: str) -> Arm:
        """The arm, or the maker, of that name."""
        return next((arm for arm in self.makers if arm.name == name), None) or self.choose([name])[0]

    def choose(self, names: Sequence[str]) -> tuple[Arm, ...]:
        """The arms of these names, all if none is given."""
        known = {arm.name: arm for arm in self.arms}
        for name in names:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
                raise ValueError(f"{self.name} has no arm {name!r}; did you mean {near!r}? It has: {', '.join(known)}")
        return tuple(known[name] for name in names) or self.arms

    def around(self, rate: float) -> "Experiment":
        """The same with its sweep put around another learning rate, as other models need."""
        middle = self.rates[len(self.rates) // 2]
        arms = tuple(replace(arm, rates=tuple(r * rate / middle for r in arm.rates)) for arm in self.arms)
        return replace(self, rates=tuple(r * rate / middle for r in self.rates), arms=arms)


def _quick(arm: Arm, base: Mapping[str, Any]) -> Arm:
    rollout = merged(base, arm.changes).get("rollout", {})
    few = {"prompts_per_step": 4, "samples_per_prompt": min(2, rollout.get("samples_per_prompt", 1))}
    changes = merged(arm.changes, {"steps": 2, "rollout": few})
    return replace(arm, changes=changes, rates=arm.rates[:1], every=min(arm.every, 1))


@dataclass(frozen=True)
class Subject:
    """The models and the problems. `models`: for each role `world/name`, a model that the world ships, or a folder or
    hub name. `files`: for each named source of prompts a JSONL file in the world's place; none are the toy world's
    own. `overrides` are `a.b=value` of the recipe."""

    models: Mapping[str, str]
    world: str
    files: Mapping[str, str] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()

    @staticmethod
    def of(
        experiment: Experiment,
        models: Mapping[str, str | None] | None = None,
        files: Mapping[str, str] | None = None,
        overrides: Sequence[str] = (),
    ) -> "Subject":
        """The experiment's own world and its shipped models, where nothing else is named. Once a student is named,
        roles that are not are its; those called teacher something the teacher's. A file without a name, `""`, is for
        every source that has none of its own."""
        named = {role: name for role, name in (models or {}).items() if name is not None}
        known(experiment.name, "role", named, experiment.roles)
        files = files or {}
        known(experiment.name, "source of prompts", [name for name in files if name], experiment.sources)
        own = [name for name, section in experiment.sources.items() if name in files or not is_made(section)]
        found = {}
        for role, shipped in experiment.roles.items():
            kin = "teacher" if role.startswith("teacher") else "student"
            found[role] = named.get(role) or named.get(kin) or shipped
        if files and "" not in files and (bare := [name for name in own if name not in files]):
            raise ValueError(
                f"{experiment.name} also takes prompts from {', '.join(bare)}: give them files too, or one file without a "
                "name for all the others"
            )
        sources = {name: files.get(name) or files[""] for name in own} if files else {}
        return Subject(found, experiment.world, sources, tuple(overrides))

    @property
    def prompts(self) -> str | None:
        return next(iter(self.files.values()), None)

    def called(self, role: str) -> str:
        """The model that a role stands for; what is no role is a name already."""
        return self.models.get(role, role)

    def model(self, role: str) -> str:
        """Return the folder of a role's weights. A name that is no role is a folder or a hub name already."""
        name = self.called(role)
        world, _, shipped = name.partition("/")
        return str(worlds.get(world).checkpoint(shipped)) if world in worlds.WORLDS else name

    def section(self, experiment: Experiment, name: str) -> dict[str, Any]:
        """The `data` section that a source of prompts stands for."""
        return {"prompts": self.files[name]} if name in self.files else dict(experiment.sources[name])

    def recipe(self, experiment: Experiment, arm: Arm, rate: float, seed: int) -> Recipe:
        """The arm's recipe with roles in the place of models: what is written down with its result."""
        known(experiment.name, "source of prompts", [arm.data], experiment.sources)
        roles = {role: {"model": role} for role in ("student", "teacher") if role in experiment.roles}
        tree = merged(roles, experiment.recipe, arm.changes, {"optim": {"lr": rate}, "seed": seed})
        limit = tree.pop("data", {})
        recipe = config.load(tree | {"data": {**self.section(experiment, arm.data), **limit}}, self.overrides)
        if self.files or limit:
            return recipe
        return config.load(recipe, [f"data.limit={recipe.steps * recipe.rollout.prompts_per_step}"])


def known(experiment: str, what: str, names: Sequence[str] | Mapping[str, Any], all_of: Mapping[str, Any]) -> None:
    """Raise ValueError for a name that the experiment does not have."""
    for name in names:
        if name not in all_of:
            raise ValueError(f"{experiment} has no {what} {name!r}; it has: {', '.join(all_of)}")


def is_made(section: Mapping[str, Any]) -> bool:
    """Return True if a source of prompts is a file that the experiment's own code writes."""
    return str(section.get("prompts", "")).startswith(MADE)


def merged(*trees: Mapping[str, Any]) -> dict[str, Any]:
    """Later trees win, section by section; a method or a teacher is replaced as a whole, because settings of two do
    not mix."""
    whole: dict[str, Any] = {}
    for tree in trees:
        for name, section in tree.items():
            joins = isinstance(section, Mapping) and name not in ("method", "teacher")
            whole[name] = {**whole.get(name, {}), **section} if joins else section
    return whole


def models_of(tree: Any) -> Iterator[str]:
    """All names of models in a recipe or a part of one, in their order."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            if key == "model" and isinstance(value, str):
                yield value
            else:
                yield from models_of(value)
    elif isinstance(tree, list | tuple):
        for one in tree:
            yield from models_of(one)


def families(arms: Iterable[Arm]) -> list[list[Arm]]:
    """In the order of their first arms; an arm without a family is one of its own."""
    found: dict[str, list[Arm]] = {}
    for arm in arms:
        found.setdefault(arm.family or arm.name, []).append(arm)
    return list(found.values())


def shape(name: str) -> dict[str, int]:
    """Return the sizes that `blank:64x3` stands for: width 64 and 3 layers. The MLP is 8/3 as wide, rounded up to 16."""
    width, _, layers = name.removeprefix(BLANK).partition("x")
    inner = 16 * -(-int(width) * 8 // (3 * 16))
    return {"hidden_size": int(width), "num_hidden_layers": int(layers), "intermediate_size": inner}


def with_models(tree: Mapping[str, Any], place: Callable[[str], str]) -> dict[str, Any]:
    """A recipe's tree with every model's name replaced by `place(name)`."""

    def put(section: Any) -> Any:
        if isinstance(section, Mapping):
            return {**section, **({"model": place(section["model"])} if "model" in section else {})}
        return [put(one) for one in section] if isinstance(section, list) else section

    found = {name: put(section) if name in ("student", "teacher") else section for name, section in tree.items()}
    if "reference" in found.get("method", {}):
        found["method"] = found["method"] | {"reference": put(found["method"]["reference"])}
    return found


def cut(source: Path, folder: Path) -> None:
    """`train.jsonl`, `dev.jsonl` and `test.jsonl` of 80, 10 and 10% of a JSONL file. A row goes by a hash of its
    prompt, so no two splits share one."""
    if not source.is_file():
        raise ValueError(f"there is no file {source} to take prompts from: name one of JSON lines")
    parts: dict[str, list[str]] = {split: [] for split in SPLITS}
    for number, line in enumerate(source.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            asked = json.dumps(row.get("messages") or row["prompt"], sort_keys=True)
        except (json.JSONDecodeError, AttributeError, KeyError):
            raise ValueError(f"{source}, line {number} is no JSON object with a prompt or messages") from None
        bucket = hashlib.sha256(asked.encode()).digest()[0] % 10
        parts["dev" if bucket == 0 else "test" if bucket == 1 else "train"].append(line)
    if not all(parts.values()):
        raise ValueError(f"{source} is cut into train, dev and test, and one of them is empty: give it more prompts")
    folder.mkdir(parents=True, exist_ok=True)
    for split, lines in parts.items():
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
