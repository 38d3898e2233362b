"""Evaluation and annotation against brute force, and the whole path on tokenizers and architectures of real models."""

import json
import math
import random
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pytest
import torch
from support.models import full_logp, language_model, make_model
from support.runs import recipe
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import kibitz
from kibitz import worlds
from kibitz.config import DataConfig, EvalConfig, RolloutConfig
from kibitz.evaluate.annotate import FORK_NATS, annotate, score_texts
from kibitz.evaluate.evaluate import accuracy, evaluate_model, grade, mean_reverse_kl
from kibitz.evaluate.statistics import interval, t_quantile
from kibitz.teachers.local import local_teacher
from kibitz.training.setup import prepare
from kibitz.types import Prompt, Rollout


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    paths = make_model(folder / "student", seed=1), make_model(folder / "teacher", seed=2, kind="llama")
    return tuple(language_model(path, role) for path, role in zip(paths, ("student", "teacher"), strict=True))


def rollout(prompt: list[int], response: list[int], key: str = "k", reward: float | None = None) -> Rollout:
    return Rollout(
        Prompt(tuple(prompt), "1+1", key), response, torch.zeros(len(response)), finished=True, reward=reward
    )


ROLLOUTS = [rollout([1, 5, 6], [7, 8, 9]), rollout([1, 9], [4, 4, 5, 6, 7]), rollout([1, 2, 3, 4, 5, 6], [9])]


def test_mean_reverse_kl_is_over_tokens_not_rollouts(pair):
    student, teacher = pair
    kls = []
    for r in ROLLOUTS:
        ours, theirs = full_logp(student, r), full_logp(teacher, r)
        kls += (ours.exp() * (ours - theirs)).sum(-1).tolist()
    for max_tokens in (4, 16384):
        assert mean_reverse_kl(student, local_teacher(teacher), ROLLOUTS, max_tokens) == pytest.approx(
            sum(kls) / len(kls), rel=1e-5
        )


def test_annotation_against_full_forward_passes(pair):
    student, teacher = pair
    for r, row in zip(ROLLOUTS, annotate(student, local_teacher(teacher), ROLLOUTS, max_tokens=12), strict=True):
        ours, theirs = full_logp(student, r), full_logp(teacher, r)
        assert len(row["tokens"]) == r.num_tokens
        penalties = []
        for t, (token, shown) in enumerate(zip(r.response_ids, row["tokens"], strict=True)):
            assert shown["id"] == token
            assert shown["text"] == student.tokenizer.decode([token])
            assert shown["student_logp"] == pytest.approx(ours[t, token].item(), abs=1e-4)
            assert shown["teacher_logp"] == pytest.approx(theirs[t, token].item(), abs=1e-4)
            assert shown["reverse_kl"] == pytest.approx((ours[t].exp() * (ours[t] - theirs[t])).sum().item(), abs=1e-4)
            best = theirs[t].topk(5)
            assert [p for _, p in shown["teacher_top"]] == pytest.approx(best.values.exp().tolist(), abs=1e-4)
            assert [text for text, _ in shown["teacher_top"]] == [student.tokenizer.decode([i]) for i in best.indices]
            penalties.append((ours[t, token] - theirs[t, token]).item())
        worst = max(range(len(penalties)), key=penalties.__getitem__)
        assert row["fork"] == (worst if penalties[worst] > FORK_NATS else None)


def test_annotation_without_a_teacher_has_no_fork(pair):
    (row,) = annotate(pair[0], None, ROLLOUTS[:1])
    assert row["fork"] is None
    assert "teacher_logp" not in row["tokens"][0]


