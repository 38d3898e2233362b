"""Writes the pages of the documentation site into build/docs, from where zensical makes build/site: `make docs`.

    python docs/site.py [FOLDER]

The pages are those of docs/. Links to files of the repository lead to copies below `repository/`; the reference of the
recipe comes from its schema, that of the command line from typer, and the tutorial is the notebook as it has just run.
"""

import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
from nbclient import NotebookClient

DOCS = Path(__file__).parent
ROOT = DOCS.parent
BUILD = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "docs"
NOTEBOOK = ROOT / "examples" / "tutorial.ipynb"
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
FRAME = re.compile(r'(?P<begin><iframe [^>]*)srcdoc="(?P<page>[^"]*)"></iframe>')
LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<target>(?:\.\./)+[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")


def main() -> None:
    shutil.rmtree(BUILD, ignore_errors=True)
    for source in sorted(path for path in DOCS.rglob("*") if path.is_file()):
        place = BUILD / source.relative_to(DOCS)
        if source.suffix == ".md":
            put(place, linked(source.read_text(encoding="utf-8"), source, place))
        elif source.suffix in {".png", ".svg", ".gif"}:
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, place)
    schema = json.loads((ROOT / "recipe.schema.json").read_text(encoding="utf-8"))
    written = {
        "reference/recipe": fields(schema),
        "reference/cli": commands(),
        "tutorial": tutorial(BUILD / "tutorial"),
    }
    for name, more in written.items():
        page = BUILD / f"{name}.md"
        put(page, f"{page.read_text(encoding='utf-8')}\n{more}\n")


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def linked(text: str, source: Path, place: Path) -> str:
    """Return the page with links out of docs/ led to copies; a link to a folder, which has none, becomes its text."""

    def lead(match: re.Match[str]) -> str:
        path = (source.parent / match["target"]).resolve()
        if not path.exists():
            raise SystemExit(f"{source.relative_to(ROOT)}: there is no {match['target']}")
        if DOCS in path.parents:
            return match[0]
        if path.is_dir():
            return match["text"]
        name = path.relative_to(ROOT)
        # A page of Markdown would become a page of the site, with links of its own that lead nowhere.
        copy = BUILD / "repository" / (f"{name}.txt" if path.suffix == ".md" else name)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        depth = len(place.relative_to(BUILD).parts) - 1
        return f"[{match['text']}]({'../' * depth}{copy.relative_to(BUILD)})"

    return LINK.sub(lead, text)


def fields(schema: dict[str, Any]) -> str:
    """Return a table of the fields of every section of a recipe, with defaults."""
    lines = []
    for name, section in {"Recipe": schema, **schema["$defs"]}.items():
        if not section.get("properties"):
            continue
        about = section.get("description", "").split("\n\n")[0]
        lines += [
            "",
            f"## {name}",
            "",
            " ".join(about.split()),
            "",
            "| field | default | what it is |",
            "| --- | --- | --- |",
        ]
        for field, value in section["properties"].items():
            default = f"`{json.dumps(value['default'])}`" if "default" in value else "must be given"
            sections = dict.fromkeys(re.findall(r"#/\$defs/(\w+)", json.dumps(value)))
            links = " or ".join(f"[{section}](#{section.lower()})" for section in sections)
            text = " ".join(str(value.get("description", "")).split()).replace("|", "\\|")
            lines.append(f"| `{field}` | {'that of its fields' if len(default) > 40 else default} | {text or links} |")
    return "\n".join(lines)


def commands() -> str:
    """Return the help of every command, as typer writes it for documentation."""
    command = [sys.executable, "-m", "typer", "kibitz.cli", "utils", "docs", "--name", "kibitz"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout.split("\n", 1)[1].replace("\n# `kibitz`", "")


def tutorial(folder: Path) -> str:
    """Return the notebook as Markdown, run from top to bottom in a folder of its own.

    Into `folder` go a page for each cell that shows HTML, and the notebook with its outputs."""
    book = nbformat.read(NOTEBOOK, as_version=4)
    with TemporaryDirectory() as place:
        patient = {"timeout": 3600, "startup_timeout": 600, "iopub_timeout": 600}  # for a machine in use
        NotebookClient(book, **patient, resources={"metadata": {"path": place}}).execute()
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(book, folder / NOTEBOOK.name)
    parts = [book.cells[0].source.split("\n", 1)[1].strip()]  # without its heading, which the page has
    for number, cell in enumerate(book.cells[1:], start=1):
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        shown = [output["data"] for output in cell.outputs if "data" in output]
        plain = [
            COLOUR.sub("", data["text/plain"]).rstrip() for data in shown if not FRAME.search(data.get("text/html", ""))
        ]
        if plain:
            parts.append("```text\n" + "\n".join(plain) + "\n```")
        for frame in filter(None, (FRAME.search(data.get("text/html", "")) for data in shown)):
            put(folder / f"cell-{number}.html", html.unescape(frame["page"]))
            parts.append(f'{frame["begin"]}src="{folder.name}/cell-{number}.html" loading="lazy"></iframe>')
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
