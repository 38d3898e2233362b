"""Models that change with a text's length (local windows, rotary factors), across every switch: engines against plain forward
passes of each row alone, and rows together against rows alone."""

import random
import warnings
from types import SimpleNamespace

import pytest
import torch
from support.models import bare_model, full_logp, make_model, of_written, random_prompts, tokenizer
from support.runs import recipe
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhimoeConfig,
    Qwen3Config,
)

import kibitz
from kibitz.batching import pack
from kibitz.config import ModelConfig
from kibitz.engines.blocks import CachedBlocks, PlainBlocks, choose_block_decoder
from kibitz.engines.cache import CachedDecoder, PlainDecoder, switches
from kibitz.engines.mixture import MixtureEngine
from kibitz.engines.speculative import SpeculativeEngine
from kibitz.engines.torch import TorchEngine
from kibitz.models import LanguageModel, load_model
from kibitz.models.rotary import hold_rotations
from kibitz.signals import Scored
from kibitz.types import Prompt, Rollout, Sampling

VOCAB, POSITIONS = 61, 128
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def longrope(switch, **more):
    factors = {"short_factor": [1.0] * 4, "long_factor": [8.0, 6.0, 4.0, 2.0]}
    return {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": switch, **factors, **more}


def neo(switch):
    kinds = [[["global", "local"], 1]]
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": kinds}
    ends = {"max_position_embeddings": POSITIONS, "bos_token_id": None, "eos_token_id": None}
    return GPTNeoConfig(**sizes, **ends, window_size=switch)


def phimoe(switch):
    rope = longrope(switch, short_mscale=1.0, long_mscale=1.3)
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return PhimoeConfig(**SIZES, **experts, rope_parameters=rope, original_max_position_embeddings=switch)


MADE = {
    "phi3 longrope": lambda s: Phi3Config(
        **SIZES, rope_parameters=longrope(s, factor=4.0), original_max_position_embeddings=s
    ),
    "phimoe longrope": phimoe,
    "llama dynamic": lambda s: LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    ),
    "gpt neo": neo,
    "mistral": lambda s: MistralConfig(**SIZES, sliding_window=s),
    "gemma2": lambda s: Gemma2Config(**SIZES, sliding_window=s),
    "gemma3": lambda s: Gemma3TextConfig(**SIZES, sliding_window=s),
    "qwen3 some layers": lambda s: Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=s, max_window_layers=1),
}
VARYING = ("phi3 longrope", "phimoe longrope")