def test_samples_of_one_prompt_are_one_observation():
    """Eight samples of each of two prompts are not sixteen independent trials."""
    rollouts = [
        replace(rollout([1], [2], key, reward), sample=i) for key, reward in (("a", 1.0), ("b", 0.0)) for i in range(8)
    ]
    row = accuracy(rollouts)
    assert row["accuracy"] == 0.5
    assert row["num"] == 2
    assert row["high"] - row["low"] > 0.8
    same = [replace(r, prompt=rollouts[0].prompt) for r in rollouts]
    assert accuracy(same)["num"] == 1  # rows that ask the same and have one answer
    spaced = [
        replace(r.prompt, messages=({"role": "user", "content": "1+2" + " " * i},)) for i, r in enumerate(rollouts)
    ]
    assert accuracy([replace(r, prompt=p) for r, p in zip(rollouts, spaced, strict=True)])["num"] == 1
    other = [replace(r, prompt=replace(rollouts[0].prompt, answer=str(r.reward))) for r in rollouts]
    assert accuracy(other)["num"] == 2


def test_rewards_that_are_no_share_have_the_interval_of_t():
    row = accuracy([rollout([1], [2], str(i), 3.0 * i) for i in range(4)])
    half = 3.182 * stdev([0.0, 3.0, 6.0, 9.0]) / 2
    assert (row["accuracy"], row["low"], row["high"]) == pytest.approx((4.5, 4.5 - half, 4.5 + half), abs=1e-3)


@pytest.mark.parametrize("spread", [(0.5, 0.5), (5.0, 5.0), (9.0, 1.0)])
@pytest.mark.parametrize("num_samples", [1, 4, 32])
def test_intervals_hold_the_truth_in_95_of_100_evaluations(num_samples, spread):
    """400 made-up evaluations of 32 prompts whose difficulty varies: by chance below 91.5% once in a thousand, for a true
    coverage of 95%."""
    draw, held, widths = random.Random(f"{num_samples}{spread}"), 0, []
    for _ in range(400):
        shares = [draw.betavariate(*spread) for _ in range(32)]
        groups = [[float(draw.random() < share) for _ in range(num_samples)] for share in shares]
        _, low, high = interval(groups)
        held += low <= spread[0] / sum(spread) <= high
        widths.append(high - low)
    assert held >= 366
    if num_samples == 32 and spread == (5.0, 5.0):
        assert fmean(widths) < 0.15  # Wilson's for 32 prompts is 0.33 wide


def test_quantiles_of_t():
    """The distribution function of t for 2 degrees of freedom is known: t / sqrt(2 + t^2) = 0.95."""
    assert t_quantile(2) / math.sqrt(2 + t_quantile(2) ** 2) == pytest.approx(0.95, abs=1e-4)
    assert t_quantile(30) == pytest.approx(2.042) and t_quantile(31) == pytest.approx(2.0395, abs=1e-3)
    assert t_quantile(10**6) == pytest.approx(1.96, abs=1e-4) and t_quantile(0) == math.inf


def test_rows_that_ask_the_same_are_sampled_apart(small_models, tmp_path):
    """A file that holds a problem 32 times, as published ones do for avg@32, is like one row with 32 samples."""
    (tmp_path / "many.jsonl").write_text('{"prompt": "1+2", "answer": "3"}\n' * 32)
    (tmp_path / "once.jsonl").write_text('{"prompt": "1+2", "answer": "3"}\n')
    tree = recipe(small_models / "student", small_models / "teacher", tmp_path / "run")
    found = []
    for name, samples in (("many", 1), ("once", 32)):
        tree["eval"] |= {"prompts": str(tmp_path / f"{name}.jsonl"), "samples": samples, "num_prompts": 64}
        setup = prepare(tree, grader=lambda prompt, text: float(len(text) % 2), overwrite=True)
        found.append(setup.evaluator.run())
    for row, rollouts in found:
        assert len({tuple(r.response_ids) for r in rollouts}) > 16
        assert row["sampled"]["num"] == row["greedy"]["num"] == 1
        assert row["pass_at_k"].keys() == {"1", "2", "4", "8", "16", "32"}
    many, once = (row["sampled"] for row, _ in found)
    assert 0 < many["accuracy"] < 1 and 0 < once["accuracy"] < 1


