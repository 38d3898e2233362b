"""A teacher with a BPE tokenizer, a student of characters: what is lost by aligning their text?

    python benchmarks/cross_tokenizer.py --output runs/cross-tokenizer

On the world `arithmetic`. A BPE tokenizer is trained, and a teacher from nothing on it (`kibitz sft`, 4 CPU minutes); the
shipped student then learns from it by each alignment, and, for comparison, from the shipped teacher of its own tokenizer
(the ceiling) and from the text that the BPE teacher writes (SFT, the rival). Each arm's learning rate is the best of
three at seed 0 on the dev split; the table is on the test split, seeds 0, 1 and 2.
"""

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import kibitz
from kibitz import worlds
from kibitz.config import DataConfig, EvalConfig, ModelConfig, RolloutConfig
from kibitz.data import load_prompts
from kibitz.engines.torch import TorchEngine
from kibitz.evaluate import evaluate_model
from kibitz.models import load_model, load_tokenizer, stop_ids
from kibitz.types import Sampling
from kibitz.worlds.arithmetic import ASSISTANT, BOS, CHARACTERS, CHAT_TEMPLATE, EOS, PAD, UNKNOWN
from kibitz.worlds.make import DATA_SEED, FROM_NOTHING, TEACHER_SHAPE, recipe

NUM_TOKENS = 96


def bpe_tokenizer() -> PreTrainedTokenizerFast:
    """Operators, parentheses and a digit grow together, `+3` or `*(2`: 1.5 characters a token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    world = worlds.get("arithmetic-wide")
    rows = world.demonstrations("train", 4000, DATA_SEED - 1)
    backend = Tokenizer(models.BPE(unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"=|[-+*]?\(*\d?\)*"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    special = [PAD, BOS, EOS, ASSISTANT, UNKNOWN]
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_TOKENS, special_tokens=special, initial_alphabet=list(CHARACTERS), show_progress=False
    )
    backend.train_from_iterator((row[column] for row in rows for column in ("prompt", "response")), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        additional_special_tokens=[ASSISTANT],
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_teacher(folder: Path, steps: int = 1800) -> Path:
    """A model of the shipped teacher's shape and training, but for the tokenizer."""
    done = folder / "teacher" / "checkpoints" / f"step-{steps:06d}"
    if done.exists():
        return done
    tokenizer, blank = bpe_tokenizer(), folder / "blank"
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=TEACHER_SHAPE["hidden_size"] // 4,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        **{name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        **TEACHER_SHAPE,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(blank)
    tokenizer.save_pretrained(blank)
    source = recipe(blank, steps, 32, FROM_NOTHING, "arithmetic-wide", DATA_SEED)
    kibitz.train(source, [f"output={folder / 'teacher'}"], overwrite=True)
    return done


# ------------------------------------------------------------------------------------------------------------ arms

STEPS, PROMPTS, SAMPLES = 60, 32, 2
RATES = (5e-4, 1e-3, 2e-3)
SEEDS = (0, 1, 2)
SPANS = {"type": "opd", "support": "sampled"}
ARMS: dict[str, dict[str, Any]] = {
    "same tokenizer: opd, sampled": {"teacher": "shipped", "method": SPANS},
    "spans: opd, sampled": {"teacher": "bpe", "method": SPANS},
    "sft on its text": {"teacher": None, "method": {"type": "sft"}},
    "alm": {"teacher": "bpe", "method": {"type": "opd", "alignment": "alm"}},
    "gold (jsd)": {"teacher": "bpe", "method": {"type": "opd", "alignment": "gold", "divergence": "jsd"}},
    "uld": {"teacher": "bpe", "method": {"type": "opd", "alignment": "uld"}},
}


