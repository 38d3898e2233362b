"""The head of the report: two sentences made from the recipe, and the measures before and after training."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from kibitz.config import DIVERGENCE_TITLES, METHOD_CONFIGS, TEACHER_CONFIGS, MethodConfig
from kibitz.report.costs import total, total_flops, wall
from kibitz.report.curves import main_split
from kibitz.report.folder import Row, Run, dig, dig_number
from kibitz.report.formats import DASH, change, count, flops, many, percent, plain, safe_lines, seconds

UNTOLD = "The student {student} was trained on {prompts} ({method})."
UNTOLD_TEACHER = "The student {student} learnt from the teacher {teacher} on {prompts} ({method})."
"""Of a method whose section tells no story."""


# ------------------------------------------------------------------ the two sentences


def title(run: Run) -> str:
    """The method's name for a reader: `On-policy distillation`, or its type in the recipe."""
    if run.info.get("title"):
        return safe_lines(str(run.info["title"]))
    kind = str(dig(run.recipe, "method", "type") or "")
    section = METHOD_CONFIGS.get(kind, MethodConfig)
    return section.title or (safe_lines(kind) if kind else "A run")


def sentences(run: Run) -> list[Markup]:
    """Return the sentences that say what was done and how much of it; one sentence for an unreadable recipe."""
    if not run.recipe:
        return [Markup("The recipe of this run cannot be read, so the report cannot say what was done.")]
    return [_what(run), *_how_much(run)]


def _what(run: Run) -> Markup:
    if run.info.get("story"):
        return Markup("{}").format(safe_lines(str(run.info["story"])))
    names = {
        "student": _code(_model(run.recipe.get("student"))),
        "teacher": _code(_model(run.recipe.get("teacher"))),
        "prompts": _prompts(run.recipe.get("data")),
        "divergence": _divergence(run.recipe.get("method")),
        "method": title(run),
    }
    section = METHOD_CONFIGS.get(str(dig(run.recipe, "method", "type")), MethodConfig)
    story = section.stories.get(str(dig(run.recipe, "method", "source")), section.story)
    text = story or (UNTOLD_TEACHER if run.recipe.get("teacher") else UNTOLD)
    return Markup(text).format(**names)


def _how_much(run: Run) -> list[Markup]:
    planned, done = dig_number(run.recipe, "steps"), run.last_step
    if not planned and not done:
        return []
    rollout = run.recipe.get("rollout")
    per_step = dig_number(rollout, "prompts_per_step")
    samples = dig_number(rollout, "samples_per_prompt")
    size = f" of {many(per_step, 'prompt')}" if per_step else ""
    unit = safe_lines(str(run.info.get("unit") or "step"))
    if per_step and (samples or 1) > 1:
        size += f" with {many(samples, 'response')} each"
    if planned and done < planned:
        are = "is" if done == 1 else "are"
        text = f"It was to take {many(planned, unit)}{size}, and {count(done)} of them {are} on record."
    else:
        text = f"It took {many(done or planned, unit)}{size}."
    return [Markup("{}").format(text)]


def _model(spec: Any) -> str:
    """A model's name from a recipe: a dict with `model`, or with the key of another kind of teacher; a bare name; or several
    teachers."""
    if isinstance(spec, list):
        return ", ".join(_model(entry) for entry in spec)
    if isinstance(spec, dict):
        kind = next((key for key in ("model", *TEACHER_CONFIGS) if spec.get(key)), None)
        if (kind is not None and not isinstance(spec[kind], str)) or kind == "student":
            return f"{kind}: {spec[kind]}"
        spec = spec.get(kind) if kind is not None else None
    parts = str(spec or "without a name").rstrip("/").split("/")
    return "/".join(parts[-2:])  # of a long path its end, and hub names as they are


def _prompts(data: Any) -> Markup:
    world, prompts = dig(data, "world"), dig(data, "prompts")
    if world:
        return Markup("problems from the world {}").format(_code(str(world)))
    return Markup("the prompts of {}").format(_code(str(prompts))) if prompts else Markup("prompts")


def _divergence(method: Any) -> str:
    titles: Mapping[str, str] = {**DIVERGENCE_TITLES}
    kind, support = dig(method, "divergence") or "reverse_kl", dig(method, "support") or "full"
    name = titles.get(str(kind), safe_lines(str(kind)))
    match support:
        case "full":
            return f"{name} between the two at each token, over the whole vocabulary"
        case "top_k":
            return f"{name} between the two at each token, over the likeliest tokens and all others as one"
        case "sampled":
            return f"{name} between the two, estimated on the sampled tokens"
    return f"{name} between the two at each token, over the support {safe_lines(str(support))}"


def _code(name: str) -> Markup:
    return Markup("<code>{}</code>").format(safe_lines(name))


# ------------------------------------------------------------------ before and after


@dataclass
class Cell:
    """One measure of one evaluation, in words; `low` and `high` place it on a line from 0 to 1 where it is a share."""

    text: str = DASH
    interval: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass
class Measure:
    """A line of the table. `verdict` is `better`, `worse`, or empty where neither can be said."""

    label: str
    before: Cell
    after: Cell
    change: str
    share: bool
    verdict: str = ""
    remark: str = ""

    @property
    def empty(self) -> bool:
        return self.before.value is None and self.after.value is None


