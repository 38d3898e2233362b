"""A teacher with a BPE tokenizer, a student of characters: what is lost by aligning their text?

A BPE tokenizer is trained, and a teacher from nothing on it (4 CPU minutes); the shipped student then learns from it by each
alignment, and, for comparison, from the shipped teacher of its own tokenizer (the ceiling) and from the text that the BPE
teacher writes (SFT, the rival).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from kibitz import worlds
from kibitz.config import ModelConfig
from kibitz.data import load_prompts
from kibitz.engines.torch import TorchEngine
from kibitz.experiments.design import MADE, OF_ARM, TOY, Arm, Experiment
from kibitz.experiments.evidence import Finding, Verdict
from kibitz.experiments.make_world import DATA_SEED, FROM_NOTHING, TEACHER_SHAPE, blank
from kibitz.experiments.records import score, share_with_interval, write_rows
from kibitz.experiments.results import Results
from kibitz.experiments.shapes import compared
from kibitz.experiments.statistics import Estimate, apart
from kibitz.models.load import load_model, load_tokenizer, pick_device, stop_ids
from kibitz.types import Sampling
from kibitz.worlds.arithmetic import CHARACTERS
from kibitz.worlds.characters import ASSISTANT, BOS, EOS, PAD, UNKNOWN, of_a_world

NUM_TOKENS = 96
PUBLISHED = ("alm", "gold", "uld")


def bpe_tokenizer() -> PreTrainedTokenizerFast:
    """Operators, parentheses and a digit grow together, `+3` or `*(2`: 1.5 characters a token."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    rows = worlds.get("arithmetic-wide").demonstrations("train", 4000, DATA_SEED - 1)
    backend = Tokenizer(models.BPE(unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"=|[-+*]?\(*\d?\)*"), behavior="isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_TOKENS,
        special_tokens=[PAD, BOS, EOS, ASSISTANT, UNKNOWN],
        initial_alphabet=list(CHARACTERS),
        show_progress=False,
    )
    backend.train_from_iterator((row[column] for row in rows for column in ("prompt", "response")), trainer)
    return of_a_world(backend)


def blank_with_bpe(study: Any) -> Path:
    """A model of the shipped teacher's shape with random weights and the BPE tokenizer."""
    return blank(study.work / "blank-bpe", TEACHER_SHAPE, seed=0, tokenizer=bpe_tokenizer())


def written_texts(study: Any) -> Path:
    """As many responses of the BPE teacher, at temperature 1, as a run of the others has rollouts."""
    model, file = study.place("bpe", 0), study.work / "texts.jsonl"
    if file.exists() and file.stat().st_mtime > Path(model).stat().st_mtime:
        return file
    recipe = study.recipe(study.experiment.arm("sft"), study.experiment.rates[0], 0)
    config = ModelConfig(model=model)
    tokenizer = load_tokenizer(config, "teacher")
    loaded = load_model(config, "teacher", pick_device(), tokenizer)
    num = recipe.steps * recipe.rollout.prompts_per_step
    prompts = load_prompts(study.asked("prompts", "train", num, recipe, None), tokenizer, seed=0)
    sampling = Sampling(max_tokens=recipe.rollout.max_tokens, stop_ids=stop_ids(loaded, []), seed=0)
    written = TorchEngine(loaded).generate(prompts, sampling)
    # A student of characters has room for as many of them as a response may have tokens; only an untrained teacher writes more.
    most = recipe.rollout.max_tokens
    rows = [{"prompt": r.prompt.text, "answer": r.prompt.answer,
             "response": tokenizer.decode(r.response_ids, skip_special_tokens=True)[:most]} for r in written]  # fmt: skip
    return write_rows(file, rows)


# ------------------------------------------------------------------ what it says


