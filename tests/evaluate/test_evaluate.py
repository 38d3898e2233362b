"""Evaluation and annotation against brute force, and the whole path on tokenizers and architectures of real models."""

import json
from dataclasses import replace
from pathlib import Path

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
from kibitz.evaluate.evaluate import accuracy, evaluate_model, mean_reverse_kl
from kibitz.teachers.local import local_teacher
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
    rollouts = [replace(rollout([1], [2], "a", reward), sample=i) for reward in (1.0, 0.0) for i in range(8)]
    row = accuracy(rollouts)  # of one key: the same prompt stands in the file twice, and is two observations
    assert row["accuracy"] == 0.5
    assert row["num"] == 2
    assert row["high"] - row["low"] > 0.8
    wide = accuracy([rollout([1], [2], str(i), 3.0 * i) for i in range(4)])
    assert wide["accuracy"] == 4.5
    assert wide["low"] < 4.5 < wide["high"]


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