def write_texts(teacher: Path, file: Path) -> Path:
    """As many responses of the BPE teacher, at temperature 1, as a run of the others has rollouts."""
    if file.exists():
        return file
    section = DataConfig(world="arithmetic", limit=STEPS * PROMPTS * SAMPLES)
    config = ModelConfig(model=str(teacher))
    tokenizer = load_tokenizer(config, "teacher")
    model = load_model(config, "teacher", torch.device("cpu"), tokenizer)
    prompts = load_prompts(section, tokenizer, seed=0)
    written = TorchEngine(model).generate(prompts, Sampling(max_tokens=64, stop_ids=stop_ids(model, []), seed=0))
    rows = [{"prompt": r.prompt.text, "answer": r.prompt.answer,
             "response": tokenizer.decode(r.response_ids, skip_special_tokens=True)} for r in written]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def run_arm(name: str, lr: float, seed: int, folder: Path, bpe: Path) -> Path:
    """The checkpoint of one run; what is there already is not run again."""
    arm, output = ARMS[name], folder / "runs" / f"{name.split()[0].strip(':')}-{lr:g}-{seed}"
    done = output / "checkpoints" / f"step-{STEPS:06d}"
    if done.exists():
        return done
    teachers = {
        "shipped": {"model": str(worlds.get("arithmetic").checkpoint("teacher"))},
        "bpe": {"model": str(bpe), "tokenizer": "own"},
    }
    source: dict[str, Any] = {
        "student": {"model": str(worlds.get("arithmetic").checkpoint("student"))},
        "data": {"world": "arithmetic"}
        if arm["teacher"]
        else {"prompts": str(write_texts(bpe, folder / "texts.jsonl"))},
        "method": arm["method"],
        "rollout": {"prompts_per_step": PROMPTS, "samples_per_prompt": SAMPLES, "max_tokens": 48},
        "optim": {"lr": lr, "warmup_steps": 10},
        "steps": STEPS,
        "eval": {"every": 0, "num_prompts": 64, "heatmaps": 2},
        "save": {"every": 0},
        "seed": seed,
        "device": "cpu",
        "threads": 1,
        "output": str(output),
    }
    if arm["teacher"]:
        source["teacher"] = teachers[arm["teacher"]]
    else:
        source["rollout"] |= {"prompts_per_step": PROMPTS * SAMPLES, "samples_per_prompt": 1}
    kibitz.train(source, overwrite=True)
    return done


def accuracies(model: Path, split: str, num: int) -> tuple[float, float]:
    """At temperature 1 and greedy."""
    data = DataConfig(world="arithmetic", split=split)
    row = evaluate_model(str(model), data=data, eval=EvalConfig(num_prompts=num), rollout=RolloutConfig(max_tokens=64))
    return row["sampled"]["accuracy"], row["greedy"]["accuracy"]


def main(folder: Path, bpe: Path | None) -> None:
    bpe = bpe or make_teacher(folder)
    home = worlds.get("arithmetic")
    print(
        "| arm | rate | T=1, seeds 0 1 2 | mean | greedy, seeds 0 1 2 | mean | dev at each rate |\n|---|--:|---|--:|---|--:|---|"
    )
    for name, model in (
        ("student before", home.checkpoint("student")),
        ("shipped teacher", home.checkpoint("teacher")),
        ("BPE teacher", bpe),
    ):
        sampled, greedy = accuracies(model, "test", 512)
        print(f"| {name} | | | {sampled:.3f} | | {greedy:.3f} | |", flush=True)
    for name in ARMS:
        sweep = {lr: accuracies(run_arm(name, lr, 0, folder, bpe), "dev", 256)[0] for lr in RATES}
        best = max(sweep, key=sweep.__getitem__)
        found = [accuracies(run_arm(name, best, seed, folder, bpe), "test", 512) for seed in SEEDS]
        sampled, greedy = zip(*found, strict=True)
        cells = [
            f"{best:g}",
            *(
                text
                for values in (sampled, greedy)
                for text in (" ".join(f"{v:.3f}" for v in values), f"{fmean(values):.3f}")
            ),
        ]
        cells.append(" ".join(f"{lr:g}: {value:.3f}" for lr, value in sweep.items()))
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/cross-tokenizer"))
    parser.add_argument("--teacher", type=Path, help="a BPE teacher that is there already")
    main(**{"folder": (given := parser.parse_args()).output, "bpe": given.teacher})