def quietly(work):
    """What `work` gives; that an architecture cannot be driven with a cache is not what is tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return work()


def assert_like_each_row_alone(student, rollouts):
    for rollout in rollouts:
        with torch.no_grad():
            alone_T = of_written(full_logp(student, rollout), rollout).float()
        torch.testing.assert_close(rollout.logp_T, alone_T, atol=1e-4, rtol=0)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", MADE)
def test_the_engine_is_a_plain_forward_pass_of_each_row_alone(name, seed):
    """Of random windows and switches, prompts and limits: rows on both sides of the switch at once, rows that cross it."""
    draw = random.Random(f"{name}|{seed}")
    switch = draw.choice([draw.randint(5, 40), draw.randint(66, 80)])
    student, sampling = bare_model(MADE[name](switch), seed), Sampling(max_tokens=draw.randint(20, 40), stop_ids=(3, 7))
    lengths = [draw.randint(1, POSITIONS - sampling.max_tokens) for _ in range(4)] + [switch, switch - 1]
    engine = TorchEngine(student, max_rows=3)
    rollouts = quietly(lambda: engine.generate(random_prompts(lengths, VOCAB), sampling))
    assert any(n < switch for n in lengths) and any(len(r.prompt.ids) + r.num_tokens > switch for r in rollouts)
    assert_like_each_row_alone(student, rollouts)
    assert isinstance(engine.decoder(), PlainDecoder if name == "gpt neo" else CachedDecoder)


def test_a_text_that_ends_beyond_the_switch_is_read_as_transformers_reads_it():
    config, sampling = MADE["phi3 longrope"](20), Sampling(max_tokens=30)
    student, untouched = bare_model(config), bare_model(config)
    assert_like_each_row_alone(untouched, TorchEngine(student).generate(random_prompts([4, 1, 25], VOCAB), sampling))


def test_a_decoder_is_checked_again_when_texts_reach_a_window_that_it_has_not_crossed():
    engine = TorchEngine(bare_model(neo(30)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.generate(random_prompts([4], VOCAB), Sampling(max_tokens=20))
    assert isinstance(engine.decoder(), CachedDecoder)
    with pytest.warns(UserWarning, match="GPTNeoForCausalLM cannot be driven with the engine's KV cache"):
        engine.generate(random_prompts([4], VOCAB), Sampling(max_tokens=40))
    with warnings.catch_warnings():  # said once
        warnings.simplefilter("error")
        engine.generate(random_prompts([4], VOCAB), Sampling(max_tokens=80))


def test_switches_are_found_by_their_names_and_below_the_longest_text_only():
    model = lambda name, switch: SimpleNamespace(config=MADE[name](switch))  # noqa: E731
    assert switches(model("gpt neo", 30), 31) == [30] and switches(model("gpt neo", 30), 30) == []
    assert switches(model("phi3 longrope", 30), 100) == [30]
    assert switches(model("mistral", 7), 100) == [7] and switches(model("llama dynamic", 7), 100) == []
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
    assert switches(SimpleNamespace(config=LlamaConfig(**SIZES, rope_parameters=yarn)), 100) == []


@pytest.mark.parametrize("name", ["gpt neo", "mistral", "phi3 longrope"])
def test_drafts_are_judged_across_the_switch_as_by_a_plain_forward_pass(name):
    teacher, student = bare_model(MADE[name](9), 1), bare_model(MADE["qwen3 some layers"](9))
    hold_rotations(teacher.model, 40)
    want = PlainBlocks if name == "gpt neo" else CachedBlocks
    with torch.no_grad():
        assert isinstance(quietly(lambda: choose_block_decoder(teacher.model, VOCAB, 40)), want)
        assert isinstance(choose_block_decoder(teacher.model, VOCAB, 9), CachedBlocks)
    engine = SpeculativeEngine(student, teacher, top_k=10_000, draft_tokens=3)
    assert_like_each_row_alone(
        student, quietly(lambda: engine.generate(random_prompts([2, 11], VOCAB), Sampling(max_tokens=25)))
    )


def test_a_mixture_is_that_of_plain_forward_passes_across_the_switch():
    student, teacher = bare_model(neo(9)), bare_model(MADE["phi3 longrope"](12), 1)
    engine, prompts = MixtureEngine(student, teacher, 0.5), random_prompts([2, 11], VOCAB)
    for rollout in quietly(lambda: engine.generate(prompts, Sampling(max_tokens=25))):
        with torch.no_grad():
            both = [of_written(full_logp(one, rollout), rollout) for one in (student, teacher)]
        mixed_T = torch.logsumexp(torch.stack(both), 0).sub(torch.tensor(2.0).log()).float()
        torch.testing.assert_close(rollout.logp_T, mixed_T, atol=1e-4, rtol=0)


# ------------------------------------------------------------------ micro-batches


def written(lengths):
    made = []
    for prompt in random_prompts(lengths, VOCAB):
        ids = prompt.ids
        rollout = Rollout(Prompt(ids[:1], "", prompt.key), list(ids[1:]), torch.zeros(len(ids) - 1), finished=False)
        made.append(Scored(rollout, rollout.weight_T()))
    return made


@pytest.mark.parametrize("name", MADE)
def test_a_row_is_read_the_same_in_any_micro_batch(name):
    config = MADE[name](17)
    model = LanguageModel(bare_model(config).model, tokenizer())
    rows = written([2, 12, 17, 18, 40, 90])

    def logits(some):
        with torch.no_grad():
            return model(pack(some), lambda hidden_TD, head: head(hidden_TD))

    alone = torch.cat([logits([row]) for row in rows])
    torch.testing.assert_close(logits(rows), alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", VARYING)
def test_below_the_switch_a_run_reads_as_transformers_does_and_above_it_by_the_long_factors(name):
    config, ids_1L = MADE[name](40), torch.arange(1, 31)[None]
    model, plain = LanguageModel(bare_model(config).model, tokenizer()), bare_model(config).model
    with torch.no_grad():
        short, long = (plain(ids_1L).logits, plain(torch.cat([ids_1L, ids_1L], 1)).logits[:, :30])
        assert (short - long).abs().max() > 1e-2
        torch.testing.assert_close(model.model(ids_1L).logits, long)
        model.read_up_to(40)
        torch.testing.assert_close(model.model(ids_1L).logits, short)
        model.read_up_to(41)
        torch.testing.assert_close(model.model(ids_1L).logits, long)


def phi3(folder, seed, switch):
    rope = longrope(switch, factor=4.0)
    return make_model(folder, seed, "phi3", rope_parameters=rope, original_max_position_embeddings=switch)


def test_a_run_across_the_switch_does_not_depend_on_micro_batches(tmp_path):
    """Student and teacher, engine and trainer; the weights that it leaves are a model of transformers, unchanged otherwise."""
    student, teacher = phi3(tmp_path / "s", 0, 24), phi3(tmp_path / "t", 1, 24)
    rows = []
    for tokens in (4096, 1):
        made = recipe(student, teacher, tmp_path / f"run{tokens}", steps=2, rollout={"max_tokens": 20})
        made["optim"] = {**made["optim"], "tokens_per_micro_batch": tokens}
        run = kibitz.train(made)
        rows.append(run.metrics)
    longest = [row["longest_response"] for row in rows[0]]
    assert max(longest) > 10, "the test wants texts across the switch"
    for one, other in zip(*rows, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["reverse_kl"] == pytest.approx(other["reverse_kl"], rel=1e-5)
    saved = AutoModelForCausalLM.from_pretrained(run.checkpoint).config
    assert saved.rope_parameters == AutoModelForCausalLM.from_pretrained(student).config.rope_parameters


def test_an_equal_teacher_stays_at_zero_across_the_switch(tmp_path):
    student = phi3(tmp_path / "s", 0, 24)
    run = kibitz.train(recipe(student, student, tmp_path / "run", steps=2, rollout={"max_tokens": 20}))
    assert [row["reverse_kl"] for row in run.metrics] == [0.0, 0.0]


def test_a_run_below_the_switch_reads_by_the_short_factors(tmp_path):
    """Its loss is that of transformers' own forward pass over each demonstration."""
    folder = phi3(tmp_path / "s", 0, 100)
    run = kibitz.train(recipe(folder, None, tmp_path / "run", method={"type": "sft"}, steps=1))
    model = load_model(ModelConfig(model=str(folder)), "student", torch.device("cpu"))
    longer = kibitz.train(
        recipe(folder, None, tmp_path / "long", method={"type": "sft"}, steps=1, rollout={"max_tokens": 99})
    )
    assert model.max_positions == 128
    assert abs(run.metrics[0]["loss"] - longer.metrics[0]["loss"]) > 1e-3