def test_evaluating_a_folder(pair, tmp_path):
    student = make_model(tmp_path / "s", seed=3)
    row = evaluate_model(
        str(student),
        teacher=str(student),
        data=DataConfig(world="arithmetic", split="test"),
        eval=EvalConfig(num_prompts=12, samples=4),
        rollout=RolloutConfig(max_tokens=10),
    )
    assert row["num_prompts"] == row["sampled"]["num"] == row["greedy"]["num"] == 12
    assert set(row["pass_at_k"]) == {"1", "2", "4"}
    assert row["pass_at_k"]["1"] <= row["pass_at_k"]["4"]
    assert row["reverse_kl"] == pytest.approx(0.0, abs=1e-6)
    assert 1 <= row["response_tokens"] <= 10


def test_the_fork_is_the_first_token_out_of_order():
    """The shipped pair on 5+(2*3): after `5+` the student's 2 breaks the order, and what follows from it is not blamed."""
    world = worlds.get("arithmetic")
    (row,) = score_texts(str(world.checkpoint("student")), str(world.checkpoint("teacher")), [("5+(2*3)", "5+2=7")])
    penalties = [token["student_logp"] - token["teacher_logp"] for token in row["tokens"]]
    assert row["tokens"][row["fork"]]["text"] == "2"
    assert row["fork"] == 2
    assert all(penalty < 0.5 * penalties[2] for penalty in penalties[3:])


# ------------------------------------------------------------------ the path of real models

QUESTIONS = [
    {
        "question": f"Natalia sold {n} clips in April and half as many in May. How many clips altogether?",
        "answer": f"... #### {n * 3 // 2}",
    }
    for n in range(2, 22, 2)
]


def qwen_like(folder: Path, kind: str, seed: int, **changes) -> Path:
    """A random model with a byte-level BPE tokenizer, a ChatML template with a thinking mode, and a padded vocabulary."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=special
    )
    bpe.train_from_iterator([q["question"] for q in QUESTIONS], trainer)
    tok = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tok.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    )
    options = {
        "vocab_size": 512,
        "max_position_embeddings": 256,
        "eos_token_id": tok.eos_token_id,
        "bos_token_id": None,
        **changes,
    }
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options)).save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


DECODER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPES = {
    "qwen3": {**DECODER, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True},
    "llama": {**DECODER, "num_key_value_heads": 1},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
}


@pytest.mark.parametrize("kind", SHAPES)
def test_word_problems_on_random_models_of_real_architectures(kind, tmp_path):
    """JSONL with other column names, chat template with a thinking switch, math grader, padded vocabulary, HF folder out."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    student, teacher = (qwen_like(tmp_path / name, kind, seed, **SHAPES[kind]) for seed, name in enumerate(("s", "t")))
    tree = recipe(student, teacher, tmp_path / "run", steps=3, rollout={"prompts_per_step": 2, "max_tokens": 6})
    tree["data"] = {"prompts": str(prompts), "columns": {"prompt": "question"}, "template": {"enable_thinking": False}}
    run = kibitz.train({**tree, "eval": {"every": 3, "prompts": str(prompts), "num_prompts": 4}})
    assert len(run.metrics) == 3
    assert all(row["reward"] is not None for row in run.metrics)
    assert run.evals[-1]["greedy"]["num"] == 4
    saved = AutoModelForCausalLM.from_pretrained(run.checkpoint)
    assert saved.config.vocab_size == 512


@pytest.mark.parametrize(
    "reward", [True, np.True_, np.float32(1), np.int64(1), Fraction(1), torch.tensor([1.0]), torch.tensor(True)]
)
def test_every_kind_of_number_is_a_reward(pair, reward):
    (graded,) = grade(lambda prompt, text: reward, pair[0], [rollout([1], [2])])
    assert graded.reward == 1.0 and type(graded.reward) is float
