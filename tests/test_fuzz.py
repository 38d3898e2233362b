"""Broken recipes and broken prompt files: whatever a person or a disk does to them, the answer is one sentence.

Mutations are seeded, so that a failure comes again. The counts at the end keep the tests from passing because
every mutation is refused at the first look, or because none is.
"""

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.models import tokenizer
from support.runs import recipe
from typer.testing import CliRunner

from kibitz import config
from kibitz.cli import app
from kibitz.config import DataConfig
from kibitz.data import load_grader, load_prompts

NUM = 300
ODD: list[Any] = [
    None, True, -1, 0, 1e308, 10**30, float("nan"), float("inf"), "", " ", "a", "\x00", "\x1b[2J", "../../etc", "💥" * 50,
    [], [[]], [None], {}, {"a": 1}, {"type": "opd"}, {"model": 3}, "nan", "1e-4", "{{ 7*7 }}", "%s%n", "<script>",
    "opd", "full", 3.5,
]  # fmt: skip
DAMAGE = [b"", b"\t", b":", b"\xff", b"{", b"- ", b"&a", b"\x00", b"\n"]


def places(tree: Any, path: tuple = ()) -> list[tuple]:
    """Every key and index below a tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else []
    return [place for key, value in items for place in [(*path, key), *places(value, (*path, key))]]


def mutated(tree: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """One or two things wrong: a value of another kind, a key misspelt, a key gone, a key too many."""
    tree = copy.deepcopy(tree)
    for _ in range(draw.choice([1, 1, 2])):
        if not tree:
            return tree
        *above, last = draw.choice(places(tree))
        node: Any = tree
        for key in above:
            node = node[key]
        match draw.randrange(4):
            case 0:
                node[last] = copy.deepcopy(draw.choice(ODD))
            case 1 if isinstance(node, dict):
                node[draw.choice([str(last)[:-1], f"{last}s", str(last).upper(), ""])] = node.pop(last)
            case 2 if isinstance(node, dict):
                del node[last]
            case _ if isinstance(node, dict):
                node[draw.choice(["x", "lora", "urls", "teachers", "type", "model"])] = copy.deepcopy(draw.choice(ODD))
    return tree


def whole_recipe(small_models: Path) -> dict[str, Any]:
    """A recipe that names something in every section."""
    tree = recipe(small_models / "student", small_models / "teacher", Path("runs/never"))
    method = {"type": "opd", "divergence": "jsd", "beta": 0.5, "support": "top_k", "top_k": 8, "mask_tokens": ["("]}
    return {
        **tree,
        "method": method,
        "save": {"every": 1, "keep": 1},
        "guards": {"repetition": "stop"},
        "seed": 3,
        "device": "cpu",
    }


def test_no_broken_recipe_ends_in_a_traceback(small_models):
    refused, read, base = 0, 0, whole_recipe(small_models)
    config.load(base, [])
    for number in range(NUM):
        tree = mutated(base, random.Random(f"recipe|{number}"))
        try:
            config.load(tree, [])
            read += 1
        except ValueError:
            refused += 1
    assert refused > NUM / 3
    assert read > NUM / 20


def test_no_broken_yaml_text_ends_in_a_traceback(small_models, tmp_path):
    """The file itself damaged: bytes changed, lost, doubled. Through the command, up to where weights would load."""
    text = yaml.safe_dump(whole_recipe(small_models)).encode()
    codes = {0: 0, 1: 0, 2: 0}
    for number in range(60):
        draw, data = random.Random(f"yaml|{number}"), bytearray(text)
        for _ in range(draw.randint(1, 6)):
            place = draw.randrange(len(data))
            data[place : place + draw.randint(0, 4)] = draw.choice(
                [b"", b"\t", b":", b"\xff", b"{", b"- ", b"&a", b"\x00", b"\n"]
            )
        path = tmp_path / "recipe.yaml"
        path.write_bytes(bytes(data))
        answer = CliRunner().invoke(app, ["check", str(path), "--files-only", "--json", "--teraflops", "1"])
        assert answer.exit_code in codes, (bytes(data), answer.exception)
        codes[answer.exit_code] += 1
        if answer.exit_code == 2:
            assert len(answer.stderr.strip().splitlines()) == 1, answer.stderr
            assert "\x1b" not in answer.stderr
    assert codes[2] > 20


def broken_lines(draw: random.Random) -> bytes:
    """A prompts file of four rows with a few things wrong."""
    rows: list[Any] = [
        {"prompt": "1+2", "answer": "3", "response": "3"},
        {"messages": [{"role": "user", "content": "2*3"}], "answer": "6", "response": "6"},
        {"messages": [{"role": "user", "content": "2*3"}, {"role": "assistant", "content": "6"}]},
        {"prompt": "4-1", "answer": 3, "task": "minus", "response": "3"},
    ]
    for _ in range(draw.randint(1, 3)):
        number = draw.randrange(len(rows))
        if isinstance(rows[number], dict) and draw.random() < 0.8:
            rows[number] = mutated(rows[number], draw) if rows[number] else draw.choice(ODD)
        else:
            rows[number] = draw.choice(ODD)
    data = "\n".join(json.dumps(row) for row in rows).encode()
    if draw.random() < 0.3:
        place = draw.randrange(len(data))
        data = data[:place] + draw.choice([b"\xff\xfe", b"\x00", b"}", b"\n", b""]) + data[place + draw.randint(0, 5) :]
    return data


@pytest.mark.parametrize("demonstrations", [False, True])
def test_no_broken_prompt_file_ends_in_a_traceback(demonstrations, tmp_path):
    tok, refused, read = tokenizer(), 0, 0
    for number in range(NUM // 2):
        path = tmp_path / "prompts.jsonl"
        path.write_bytes(broken_lines(random.Random(f"prompts|{demonstrations}|{number}")))
        section = DataConfig(prompts=str(path))
        try:
            prompts = load_prompts(section, tok, 0, demonstrations)
            load_grader(section, prompts)
            assert all(prompt.ids and isinstance(prompt.text, str) for prompt in prompts)
            read += 1
        except ValueError:
            refused += 1
    assert refused > NUM / 10
    assert read > 0
