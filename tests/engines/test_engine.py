"""The embedded engine against brute force: full forward passes, exact probabilities, and Hugging Face's generate."""

import hashlib
import math
import warnings
from typing import get_args

import pytest
import torch
from support.models import bare_model, random_prompts
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from kibitz.config import RolloutConfig
from kibitz.engines.build import ENGINES
from kibitz.engines.cache import CachedDecoder, PlainDecoder, decoder_error
from kibitz.engines.fake import FakeEngine
from kibitz.engines.fused import FusedDecoder
from kibitz.engines.sampling import draw, row_seed, truncate, uniforms
from kibitz.engines.torch import TorchEngine
from kibitz.types import Prompt, Sampling

VOCAB = 61
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 16}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS = {
    "qwen3 tied": Qwen3Config(**GROUPED, tie_word_embeddings=True),
    "qwen3 untied": Qwen3Config(**GROUPED, tie_word_embeddings=False, attention_bias=True),
    "qwen2": Qwen2Config(**{**GROUPED, "head_dim": 8}, tie_word_embeddings=True),
    "llama tied": LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "llama untied": LlamaConfig(**{**GROUPED, "num_key_value_heads": 4}, mlp_bias=True, rope_parameters=LLAMA3_ROPE),
    "gpt2 tied": GPT2Config(**{**SMALL, "intermediate_size": None}, tie_word_embeddings=True),
    "gpt2 untied": GPT2Config(**{**SMALL, "intermediate_size": None}, tie_word_embeddings=False),
}
STOPS = (3, 17, 40)


def make_engine(student, decoder: str = "own choice", max_rows: int = 256) -> TorchEngine:
    engine = TorchEngine(student, max_rows)
    if decoder != "own choice":
        engine.use({"fused": FusedDecoder, "cached": CachedDecoder, "plain": PlainDecoder}[decoder](student.model))
    return engine


def full_forward_logits(student, rollout) -> torch.Tensor:
    """The logits that score a response, by one forward pass over the whole sequence, without cache or padding."""
    ids_1L = torch.tensor([[*rollout.prompt.ids, *rollout.response_ids]])
    first = len(rollout.prompt.ids) - 1
    with torch.no_grad():
        logits_1LV = student.model(input_ids=ids_1L, use_cache=False).logits
    return logits_1LV[0, first : first + rollout.num_tokens, : student.vocab_size].float()


