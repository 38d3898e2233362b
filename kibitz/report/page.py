"""Puts the sections together into a page that needs nothing else: no network, no other file.

Everything that models, recipes or folder names say is escaped by jinja2, reaches scripts only through JSON islands
in which no tag can be closed, and could not run if it slipped through: the page's security policy allows the page's
own scripts by their hashes and nothing else, and forbids every connection.
"""

import base64
import hashlib
import os
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from kibitz.report import costs, curves, formats, heatmap, summary
from kibitz.report.folder import Row, Run, dig_number, read_run, unique_names

HERE = Path(__file__).parent
STYLES = ("style.css", "heatmap.css", "live.css", "diagnosis.css")


def build(run_folders: list[Path], output: Path | None = None) -> Path:
    """Writes the report of one run, or of several side by side, and returns its path.

    Without `output` it is `report.html` in the run's folder, or next to the first folder if there are several."""
    if not run_folders:
        raise ValueError("A report needs at least one run folder.")
    folders = [Path(folder) for folder in run_folders]
    runs = [read_run(folder) for folder in folders]
    unique_names(runs)
    place = folders[0] if len(folders) == 1 else folders[0].resolve().parent
    return _write(Path(output) if output else place / "report.html", _report(runs))


def rollout_page(rows: list[Row]) -> str:
    """A page with the heat-map only, of annotated rollouts."""
    run = Run(name="Scored rollouts", rollouts=rows)
    return render("rollouts.html.j2", ["page.js", "heatmap.js"], heatmap=_heatmap([run]))


def summary_page(run: Run) -> str:
    """A page about one run without its curves: before and after, the heat-map where there are rollouts, costs as a table."""
    heat = _heatmap([run])
    values = _run(run)
    return render(
        "summary.html.j2",
        ["page.js", *(["heatmap.js"] if heat else [])],
        runs=[values],
        side_by_side=[],
        phases=costs.labels([values["costs"]]),
        costs=[],
        heatmap=heat,
    )


def _report(runs: list[Run]) -> str:
    drawn = {"curves": curves.charts(runs), "costs": [*costs.charts(runs), *costs.timelines(runs)]}
    compute_known = all(curves.compute_so_far(run, [0]) for run in runs)
    return render(
        "report.html.j2",
        ["plotly", "page.js", "heatmap.js", "charts.js"],
        runs=[_run(run) for run in runs],
        side_by_side=summary.side_by_side(runs),
        phases=costs.labels([costs.table(run) for run in runs]),
        title=formats.safe_lines(runs[0].name) if len(runs) == 1 else f"{len(runs)} runs compared",
        heatmap=_heatmap(runs),
        figures={chart["key"]: chart["figure"] for group in drawn.values() for chart in group},
        compute_known=compute_known,
        curves=drawn["curves"],
        costs=drawn["costs"],
    )


def _run(run: Run) -> dict[str, Any]:
    """Return what the templates need of one run."""
    return {
        "name": formats.safe_lines(run.name),
        "method": summary.title(run),
        "sentences": summary.sentences(run),
        "facts": summary.facts(run),
        "comparisons": summary.comparisons(run),
        "costs": costs.table(run),
        "memory": costs.memory(run),
        "alarms": [_alarm(alarm) for alarm in run.alarms],
        "notices": [formats.safe_lines(notice) for notice in run.notices],
        "details": _details(run),
        "recipe": formats.safe_lines(run.recipe_text),
        "shown": run.shown,
        "status": _status(run),
    }


def _alarm(alarm: Row) -> str:
    """Return the alarm of a collapse guard as one line."""
    words = [str(alarm.get(key) or "") for key in ("step", "name", "symptom", "remedy")]
    return formats.safe_lines("Step {}, {}: {}. {}".format(*words))


def _heatmap(runs: list[Run]) -> dict[str, Any] | None:
    """Return the values of the heat-map's template and the JSON that its script reads; None without any rollout."""
    found = [pair for run in runs for pair in heatmap.pairs(run.rollouts)]
    if not found:
        return None
    island = heatmap.island(runs)
    sides = [side for pair in found for side in pair.sides]
    return {
        "island": island,
        "levels": len(heatmap.LEVELS),
        "left_out": len(found) - sum(len(run["pairs"]) for run in island["runs"]),
        "facts": heatmap.fork_facts(found),
        "paired": any(len(pair.sides) > 1 for pair in found),
        "judged": any(heatmap.penalty(token) is not None for side in sides for token in heatmap.tokens(side)),
        "graded": any(heatmap.is_right(side) is not None for side in sides),
        "trained_on": any(row.get("held_out") is False for run in runs for row in run.evals),
    }