def find(results: Results) -> Finding:
    """Compare the gain by each alignment with the gains by a teacher of the student's tokenizer and by SFT on teacher text."""
    student = results.model("student")
    before = share_with_interval([student["sampled"]["accuracy"]], student["num_prompts"])
    shares = {arm.name: results.accuracy(arm.name) for arm in results.experiment.arms if results.has(arm.name)}
    dev = {name: {rate: score(run) for rate, run in sorted(sweep.items())} for name, sweep in results.sweeps.items()}
    both = sorted(dev.get("alm", {}).keys() & dev.get("alm-1", {}).keys())
    numbers = {
        "before": before,
        "shares": shares,
        "greedy": {name: results.accuracy(name, "greedy") for name in shares},
        "levels": {role: results.level(role) for role in results.experiment.roles},
        "gain": gains(before, shares),
        "by_tau": [(rate, dev["alm"][rate], dev["alm-1"][rate]) for rate in both],
        "gold": dev.get("gold", {}),
        "num_tokens": NUM_TOKENS,
    }
    levels = {"student before": before[0], "teacher with a BPE": results.level("bpe")}
    panel = compared(
        "accuracy", "accuracy", list(shares), {"temperature 1": shares, "greedy": numbers["greedy"]}, levels=levels
    )
    return Finding(verdict(before, shares), numbers, [panel])


def gains(before: Estimate, shares: Mapping[str, Estimate]) -> list[str]:
    """The alignments by which the student ends above its start, by the interval of the difference."""
    return [name for name in ("spans", *PUBLISHED) if name in shares and apart(shares[name], before)]


def verdict(before: Estimate, shares: Mapping[str, Estimate]) -> Verdict:
    """Reproduced if the student gains by each of the published alignments; partly if by any, the sampled one included."""
    found = gains(before, shares)
    return "reproduced" if set(PUBLISHED) <= set(found) else "partly" if found else "not"


# ------------------------------------------------------------------ runs


def _bpe(name: str, about: str, family: str = "", **method: Any) -> Arm:
    teacher = {"model": "bpe", "tokenizer": "own"}
    return Arm(name, about, {"teacher": teacher, "method": {"type": "opd", **method}}, family=family)


TEACHER = Arm(
    "bpe-teacher",
    "the shipped teacher's shape and training, with a BPE",
    {
        "student": {"model": f"{MADE}blank"},
        "method": {"type": "sft"},
        "rollout": {"prompts_per_step": 32},
        "optim": {**FROM_NOTHING, "tokens_per_micro_batch": 1024},
        "steps": 1800,
    },
    rates=(FROM_NOTHING["lr"],),
    data="wide",
)

EXPERIMENT = Experiment(
    name="cross-tokenizer",
    question="A student of characters and a teacher with a BPE: what does it cost to compare text instead of tokens?",
    world="arithmetic",
    models={"student": "arithmetic/student", "shipped": "arithmetic/teacher", "bpe": f"{OF_ARM}{TEACHER.name}"},
    data={
        "prompts": {"world": "arithmetic"},
        "wide": {"world": "arithmetic-wide"},
        "texts": {"prompts": f"{MADE}texts"},
    },
    recipe={**TOY, "device": "cpu"},
    rates=(5e-4, 1e-3, 2e-3),
    reference="spans",
    dev_problems=256,
    test_problems=512,
    quick_arms=("spans", "same", "sft"),
    makers=(TEACHER,),
    made={"blank": blank_with_bpe, "texts": written_texts},
    arms=(
        _bpe("spans", "policy gradient, log-ratio of a span", support="sampled"),
        _bpe("alm", "ALM: KL of the coins of each span, tau 100", "by-alm", alignment="alm"),
        _bpe("alm-1", "ALM with tau 1: the coins of the probabilities as they are", "by-alm", alignment="alm", alm_tau=1.0),
        _bpe("gold", "GOLD: JSD(½) of shared tokens, sorted L1 of the others", "by-gold", alignment="gold", divergence="jsd"),
        _bpe("gold-rkl", "GOLD with reverse KL of shared tokens", "by-gold", alignment="gold", divergence="reverse_kl"),
        _bpe("uld", "ULD: sorted L1 of the distributions", alignment="uld"),
        Arm("same", "policy gradient, teacher of the same tokenizer",
            {"teacher": {"model": "shipped"}, "method": {"type": "opd", "support": "sampled"}}),
        Arm("sft", "cross-entropy on the BPE teacher's text", {"method": {"type": "sft"}}, data="texts"),
    ),
    find=find,
)  # fmt: skip