def exact_logp(logits_TV: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Temperature, then top-k, then top-p of what is left, token by token in float64; nothing of the library."""
    rows = (logits_TV.double() / sampling.temperature).softmax(-1).tolist()
    for p_V in rows:
        likeliest = sorted(range(len(p_V)), key=lambda token: -p_V[token])[: sampling.top_k or None]
        total, reached, kept = sum(p_V[token] for token in likeliest), 0.0, set()
        for token in likeliest:
            if reached < sampling.top_p * total:
                kept.add(token)
            reached += p_V[token]
        total = sum(p_V[token] for token in kept)
        p_V[:] = [p / total if token in kept else 0.0 for token, p in enumerate(p_V)]
    return torch.tensor(rows, dtype=torch.float64).log()


def assert_like_full_forward(student, rollouts, sampling, tolerance: float = 1e-4) -> None:
    for rollout in rollouts:
        ids_T = torch.tensor(rollout.response_ids)
        want_T = exact_logp(full_forward_logits(student, rollout), sampling).gather(-1, ids_T[:, None])[:, 0].float()
        assert rollout.logp_T.dtype == torch.float32 and rollout.logp_T.shape == ids_T.shape
        torch.testing.assert_close(rollout.logp_T, want_T, atol=tolerance, rtol=0)


def chi_square_odds(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """The chance of counts at least this far from the expected ones."""
    statistic = ((counts - expected).square() / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2), statistic / 2).item()


# ------------------------------------------------------------------ log-probs and tokens


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("decoder", ["own choice", "cached"])
def test_logp_and_tokens_equal_a_full_forward(name, decoder):
    """Mixed prompt lengths, fewer rows than jobs, several samples, stop tokens: rows leave, enter and move."""
    student = bare_model(CONFIGS[name])
    engine = make_engine(student, decoder, max_rows=5)
    prompts, sampling = (
        random_prompts([1, 9, 2, 30, 3, 17, 2, 8], VOCAB),
        Sampling(max_tokens=24, num_samples=3, stop_ids=STOPS),
    )
    rollouts = engine.generate(prompts, sampling)
    assert [(r.prompt.key, r.sample) for r in rollouts] == [(p.key, s) for p in prompts for s in range(3)]
    assert len({r.num_tokens for r in rollouts}) > 3, "the test wants responses of many lengths"
    assert_like_full_forward(student, rollouts, sampling)
    for rollout in rollouts:  # the token is the one that the documented uniform picks from the exact distribution
        seed = torch.tensor([row_seed(0, rollout.prompt.key, rollout.sample)])
        uniform_T = uniforms(seed, torch.arange(rollout.num_tokens))
        assert draw(full_forward_logits(student, rollout).log_softmax(-1), uniform_T).tolist() == rollout.response_ids


def test_each_rollout_is_ready_once_and_before_the_slower_ones():
    student, ready, read = bare_model(CONFIGS["qwen3 tied"]), [], []
    sampling = Sampling(max_tokens=24, num_samples=3, stop_ids=STOPS)
    count = lambda model, rollouts: read.append((model, rollouts))  # noqa: E731
    written = make_engine(student, max_rows=5).generate(
        random_prompts([1, 9, 2, 30], VOCAB), sampling, ready.append, count
    )
    assert sorted(id(r) for some in ready for r in some) == sorted(map(id, written)) and len(ready) > 3
    assert read == [(student, written)], "the student reads each text once"


def test_every_engine_of_a_recipe_is_in_the_table():
    assert set(get_args(RolloutConfig.model_fields["engine"].annotation)) == ENGINES.keys()


def test_the_engine_takes_the_fastest_decoder_that_fits():
    for name, want in [("qwen3 tied", FusedDecoder), ("llama untied", FusedDecoder), ("gpt2 tied", CachedDecoder)]:
        assert type(make_engine(bare_model(CONFIGS[name])).decoder()) is want
    half = bare_model(CONFIGS["qwen3 tied"])
    half.model.to(torch.bfloat16)
    assert type(make_engine(half).decoder()) is CachedDecoder


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_sliding_windows_shorter_than_the_text(attention):
    student = bare_model(MistralConfig(**GROUPED, sliding_window=5))
    student.model.set_attn_implementation(attention)
    engine, sampling = make_engine(student, max_rows=2), Sampling(max_tokens=20)
    assert type(engine.decoder()) is CachedDecoder
    assert_like_full_forward(student, engine.generate(random_prompts([12, 1, 7], VOCAB), sampling), sampling)


def test_windows_on_some_layers_only():
    config = Qwen3Config(**GROUPED, use_sliding_window=True, sliding_window=5, max_window_layers=1)
    student, sampling = bare_model(config), Sampling(max_tokens=20)
    engine = make_engine(student, max_rows=2)
    assert type(engine.decoder()) is CachedDecoder
    assert_like_full_forward(student, engine.generate(random_prompts([12, 1, 7], VOCAB), sampling), sampling)


def test_an_architecture_without_attention_falls_back_loudly():
    student = bare_model(MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, state_size=4))
    engine, sampling = make_engine(student, max_rows=3), Sampling(max_tokens=8, stop_ids=STOPS)
    with pytest.warns(UserWarning, match="MambaForCausalLM cannot be driven with the engine's KV cache"):
        rollouts = engine.generate(random_prompts([1, 6, 3, 2], VOCAB), sampling)
    assert_like_full_forward(student, rollouts, sampling)
    with warnings.catch_warnings():  # said once, not at every call
        warnings.simplefilter("error")
        engine.generate(random_prompts([2], VOCAB), sampling)


def test_the_self_check_sees_a_wrong_decoder():
    """Of freshly initialised models too, whose log-probs are all nearly equal."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3Config(**GROUPED)).eval()

    class OnePositionLate(CachedDecoder):
        def step(self, token_N, position_N, num_slots):
            return super().step(token_N, (position_N - 1).clamp(min=0), num_slots)

    with torch.no_grad():
        assert decoder_error(CachedDecoder(model), model, VOCAB) < 1e-5
        assert decoder_error(OnePositionLate(model), model, VOCAB) > 1e-2


@pytest.mark.parametrize("decoder", ["fused", "cached", "plain"])
def test_a_prompt_gives_the_same_rollout_in_any_company(decoder):
    """Floating-point noise could flip a token with odds of about 1e-6 each: 1e-3 for this test, were it not seeded."""
    student = bare_model(CONFIGS["qwen3 tied"])
    prompts, sampling = (
        random_prompts([4, 1, 25, 9, 2, 14, 3], VOCAB),
        Sampling(max_tokens=16, num_samples=2, stop_ids=STOPS),
    )
    crowd = make_engine(student, decoder, max_rows=4).generate(prompts, sampling)
    for index, prompt in enumerate(prompts):
        alone = make_engine(student, decoder).generate([prompt], sampling)
        for lonely, social in zip(alone, crowd[2 * index : 2 * index + 2], strict=True):
            assert lonely.response_ids == social.response_ids
            torch.testing.assert_close(lonely.logp_T, social.logp_T, atol=1e-5, rtol=0)
    other = make_engine(student, decoder).generate(prompts, Sampling(max_tokens=16, num_samples=2, seed=1))
    assert [r.response_ids for r in other] != [r.response_ids for r in crowd]


@pytest.mark.parametrize("name", ["qwen3 untied", "gpt2 tied"])
def test_greedy_equals_hugging_face(name):
    student = bare_model(CONFIGS[name])
    prompts, sampling = random_prompts([7, 2, 19], VOCAB), Sampling(max_tokens=20, temperature=0.0)
    rollouts = make_engine(student, max_rows=2).generate(prompts, sampling)
    for prompt, rollout in zip(prompts, rollouts, strict=True):
        ids_1P = torch.tensor([prompt.ids])
        out_1L = student.model.generate(
            ids_1P, attention_mask=torch.ones_like(ids_1P), do_sample=False, max_new_tokens=20, pad_token_id=0
        )
        assert rollout.response_ids == out_1L[0, len(prompt.ids) :].tolist()
    assert_like_full_forward(student, rollouts, Sampling(temperature=1.0))


def test_new_weights_are_seen_at_once():
    student = bare_model(CONFIGS["llama tied"])
    engine, prompts, sampling = make_engine(student), random_prompts([5, 8], VOCAB), Sampling(max_tokens=10)
    before = engine.generate(prompts, sampling)
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    after = engine.generate(prompts, sampling)
    assert [r.response_ids for r in before] != [r.response_ids for r in after]
    assert_like_full_forward(student, after, sampling)
    other = bare_model(CONFIGS["gpt2 tied"])
    engine.sync(other)
    assert_like_full_forward(other, engine.generate(prompts, sampling), sampling)


def test_dropout_is_off_and_the_mode_comes_back():
    student = bare_model(GPT2Config(**{**SMALL, "intermediate_size": None}, resid_pdrop=0.5, embd_pdrop=0.5))
    student.model.train()
    student.model.transformer.h[0].eval()
    modes = [module.training for module in student.model.modules()]
    sampling = Sampling(max_tokens=8)
    rollouts = make_engine(student).generate(random_prompts([4], VOCAB), sampling)
    assert [module.training for module in student.model.modules()] == modes
    student.model.eval()
    assert_like_full_forward(student, rollouts, sampling)


# ------------------------------------------------------------------ where responses end


def test_a_stop_token_ends_a_response_and_belongs_to_it():
    student = bare_model(CONFIGS["qwen3 tied"])
    rollouts = make_engine(student, max_rows=8).generate(
        random_prompts([3] * 40, VOCAB), Sampling(max_tokens=30, stop_ids=STOPS)
    )
    assert {r.finished for r in rollouts} == {True, False}
    for rollout in rollouts:
        assert not set(rollout.response_ids[:-1]) & set(STOPS)
        assert rollout.finished == (rollout.response_ids[-1] in STOPS)
        assert rollout.finished or rollout.num_tokens == 30


def test_stop_tokens_do_not_change_what_comes_before_them():
    student, prompts = bare_model(CONFIGS["llama tied"]), random_prompts([3, 11, 6, 2], VOCAB)
    free = make_engine(student).generate(prompts, Sampling(max_tokens=30))
    for short, long in zip(
        make_engine(student).generate(prompts, Sampling(max_tokens=30, stop_ids=STOPS)), free, strict=True
    ):
        assert short.response_ids == long.response_ids[: short.num_tokens]


def test_a_stop_token_at_the_very_limit_is_finished():
    student, prompts = bare_model(CONFIGS["qwen3 tied"]), random_prompts([6], VOCAB)
    last = make_engine(student).generate(prompts, Sampling(max_tokens=5))[0].response_ids[-1]
    (rollout,) = make_engine(student).generate(prompts, Sampling(max_tokens=5, stop_ids=(last,)))
    assert rollout.finished and rollout.response_ids[-1] == last


def test_padding_equal_to_the_stop_token():
    """Prompts hold it, prefill pads with it (0), the configuration calls it both: only a sampled one ends a row."""
    config = Qwen3Config(**{**GROUPED, "pad_token_id": 0, "eos_token_id": 0})
    student, sampling = bare_model(config), Sampling(max_tokens=12, stop_ids=(0,), temperature=1.5)
    prompts = [Prompt((0, 5, 0, 0), "", "a"), Prompt((0,), "", "b"), Prompt((7, 8, 9, 1, 2, 3, 0, 0, 0), "", "c")] * 10
    prompts = [Prompt(p.ids, "", f"{p.key}{i}") for i, p in enumerate(prompts)]
    rollouts = make_engine(student, max_rows=7).generate(prompts, sampling)
    assert any(r.finished for r in rollouts) and all(0 not in r.response_ids[:-1] for r in rollouts)
    assert_like_full_forward(student, rollouts, sampling)


def test_padded_vocabulary_is_never_sampled():
    student = bare_model(CONFIGS["qwen3 untied"], vocab_size=50)
    with torch.no_grad():
        student.model.lm_head.weight[50:] *= 10.0  # the padding would win nearly always
    sampling = Sampling(max_tokens=16, num_samples=4)
    prompts = [Prompt(tuple(i % 50 for i in p.ids), "", p.key) for p in random_prompts([3, 9, 5], VOCAB)]
    rollouts = make_engine(student).generate(prompts, sampling)
    assert max(max(r.response_ids) for r in rollouts) < 50
    assert_like_full_forward(student, rollouts, sampling)


# ------------------------------------------------------------------ distributions


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_tokens=1, num_samples=4000),
        Sampling(max_tokens=1, num_samples=4000, temperature=2.0),
        Sampling(max_tokens=1, num_samples=4000, temperature=0.5, top_k=6),
        Sampling(max_tokens=1, num_samples=4000, top_p=0.8),
        Sampling(max_tokens=1, num_samples=4000, top_k=9, top_p=0.9),
    ],
    ids=["plain", "hot", "top-k", "top-p", "both"],
)
def test_tokens_come_as_often_as_their_probability_says(sampling):
    """Chi-square over tokens expected at least 5 times, the rest in one bin. Fails by chance once in 10^4 seeds."""
    student = bare_model(CONFIGS["qwen3 tied"])
    rollouts = make_engine(student, max_rows=500).generate(random_prompts([6], VOCAB), sampling)
    logp_V = exact_logp(full_forward_logits(student, rollouts[0])[:1], sampling)[0]
    counts_V = torch.bincount(torch.tensor([r.response_ids[0] for r in rollouts]), minlength=VOCAB)
    assert counts_V[logp_V == -math.inf].sum() == 0
    expected_V = logp_V.exp() * len(rollouts)
    often_V = expected_V >= 5
    counts = torch.cat([counts_V[often_V], counts_V[~often_V].sum()[None]]).float()
    expected = torch.cat([expected_V[often_V], expected_V[~often_V].sum()[None]])
    keep = expected > 0
    assert keep.sum() > 3
    assert chi_square_odds(counts[keep], expected[keep]) > 1e-4


