"""A teacher with a BPE tokenizer, a student of characters: what is lost by aligning their text?

    python benchmarks/cross_tokenizer.py

On the world `arithmetic`. A BPE tokenizer is trained, and a teacher from nothing on it (4 CPU minutes); the shipped
student then learns from it by each alignment, and, for comparison, from the shipped teacher of its own tokenizer (the
ceiling) and from the text that the BPE teacher writes (SFT, the rival). Rates, seeds, splits and files are those of
every experiment (`kibitz.experiments`): what is done is not done again, and the table is made of the files.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

import kibitz
from kibitz import worlds
from kibitz.config import DataConfig, ModelConfig
from kibitz.data import load_prompts
from kibitz.engines.torch import TorchEngine
from kibitz.experiments import Arm, Experiment, Subject, pages
from kibitz.experiments.make_world import DATA_SEED, FROM_NOTHING, TEACHER_SHAPE, blank, recipe
from kibitz.experiments.study import Study
from kibitz.models.load import load_model, load_tokenizer, stop_ids
from kibitz.types import Sampling
from kibitz.worlds.arithmetic import CHARACTERS
from kibitz.worlds.characters import ASSISTANT, BOS, EOS, PAD, UNKNOWN, of_a_world

NUM_TOKENS = 96


def bpe_tokenizer() -> PreTrainedTokenizerFast:
    """Operators, parentheses and a digit grow together, `+3` or `*(2`: 1.5 characters a token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    rows = worlds.get("arithmetic-wide").demonstrations("train", 4000, DATA_SEED - 1)
    backend = Tokenizer(models.BPE(unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"=|[-+*]?\(*\d?\)*"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_TOKENS,
        special_tokens=[PAD, BOS, EOS, ASSISTANT, UNKNOWN],
        initial_alphabet=list(CHARACTERS),
        show_progress=False,
    )
    backend.train_from_iterator((row[column] for row in rows for column in ("prompt", "response")), trainer)
    return of_a_world(backend)


def make_teacher(folder: Path, steps: int = 1800) -> Path:
    """A model of the shipped teacher's shape and training, but for the tokenizer."""
    done = folder / "teacher" / "checkpoints" / f"step-{steps:06d}"
    if not done.exists():
        start = blank(folder / "blank", TEACHER_SHAPE, seed=0, tokenizer=bpe_tokenizer())
        source = recipe(start, steps, 32, FROM_NOTHING, "arithmetic-wide", DATA_SEED)
        kibitz.train(source, [f"output={folder / 'teacher'}"], overwrite=True)
    return done


# ------------------------------------------------------------------------------------------------------------ arms

STEPS, ROLLOUTS = 40, 64
SPANS = {"type": "opd", "support": "sampled"}


def _bpe(name: str, about: str, family: str = "", **method: Any) -> Arm:
    teacher = {"model": "bpe", "tokenizer": "own"}
    return Arm(name, about, {"teacher": teacher, "method": {"type": "opd", **method}}, family=family)


def experiment(texts: Path) -> Experiment:
    """`texts` is what the BPE teacher wrote."""
    return Experiment(
        name="cross-tokenizer",
        question="A student of characters and a teacher with a BPE: what does it cost to compare text instead of tokens?",
        world="arithmetic",
        models={"student": "arithmetic/student", "shipped": "arithmetic/teacher", "bpe": "bpe"},
        data={"prompts": {"world": "arithmetic"}, "texts": {"prompts": texts.as_posix()}},
        recipe={
            "rollout": {"prompts_per_step": ROLLOUTS, "samples_per_prompt": 1, "max_tokens": 64},
            "optim": {"warmup_steps": 10},
            "steps": STEPS,
            "threads": 1,
            "device": "cpu",
        },
        rates=(5e-4, 1e-3, 2e-3),
        reference="spans",
        dev_problems=256,
        test_problems=512,
        arms=(
            _bpe("spans", "policy gradient, log-ratio of a span", support="sampled"),
            _bpe("alm", "ALM: KL of the coins of each span, tau 100", "alm", alignment="alm"),
            _bpe("alm-1", "ALM with tau 1: the coins of the probabilities as they are", "alm", alignment="alm", alm_tau=1.0),
            _bpe("gold", "GOLD: JSD(½) of shared tokens, sorted L1 of the others", "gold", alignment="gold",
                 divergence="jsd"),
            _bpe("gold-rkl", "GOLD with reverse KL of shared tokens", "gold", alignment="gold",
                 divergence="reverse_kl"),
            _bpe("uld", "ULD: sorted L1 of the distributions", alignment="uld"),
            Arm("same", "policy gradient, teacher of the same tokenizer",
                {"teacher": {"model": "shipped"}, "method": SPANS}),
            Arm("sft", "cross-entropy on the BPE teacher's text", {"method": {"type": "sft"}}, data="texts"),
        ),
    )  # fmt: skip


def write_texts(teacher: Path, file: Path) -> Path:
    """As many responses of the BPE teacher, at temperature 1, as a run of the others has rollouts."""
    if file.exists():
        return file
    config = ModelConfig(model=str(teacher))
    tokenizer = load_tokenizer(config, "teacher")
    model = load_model(config, "teacher", torch.device("cpu"), tokenizer)
    prompts = load_prompts(DataConfig(world="arithmetic", limit=STEPS * ROLLOUTS), tokenizer, seed=0)
    written = TorchEngine(model).generate(prompts, Sampling(max_tokens=64, stop_ids=stop_ids(model, []), seed=0))
    rows = [{"prompt": r.prompt.text, "answer": r.prompt.answer,
             "response": tokenizer.decode(r.response_ids, skip_special_tokens=True)} for r in written]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def main(work: Path, results: Path, only: list[str], page: Path | None) -> None:
    torch.set_num_threads(1)
    bpe = make_teacher(work)
    asked = experiment(write_texts(bpe, work / "texts.jsonl"))
    subject = Subject.of(asked, {"bpe": bpe.as_posix()})
    Study(asked, subject, results / asked.name, work / "runs", partial(print, flush=True)).run(asked.choose(only))
    pages.write(asked, results)
    if page is not None:
        page.write_text(pages.render(page.read_text("utf-8"), {asked.name: asked}, results), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/cross-tokenizer"), help="the teacher and the runs")
    parser.add_argument("--results", type=Path, default=Path("results"), help="a JSON file for each run, and the table")
    parser.add_argument("--only", default="", help="some of its arms: alm,uld")
    parser.add_argument("--page", type=Path, help="put the table between the marks that this page has for it")
    given = parser.parse_args()
    main(given.work, given.results, [name for name in given.only.split(",") if name], given.page)