def _status(run: Run) -> str:
    """`Finished 22 November 2026, 8.3 s on cpu`."""
    parts = [str(run.info.get("status") or ""), _day(run.info.get("finished") or run.info.get("started"))]
    wall = costs.wall(run)
    device = run.info.get("device")
    parts += [f"· {formats.seconds(wall)}" if wall else "", f"on {device}" if device else ""]
    text = formats.safe_lines(" ".join(part for part in parts if part).removeprefix("· "))
    return text[:1].upper() + text[1:]


def _day(moment: Any) -> str:
    try:
        return datetime.fromisoformat(str(moment)).strftime("%-d %B %Y")
    except ValueError:
        return ""


def _details(run: Run) -> list[tuple[str, str]]:
    """Versions and the like, in words; what is unknown is left out."""
    entries = [("seed", run.recipe.get("seed")), *((key, _lines(value)) for key, value in run.info.items())]
    words = {"student_params": formats.count, "teacher_params": formats.count, "seconds": formats.seconds}
    return [
        (formats.safe_lines(key.replace("_", " ")), formats.safe_lines(words.get(key, str)(value)))
        for key, value in entries
        if value is not None
        and value != ""
        and not key.endswith("peak_bytes")
        and (key not in words or dig_number(run.info, key) is not None)
    ]


def _lines(value: Any) -> Any:
    """The notes and the earlier parts of a run as lines; other values as they are."""
    if not isinstance(value, list):
        return value
    return "\n".join(_part(entry) if isinstance(entry, dict) else str(entry) for entry in value)


def _part(part: Row) -> str:
    """`From step 0, 12.3 s, stopped: SIGTERM after step 40`."""
    words = f"From step {part.get('first_step')}, {formats.seconds(dig_number(part, 'seconds'))}, {part.get('status')}"
    return f"{words}: {part['ended_by']}" if part.get("ended_by") else words


def empty_heatmap(names: list[str]) -> dict[str, Any]:
    """The values of the heat-map's template for a page that gets its rollouts later, one run a name."""
    island = {"levels": heatmap.levels(), "runs": [{"name": name, "pairs": []} for name in names], "strings": []}
    return (
        {"island": island, "levels": len(heatmap.LEVELS), "left_out": 0, "facts": None}
        | dict.fromkeys(("paired", "judged", "graded"), True)
        | {"trained_on": False}
    )


def render_part(template: str, **values: Any) -> str:
    """A piece of a page, with everything that it says escaped."""
    return _environment().get_template(template).render(**values)


def render(template: str, scripts: list[str], connect: str = "", **values: Any) -> str:
    """A whole page. `connect` is whom its scripts may ask, by the word of the security policy; nobody, if it is empty."""
    sources = [get_plotlyjs() if name == "plotly" else (HERE / name).read_text(encoding="utf-8") for name in scripts]
    return render_part(
        template,
        styles=Markup("".join((HERE / name).read_text(encoding="utf-8") for name in STYLES)),
        scripts=[Markup(source) for source in sources],
        policy=_policy(sources, connect),
        **values,
    )


@cache
def _environment() -> Environment:
    environment = Environment(loader=PackageLoader("kibitz.report"), autoescape=True, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    environment.filters["many"] = formats.many
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return environment


def _policy(sources: list[str], connect: str) -> str:
    """Hashes are of the text between the script tags, byte for byte."""
    digests = [base64.b64encode(hashlib.sha256(source.encode()).digest()).decode() for source in sources]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    asked = f"connect-src {connect}; " if connect else ""
    return f"default-src 'none'; script-src {allowed}; {asked}style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'"


def _write(path: Path, page: str) -> Path:
    """Whole or not at all: a reader never meets half a page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(page, encoding="utf-8", errors="replace")
    return unfinished.replace(path)