@pytest.mark.parametrize(
    "sampling", [Sampling(top_k=4), Sampling(top_p=0.7, temperature=1.3), Sampling(top_k=5, top_p=0.6)]
)
def test_truncated_logp_are_those_of_the_truncated_distribution(sampling):
    sampling = Sampling(**{**vars(sampling), "max_tokens": 12, "stop_ids": STOPS})
    student = bare_model(CONFIGS["llama tied"])
    rollouts = make_engine(student, max_rows=3).generate(random_prompts([2, 8, 5, 13, 1], VOCAB), sampling)
    assert_like_full_forward(student, rollouts, sampling)
    for rollout in rollouts:
        kept = (exact_logp(full_forward_logits(student, rollout), sampling) > -math.inf).sum(-1)
        assert sampling.top_k == 0 or (kept <= sampling.top_k).all()


def test_truncation_by_hand():
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    kept = lambda **limits: (truncate(logits, **limits) > -math.inf)[0].tolist()  # noqa: E731
    assert kept(top_k=2, top_p=1.0) == [False, True, False, True]
    assert kept(top_k=0, top_p=0.65) == [False, True, False, True]
    assert kept(top_k=0, top_p=0.75) == [False, True, True, True]
    assert kept(top_k=0, top_p=1e-9) == [False, True, False, False]
    assert kept(top_k=3, top_p=0.75) == [False, True, False, True]  # of 4/9, 3/9, 2/9 the first two are 7/9
    assert kept(top_k=99, top_p=1.0) == [True] * 4
    tied = truncate(torch.zeros(1, 5), top_k=2, top_p=1.0)
    assert (tied > -math.inf)[0].tolist() == [True, True, False, False, False]


