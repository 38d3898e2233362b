"""Rows of a file, a data set or a toy world, each with the name that an error calls it by."""

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from kibitz import worlds
from kibitz.config import DataConfig
from kibitz.graders import tasks

WORLD_ROWS, FAMILY_ROWS, MAX_DEPTH = 20_000, 2_000, 64


def read_rows(config: DataConfig, seed: int, demonstrations: bool) -> Iterable[tuple[str, dict[str, Any]]]:
    """The rows of a `data` section and where each stands. `demonstrations`: a world writes its responses, too."""
    if config.world is not None:
        world, count = worlds.get(config.world), config.limit or WORLD_ROWS
        make = world.demonstrations if demonstrations else world.rows
        try:
            rows = make(config.split, count, seed, **config.options)
        except TypeError as error:
            raise ValueError(f"data.options: the world {config.world} does not take these: {error}") from None
        return [(f"{config.world} row {i + 1}", row) for i, row in enumerate(rows)]
    if config.reasoning_gym is not None:
        rows = tasks.rows(config.reasoning_gym, config.split, config.limit or FAMILY_ROWS, seed)
        return [
            (f"{config.source} problem {i + 1}", _answered(row) if demonstrations else row)
            for i, row in enumerate(rows)
        ]
    assert config.prompts is not None
    path = Path(config.prompts)
    if path.suffix in (".jsonl", ".json", ".ndjson"):
        if config.subset is not None:
            raise ValueError(f"data.subset: {path} is one file and has no configurations: leave it out")
        rows = _read_jsonl(path)
        return [rows[i] for i in _picked(len(rows), config)]
    return _read_dataset(config, path)


def _answered(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its answer as the response, where the problem has one answer."""
    return row if row["answer"] is None else {**row, "response": row["answer"]}


def _picked(count: int, config: DataConfig) -> Sequence[int]:
    """The places of the rows that `limit` leaves, in the order of the file."""
    limit = min(count, config.limit or count)
    if config.pick == "first" or limit == count:
        return range(limit)
    return sorted(random.Random(f"rows|{count}").sample(range(count), limit))


def _read_jsonl(path: Path) -> list[tuple[str, dict[str, Any]]]:
    if not path.is_file():
        raise ValueError(f"data.prompts: there is no file {path}")
    rows = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not splitlines: text may hold U+2028
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            too_deep = line.count("[") + line.count("{") > MAX_DEPTH and _is_deeper(row, MAX_DEPTH)
        except RecursionError:
            row, too_deep = None, True
        except ValueError as error:  # an integer of more digits than Python reads is one, too
            advice = (
                ": it begins a list; write one object a line (JSONL)" if not rows and line.lstrip()[0] == "[" else ""
            )
            raise ValueError(f"{path}, line {number} is not JSON: {error}{advice}") from None
        if too_deep:
            raise ValueError(f"{path}, line {number} is nested too deep: lists and objects go {MAX_DEPTH} deep at most")
        if not isinstance(row, dict):
            raise ValueError(f'{path}, line {number} is not an object such as {{"prompt": ..., "answer": ...}}')
        rows.append((f"{path}, line {number}", row))
    return rows


def _is_deeper(value: Any, most: int) -> bool:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(most == 0 or _is_deeper(one, most - 1) for one in inside if isinstance(one, dict | list))


def _read_dataset(config: DataConfig, path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Parquet files and hub datasets, by the library that knows them."""
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it raises is told, and so it need not be logged
    try:
        if path.suffix == ".parquet":
            if config.subset is not None:
                raise ValueError("it is one file and has no configurations: leave out data.subset")
            if not path.is_file():
                raise FileNotFoundError("there is no such file")
            table = datasets.load_dataset("parquet", data_files=str(path), split="train")
        else:
            table = datasets.load_dataset(config.prompts or "", config.subset, split=config.split)
    except Exception as error:  # the library raises a dozen kinds
        why, several = " ".join(str(error.__cause__ or error).split())[:300], "onfig name is missing" in str(error)
        advice = ": write data.subset=NAME" if several else ""
        raise ValueError(f"data.prompts: cannot read {config.prompts}: {why}{advice}") from error
    places = _picked(len(table), config)
    rows = table.select(places)  # before they are read: a data set can be larger than memory
    return [(f"{config.prompts} row {i + 1}", dict(row)) for i, row in zip(places, rows, strict=True)]