@dataclass
class Comparison:
    """Before and after on one split. `asked` says how many prompts or episodes, and whether they are held out."""

    split: str
    asked: str
    first_step: int
    last_step: int
    measures: list[Measure]

    @property
    def shares(self) -> bool:
        """Whether any measure is a share, and has a place on the line from 0 to 1."""
        return any(measure.share for measure in self.measures)

    @property
    def intervals(self) -> bool:
        """Whether any figure has one."""
        return any(cell.interval for measure in self.measures for cell in (measure.before, measure.after))


def comparisons(run: Run) -> list[Comparison]:
    """One for each split, the one evaluated most often first. A split evaluated once has no before."""
    found = []
    main = main_split(run)
    for split in sorted({str(row.get("split")) for row in run.evals}, key=lambda name: (name != str(main), name)):
        rows = [row for row in run.evals if str(row.get("split")) == split]
        measures = [measure for measure in _measures(rows[0], rows[-1]) if not measure.empty]
        name = "" if split == "None" else safe_lines(split)
        found.append(Comparison(name, _asked(rows[-1]), int(rows[0]["step"]), int(rows[-1]["step"]), measures))
    return found


def is_held_out(row: Row) -> bool:
    """Whether an evaluation is of prompts on which the student does not learn."""
    return row.get("held_out") is not False


def _asked(row: Row) -> str:
    episodes = dig_number(row, "num_episodes")
    if episodes is not None:
        return many(episodes, "episode")
    return many(dig_number(row, "num_prompts"), "held-out prompt" if is_held_out(row) else "training prompt")


def _measures(before: Row, after: Row) -> list[Measure]:
    tries = dig(after, "pass_at_k")
    powers = [k for k in tries if str(k) != "1"] if isinstance(tries, dict) else []
    return [
        _measure("Mean return of an episode", before, after, "return", "mean"),
        _measure("Accuracy, sampled at T = 1", before, after, "sampled", "accuracy", share=True),
        _measure("Accuracy, greedy", before, after, "greedy", "accuracy", share=True),
        *(
            _measure(f"Right in at least one of {safe_lines(str(k))} tries", before, after, "pass_at_k", k, share=True)
            for k in powers
        ),
        _measure("Reverse KL to the teacher, nats per token", before, after, "reverse_kl", lower_is_better=True),
        _measure("Response length, tokens", before, after, "response_tokens", neutral=True),
        _measure("Responses cut off at the limit", before, after, "cut_off", share=True, lower_is_better=True),
    ]


def _measure(
    label: str,
    before: Row,
    after: Row,
    *path: str,
    share: bool = False,
    lower_is_better: bool = False,
    neutral: bool = False,
) -> Measure:
    if before is after:
        before = {}
    first, last = _cell(before, path, share), _cell(after, path, share)
    measure = Measure(label, first, last, change(first.value, last.value, points=share), share)
    if first.value is not None and last.value is not None and first.value != last.value and not neutral:
        measure.verdict = "worse" if (last.value > first.value) == lower_is_better else "better"
    if first.interval and last.interval and _overlap(first, last):
        measure.verdict, measure.remark = "", "intervals overlap"
    return measure


def _overlap(a: Cell, b: Cell) -> bool:
    return (a.low or 0.0) <= (b.high or 0.0) and (b.low or 0.0) <= (a.high or 0.0)


def _cell(row: Row, path: tuple[str, ...], share: bool) -> Cell:
    value = dig_number(row, *path)
    known = path[-1] in ("accuracy", "mean")
    low, high = (dig_number(row, *path[:-1], edge) if known else None for edge in ("low", "high"))
    interval = ""
    if low is not None and high is not None:
        interval = f"{100 * low:.1f}–{percent(high)}" if share else f"{plain(low)} to {plain(high)}"
    return Cell(percent(value) if share else plain(value), interval, value, low, high)


# ------------------------------------------------------------------ the figures on top of the page


def facts(run: Run) -> list[tuple[str, str, str]]:
    """Up to four figures for the top of the page: what it is, the figure, a word on it."""
    found = []
    for comparison in comparisons(run)[:1]:
        for measure in comparison.measures:
            if measure.label.startswith(("Mean return", "Accuracy, sampled", "Reverse KL")):
                label = measure.label.split(",")[0].removesuffix(" to the teacher")
                was = f"was {measure.before.text}" if measure.before.value is not None else ""
                found.append((label, measure.after.text, was))
    tokens = total(run, "num_tokens")
    if tokens is not None:
        found.append(("Tokens learnt from", count(tokens), f"in {many(run.last_step, 'step')}"))
    if total_flops(run) is not None:
        found.append(("Compute", flops(total_flops(run)), f"in {seconds(wall(run))}" if wall(run) else ""))
    return found


@dataclass
class SideBySide:
    """A table of several runs on one split: for each measure one entry a run."""

    title: str
    intervals: bool
    rows: list[tuple[str, list[Measure | None]]]


def side_by_side(runs: list[Run]) -> list[SideBySide]:
    """One table for each split of any of the runs, and apart for prompts that are held out and those of training."""
    per_run = [{(c.split, "training" in c.asked): c for c in comparisons(run)} for run in runs]
    tables = []
    for split, trained in dict.fromkeys(key for found in per_run for key in found):
        there = [found.get((split, trained)) for found in per_run]
        columns = [{} if c is None else {m.label: m for m in c.measures} for c in there]
        labels = dict.fromkeys(label for column in columns for label in column)
        rows = [(label, [column.get(label) for column in columns]) for label in labels]
        words = [f"Split {split}"] * bool(split) + ["training prompts"] * trained
        tables.append(SideBySide(", ".join(words), any(c is not None and c.intervals for c in there), rows))
    return tables
