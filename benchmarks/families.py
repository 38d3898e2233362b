"""Which families of reasoning-gym a small language model does at all: `python -m benchmarks.families FOLDER`.

Each family makes a few problems at the lowest level of its own curriculum, or with its own settings where it has none. The
model is asked for the answer alone, and answers greedily; the family judges. Each line is written as it comes, and the same
command goes on where it was cut off.
"""

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from kibitz.config import ModelConfig
from kibitz.data import encode_prompt
from kibitz.engines.torch import TorchEngine
from kibitz.graders import tasks
from kibitz.models import LanguageModel, load_model
from kibitz.models.load import stop_ids
from kibitz.types import Prompt, Sampling

ASKED = "\nWrite the final answer only."
NOT_SETTINGS = ("seed", "size")


def settings(name: str) -> dict[str, Any]:
    """The lowest level of the family's curriculum as settings of `data.reasoning_gym`."""
    from reasoning_gym.factory import create_curriculum, has_curriculum

    if not has_curriculum(name):
        return {}
    tree = asdict(create_curriculum(name).generate_configuration())
    plain = json.loads(json.dumps({key: value for key, value in tree.items() if key not in NOT_SETTINGS}, default=str))
    return {key: value for key, value in plain.items() if value is not None}


def problems(name: str, num: int) -> tuple[str, list[dict[str, Any]]]:
    """Which settings were taken, and test problems with them."""
    lowest = settings(name)
    for said, options in (("lowest level", lowest), ("its own settings", {})):
        if options or not lowest or said != "lowest level":
            try:
                return (said if options else "its own settings"), tasks.rows({"name": name, **options}, "test", num, 0)
            except ValueError:
                if not options:
                    raise
    raise AssertionError("the second way raises or returns")


def measured(model: LanguageModel, name: str, num: int, max_tokens: int, longest: int) -> dict[str, Any]:
    """The line of one family."""
    try:
        how, rows = problems(name, num)
    except ValueError as error:
        return {"family": name, "left_out": " ".join(str(error).split())[:200]}
    asked = list(_prompts(model, rows))
    if max(len(prompt.ids) for prompt in asked) > longest:
        return {"family": name, "left_out": f"a problem has more than {longest} tokens"}
    sampling = Sampling(max_tokens=max_tokens, temperature=0.0, stop_ids=stop_ids(model, []))
    rollouts = TorchEngine(model).generate(asked, sampling)
    texts = [model.tokenizer.decode(one.response_ids, skip_special_tokens=True) for one in rollouts]
    scores = [float(tasks.verify(one.prompt, text)) for one, text in zip(rollouts, texts, strict=True)]
    found = {"solved": sum(score > 0.99 for score in scores), "score": fmean(scores), "num": len(scores)}
    found["stands"] = sum(_stands(row["answer"], text) for row, text in zip(rows, texts, strict=True))
    shown = {"problem": rows[0]["prompt"], "gold": rows[0]["answer"], "answer": texts[0]}
    return {"family": name, "settings": how, **found, **shown}


def _stands(answer: str | None, text: str) -> bool:
    """Whether the answer stands in the text, as words of its own."""
    return (
        bool(answer)
        and re.search(rf"(?<![\w.-]){re.escape(str(answer))}(?![\w]|\.\d)", text, re.IGNORECASE) is not None
    )


def _prompts(model: LanguageModel, rows: list[dict[str, Any]]) -> Iterator[Prompt]:
    for number, row in enumerate(rows):
        ids = encode_prompt(model.tokenizer, [{"role": "user", "content": row["prompt"] + ASKED}], {})
        yield Prompt(ids=tuple(ids), text=row["prompt"], key=str(number), columns=row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub name")
    parser.add_argument("--num", type=int, default=8, help="problems of a family")
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument(
        "--longest", type=int, default=320, help="tokens of a prompt; families with longer ones are left out"
    )
    parser.add_argument("--only", help="families, separated by commas")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("families.jsonl"))
    args = parser.parse_args()
    from reasoning_gym.factory import DATASETS

    torch.set_num_threads(args.threads)
    there = args.output.read_text(encoding="utf-8").splitlines() if args.output.is_file() else []
    done = {json.loads(line)["family"] for line in there}
    names = args.only.split(",") if args.only else sorted(DATASETS)
    model = load_model(ModelConfig(model=args.model), "student", torch.device("cpu"))
    for name in [name for name in names if name not in done]:
        row = measured(model, name, args.num, args.max_tokens, args.longest)
        with args.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        said = (
            row.get("left_out")
            or f"{row['solved']}/{row['num']} solved, {row['stands']} in the text, score {row['score']:.2f} ({row['settings']})"
        )
        print(f"{name:32} {said}", flush=True)


if __name__ == "__main__":
    main()