def test_the_inverse_cdf_stays_on_tokens_that_have_a_probability():
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 2.0, -math.inf])
    most = 1.0 - 2.0**-53
    uniform_N = torch.tensor([0.0, 2.0**-53, 0.5, most], dtype=torch.float64)
    assert draw(logits.log_softmax(-1).expand(4, -1), uniform_N).tolist() == [1, 1, 3, 3]
    wide_NV = torch.randn(50, 30_000, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    assert draw(wide_NV, torch.full((50,), most, dtype=torch.float64)).max() < 30_000


def test_a_large_vocabulary_is_searched_in_float64():
    """Of equally likely tokens, u just inside the i-th bin gives i; in float32 the bins' edges are further off than that."""
    vocab = 150_000
    token_N = torch.arange(vocab // 2, vocab, 3_001)
    uniform_N = (token_N.double() + 0.002) / vocab
    assert draw(torch.zeros(1, vocab).log_softmax(-1).expand(len(token_N), -1), uniform_N).tolist() == token_N.tolist()


# ------------------------------------------------------------------ seeds


def plain_python_uniform(seed: int, key: str, sample: int, position: int) -> float:
    """The documented algorithm in integers without width."""
    z = int.from_bytes(hashlib.blake2b(f"{seed}|{key}|{sample}".encode()).digest()[:8], "little")
    z = (z + (position + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return ((z ^ z >> 31) >> 11) / 2**53


def test_uniforms_can_be_written_again_in_plain_python():
    for seed, key, sample in [(0, "a", 0), (7, "row|with|bars", 3), (2**40, "ü", 1)]:
        ours = uniforms(torch.tensor(row_seed(seed, key, sample)), torch.arange(2000))
        assert ours.tolist() == [plain_python_uniform(seed, key, sample, t) for t in range(2000)]


def test_splitmix_reference_values():
    """The first outputs of splitmix64 from state 1234567, as published with the generator."""
    outputs = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert uniforms(torch.tensor(1234567), torch.arange(3)).tolist() == [(z >> 11) / 2**53 for z in outputs]


def test_uniforms_are_uniform_along_and_across_rows():
    """Chi-square on 64 bins, and on 16 x 16 pairs of neighbours. Each fails by chance once in 10^4."""
    seeds = torch.tensor([row_seed(0, str(row), 0) for row in range(400)])
    u_RT = uniforms(seeds[:, None], torch.arange(250))
    assert u_RT.min() >= 0 and u_RT.max() < 1
    counts = torch.histc(u_RT.float(), 64, 0, 1)
    assert chi_square_odds(counts, torch.full((64,), u_RT.numel() / 64)) > 1e-4
    for first, second in [(u_RT[:, :-1:2], u_RT[:, 1::2]), (u_RT[:-1:2], u_RT[1::2])]:
        pairs = (first * 16).long() * 16 + (second * 16).long()
        counts = torch.bincount(pairs.flatten(), minlength=256).float()
        assert chi_square_odds(counts, torch.full((256,), pairs.numel() / 256)) > 1e-4


# ------------------------------------------------------------------ mistakes of the caller


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ((), Sampling(max_tokens=4), "prompt 'p' has no token ids"),
        (
            (1,) * 90,
            Sampling(max_tokens=20),
            "write rollout.max_tokens=6 or less$",
        ),
        ((1,) * 96, Sampling(max_tokens=20), "context of 96: shorten it$"),
        ((1, VOCAB), Sampling(max_tokens=4), "token ids that the student does not have"),
        ((1,), Sampling(max_tokens=0), "max_tokens must be at least 1, and is 0"),
        ((1,), Sampling(max_tokens=4, top_p=0.0), "top_p must be greater than 0"),
        ((1,), Sampling(max_tokens=4, temperature=-1.0), "temperature must be 0"),
        ((1,), Sampling(max_tokens=4, top_k=-1), "top_k must be 0"),
    ],
)
def test_errors_say_what_to_change(prompt, sampling, message):
    engine = make_engine(bare_model(CONFIGS["gpt2 tied"]))
    with pytest.raises(ValueError, match=message):
        engine.generate([Prompt(prompt, "", "p")], sampling)


def test_the_context_can_be_filled_to_its_end():
    for name in ("gpt2 tied", "qwen3 tied"):
        student, sampling = bare_model(CONFIGS[name]), Sampling(max_tokens=6)
        assert_like_full_forward(
            student, make_engine(student).generate(random_prompts([90, 1], VOCAB), sampling), sampling
        )


def test_diverged_weights_are_an_error():
    student = bare_model(CONFIGS["qwen3 tied"])
    engine = make_engine(student, "cached")
    with torch.no_grad():
        student.model.model.norm.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="logits were not finite while it answered prompt 'row-0'"):
        engine.generate(random_prompts([4], VOCAB), Sampling(max_tokens=3))


def test_no_prompts_no_rollouts():
    assert make_engine(bare_model(CONFIGS["qwen3 tied"])).generate([], Sampling()) == []


# ------------------------------------------------------------------ the fake


def test_the_fake_draws_from_its_table():
    logits_VV = torch.randn(7, 7, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(max_tokens=9, num_samples=3, stop_ids=(2,), top_k=4)
    prompts = [Prompt((1, 3), "", "a"), Prompt((5,), "", "b")]
    engine = FakeEngine(logits_VV)
    rollouts = engine.generate(prompts, sampling)
    assert [(r.prompt.key, r.sample) for r in rollouts] == [(k, s) for k in "ab" for s in range(3)]
    assert [r.response_ids for r in FakeEngine(logits_VV).generate(prompts, sampling)] == [
        r.response_ids for r in rollouts
    ]
    logp_VV = exact_logp(logits_VV, sampling).float()
    for r in rollouts:
        before = [r.prompt.ids[-1], *r.response_ids[:-1]]
        torch.testing.assert_close(r.logp_T, logp_VV[before, r.response_ids])
        assert r.finished == (r.response_ids[-1] == 2) and 2 not in r.response_ids[:-1]
    engine.sync(None)
    assert engine.num_syncs == 1 and engine.calls == [(prompts, sampling)]


def test_the_fake_recites_its_script():
    engine = FakeEngine(script=lambda prompt, sample: [*prompt.ids, sample, 9, 4, 4])
    sampling = Sampling(max_tokens=4, num_samples=2, stop_ids=(9,))
    first, second = engine.generate([Prompt((7,), "", "a")], sampling)
    assert (first.response_ids, second.response_ids) == ([7, 0, 9], [7, 1, 9])
    assert first.finished and first.logp_T.tolist() == [0.0] * 3
    (cut,) = engine.generate([Prompt((1, 2, 3), "", "a")], Sampling(max_tokens=4, stop_ids=(9,)))
    assert cut.response_ids == [1, 2, 3, 0] and not cut.finished
    with pytest.raises(ValueError, match="either a table of bigram logits or a script"):
        FakeEngine()
