"""A teacher with a tokenizer of its own: what it says of spans, and what is learnt from that, against brute force."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import language_model, make_model
from support.models import tokenizer as toy_tokenizer
from support.runs import recipe
from support.tokenizers_zoo import zoo
from transformers import AutoConfig, AutoModelForCausalLM

import kibitz
from kibitz.batching import pack
from kibitz.config import RecipeError
from kibitz.losses.chunked import over_chunks
from kibitz.losses.criteria import Divergence, PolicyGradient, SpanLoss
from kibitz.losses.divergences import jsd, reverse_kl
from kibitz.losses.spans import CERTAIN, MergedDistributions, SpanLikelihood, alm, merged, sorted_l1
from kibitz.models import LanguageModel
from kibitz.signals import Dense, Scored, Spans, cat_signals
from kibitz.teachers import ScoreRequest
from kibitz.teachers.aligned import aligned
from kibitz.teachers.alignment import Aligner
from kibitz.teachers.local import LocalScorer, local_teacher
from kibitz.training.setup import prepare
from kibitz.types import Prompt, Rollout

TEXTS = ["the student writes, and", "naïve café 学生 12 + 34 = 46", "😀 dogs", "ok"]


def model_of(kind: str, seed: int, extra_rows: int = 0) -> LanguageModel:
    """A random model in float64 over one of the tokenizers, its vocabulary padded by some rows."""
    tokenizer = zoo()[kind]
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=len(tokenizer) + extra_rows,
        head_dim=8,
        num_key_value_heads=2,
        initializer_range=0.3,
        **sizes,
    )
    torch.manual_seed(seed)
    return LanguageModel(AutoModelForCausalLM.from_config(config).double(), tokenizer, kind)


def rollout_of(model: LanguageModel, text: str, finished: bool = True) -> Rollout:
    """A response as `model` would have sampled it."""
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"] + [model.tokenizer.eos_token_id] * finished
    prompt_ids = tuple(model.tokenizer("12 dogs:")["input_ids"])
    logits = model.model(torch.tensor([[*prompt_ids, *ids]])).logits[0, len(prompt_ids) - 1 : -1, : model.vocab_size]
    logp_T = logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0].detach()
    return Rollout(Prompt(prompt_ids, "12 dogs:", "key"), ids, logp_T, finished)


def brute_logp(model: LanguageModel, ids: list[int]) -> list[float]:
    """Token by token, each with a forward pass of its own."""
    prompt, found = model.tokenizer("12 dogs:")["input_ids"], []
    for number, token in enumerate(ids):
        logits = model.model(torch.tensor([[*prompt, *ids[:number]]])).logits[0, -1, : model.vocab_size]
        found.append(logits.double().log_softmax(-1)[token].item())
    return found


def loss_and_gradient(student: LanguageModel, scored: list[Scored], criterion, chunk: int = 1024):
    student.zero_grad()
    batch = pack(scored)
    total, values = student(batch, lambda hidden, head: over_chunks(criterion, hidden, head, batch.tokens, chunk))
    total.backward()
    gradient = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
    return total.item(), gradient, values


def heard(
    student: LanguageModel, teacher: LanguageModel, rollouts: list[Rollout], kind="spans", same=None
) -> list[Spans]:
    aligner = Aligner(student.tokenizer, teacher.tokenizer)
    if same is not None:
        aligner.__dict__["same"] = same
    return aligned(local_teacher(teacher), aligner, {}).scorer(ScoreRequest(kind)).score(rollouts)


@pytest.fixture(scope="module")
def pair():
    return model_of("characters", 0), model_of("llama-3", 1)


# ---------------------------------------------------------------------------------------------------------- signal


@pytest.mark.parametrize(
    ("ours", "theirs"), [("characters", "llama-3"), ("byte-level", "unigram"), ("unigram", "qwen")]
)
def test_the_probability_of_a_span_is_the_product_of_its_tokens(ours, theirs):
    student, teacher = model_of(ours, 0), model_of(theirs, 1)
    rollouts = [rollout_of(student, text, finished) for text, finished in zip(TEXTS, (1, 0, 1, 1), strict=True)]
    for rollout, signal in zip(rollouts, heard(student, teacher, rollouts), strict=True):
        alignment = Aligner(student.tokenizer, teacher.tokenizer).align(rollout.response_ids, rollout.finished)
        mine, said = brute_logp(student, rollout.response_ids), brute_logp(teacher, alignment.teacher_ids)
        for number, span in enumerate(alignment.spans):
            ours_sum = math.fsum(mine[slice(*span.student)])
            theirs_sum = math.fsum(said[slice(*span.teacher)]) if span.comparable else ours_sum
            for token in range(*span.student):
                assert signal.span_T[token] == number
                assert signal.size_T[token] == span.num_student and signal.bytes_T[token] == span.num_bytes
                assert signal.student_logp_T[token].item() == pytest.approx(ours_sum, abs=1e-5)
                assert signal.teacher_logp_T[token].item() == pytest.approx(theirs_sum, abs=1e-5)
                assert signal.comparable_T[token] == float(span.comparable)


def test_spans_of_several_rollouts_count_on_and_any_part_keeps_what_it_knows(pair):
    student, teacher = pair
    signals = heard(student, teacher, [rollout_of(student, text) for text in TEXTS], "span_distributions")
    whole = cat_signals(signals)
    assert len(whole.span_T.unique()) == sum(len(s.span_T.unique()) for s in signals)
    start = 0
    for signal in signals:
        part = whole[start : start + len(signal.span_T)]
        assert torch.equal(part.teacher_logp_T, signal.teacher_logp_T)
        assert torch.equal(part.first.dense.hidden_TD, signal.first.dense.hidden_TD)
        assert torch.equal(part.span_T - part.span_T[0], signal.span_T)
        start += len(signal.span_T)


def test_a_padded_vocabulary_is_cut_to_the_tokenizer():
    """Two models of one family, 151,936 and 152,064 rows over 151,665 tokens, are this in large."""
    student, plain, padded = model_of("qwen", 0, extra_rows=7), model_of("qwen", 1), model_of("qwen", 1, extra_rows=133)
    for role in ("model.embed_tokens.weight", "lm_head.weight"):
        padded.model.get_parameter(role).data[: plain.vocab_size] = plain.model.get_parameter(role).data
        padded.model.get_parameter(role).data[plain.vocab_size :] = 50.0  # would take all probability
    padded.model.model.layers.load_state_dict(plain.model.model.layers.state_dict())
    assert student.vocab_size == plain.vocab_size == padded.vocab_size == len(zoo()["qwen"])
    rollouts = [rollout_of(student, text) for text in TEXTS]
    for one, other in zip(heard(student, plain, rollouts), heard(student, padded, rollouts), strict=True):
        assert torch.allclose(one.teacher_logp_T, other.teacher_logp_T, atol=1e-6)
    for signal in (LocalScorer(plain, ScoreRequest("dense")), LocalScorer(padded, ScoreRequest("dense"))):
        scored = [Scored(r, r.weight_T(), s) for r, s in zip(rollouts, signal.score(rollouts), strict=True)]
        assert math.isfinite(loss_and_gradient(student, scored, Divergence())[0])


def test_a_response_of_which_the_teacher_reads_nothing_teaches_nothing():
    student, teacher = model_of("qwen", 0), model_of("unigram", 1)
    special = student.tokenizer.convert_tokens_to_ids("<|im_start|>")
    rollout = replace(rollout_of(student, "x", finished=False), response_ids=[special])
    rollout.logp_T = rollout.logp_T[:1]
    with pytest.warns(UserWarning, match="1 of 1 response tokens cannot be compared"):
        (signal,) = heard(student, teacher, [rollout])
    assert Scored.from_signal(rollout, signal).weight_T.tolist() == [0.0]
    loss, gradient, _ = loss_and_gradient(student, [Scored.from_signal(rollout, signal)], PolicyGradient())
    assert loss == 0 and not gradient.any()


# ------------------------------------------------------------------------------------- one tokenizer: plain OPD


@pytest.mark.parametrize("same", [True, False])
@settings(max_examples=15)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8), min_size=1, max_size=3)
)
def test_with_one_tokenizer_spans_are_plain_opd(same, texts):
    """Loss and gradient of the policy gradient to 1e-6, whether the aligner knows that it is one tokenizer or finds out."""
    student, teacher = model_of("llama-3", 0), model_of("llama-3", 1)
    rollouts = [rollout_of(student, text) for text in texts]
    plain = LocalScorer(teacher, ScoreRequest("sampled")).score(rollouts)
    expected = [Scored(r, r.weight_T(), s) for r, s in zip(rollouts, plain, strict=True)]
    spans = [
        Scored.from_signal(r, s) for r, s in zip(rollouts, heard(student, teacher, rollouts, same=same), strict=True)
    ]
    loss, gradient, values = loss_and_gradient(student, expected, PolicyGradient())
    other, other_gradient, other_values = loss_and_gradient(student, spans, PolicyGradient())
    assert other == pytest.approx(loss, rel=1e-6, abs=1e-6)
    assert torch.allclose(gradient, other_gradient, rtol=1e-6, atol=1e-6 * gradient.abs().max().item())
    for name in ("advantage", "reverse_kl", "teacher_logp", "student_logp"):
        assert torch.allclose(values[name], other_values[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("divergence", [jsd, reverse_kl])
def test_with_one_tokenizer_gold_is_the_divergence(divergence):
    student, teacher = model_of("qwen", 0), model_of("qwen", 1)
    rollouts = [rollout_of(student, text) for text in TEXTS]
    dense = LocalScorer(teacher, ScoreRequest("dense")).score(rollouts)
    expected = [Scored(r, r.weight_T(), s) for r, s in zip(rollouts, dense, strict=True)]
    signals = heard(student, teacher, rollouts, "span_distributions")
    spans = [Scored.from_signal(r, s) for r, s in zip(rollouts, signals, strict=True)]
    loss, gradient, _ = loss_and_gradient(student, expected, Divergence(divergence))
    other, other_gradient, _ = loss_and_gradient(student, spans, SpanLoss(MergedDistributions(divergence)))
    assert other == pytest.approx(loss, rel=1e-6)
    assert torch.allclose(gradient, other_gradient, rtol=1e-6, atol=1e-6 * gradient.abs().max().item())


# -------------------------------------------------------------------------------------------- the loss, by brute force


CRITERIA = {
    "spans": PolicyGradient(),
    "alm": SpanLoss(SpanLikelihood()),
    "alm, limit": SpanLoss(SpanLikelihood(None)),
    "gold": SpanLoss(MergedDistributions(jsd)),
    "uld": SpanLoss(MergedDistributions(None)),
}


@pytest.mark.parametrize("name", CRITERIA)
def test_no_chunk_and_no_micro_batch_changes_the_loss_or_its_gradient(pair, name):
    student, teacher = pair
    rollouts = [rollout_of(student, text) for text in TEXTS]
    signals = heard(student, teacher, rollouts, "span_distributions")
    scored = [Scored.from_signal(r, s) for r, s in zip(rollouts, signals, strict=True)]
    loss, gradient, values = loss_and_gradient(student, scored, CRITERIA[name])
    assert max(s.size_T.max() for s in signals) > 3  # there is something to cut
    for chunk in (1, 2, 3, 7):
        other, other_gradient, other_values = loss_and_gradient(student, scored, CRITERIA[name], chunk)
        assert other == pytest.approx(loss, rel=1e-9)
        assert torch.allclose(gradient, other_gradient, rtol=1e-6, atol=1e-9)
        assert all(torch.allclose(values[key], other_values[key], atol=1e-9) for key in values)
    apart = [loss_and_gradient(student, [one], CRITERIA[name]) for one in scored]
    assert sum(one[0] for one in apart) == pytest.approx(loss, rel=1e-6)


def brute_loss(student: LanguageModel, teacher: LanguageModel, rollout: Rollout, formula) -> torch.Tensor:
    """sum over the spans of formula(student's logits of the span, its ids, teacher's, its ids), written as a loop."""
    alignment = Aligner(student.tokenizer, teacher.tokenizer).align(rollout.response_ids, rollout.finished)

    def logits(model: LanguageModel, ids: list[int]) -> torch.Tensor:
        prompt = model.tokenizer("12 dogs:")["input_ids"]
        return model.model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1, : model.vocab_size]

    ours, theirs = logits(student, rollout.response_ids), logits(teacher, alignment.teacher_ids).detach()
    return sum(
        formula(ours[slice(*span.student)].log_softmax(-1), rollout.response_ids[slice(*span.student)],
                theirs[slice(*span.teacher)].log_softmax(-1), alignment.teacher_ids[slice(*span.teacher)])
        for span in alignment.spans if span.comparable
    )  # fmt: skip


def of_written(logp_TV: torch.Tensor, ids: list[int], start: int = 0) -> torch.Tensor:
    return sum((logp_TV[i, ids[i]] for i in range(start, len(ids))), torch.zeros((), dtype=logp_TV.dtype))


FORMULAS = {
    # the score function of the joint: each token's log-probability times the whole span's log-ratio
    "spans": lambda s, a, t, b: -(of_written(t, b) - of_written(s, a)).detach() * of_written(s, a),
    "alm": lambda s, a, t, b: _coin(of_written(s, a), of_written(t, b), 100.0),
    "uld": lambda s, a, t, b: _sorted(s[0].exp() * of_written(s, a, 1).exp(), t[0].exp() * of_written(t, b, 1).exp()),
}


def _coin(s, t, tau):
    p, q = (t / tau).exp(), (s / tau).exp()
    return tau * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())


def _sorted(p, q):
    size = max(len(p), len(q))
    p, q = (torch.cat([x, x.new_zeros(size - len(x))]).sort(descending=True).values for x in (p, q))
    return (p - q).abs().sum()


@pytest.mark.parametrize("name", FORMULAS)
def test_gradients_are_those_of_the_formula_written_as_a_loop(pair, name):
    """Above all that the first distribution is the one from which the first token was drawn: `logits[0]` of the span."""
    student, teacher = pair
    rollouts = [rollout_of(student, text) for text in TEXTS[:2]]
    signals = heard(student, teacher, rollouts, "span_distributions")
    scored = [Scored.from_signal(r, s) for r, s in zip(rollouts, signals, strict=True)]
    loss, gradient, _ = loss_and_gradient(student, scored, CRITERIA[name])
    student.zero_grad()
    total = sum(brute_loss(student, teacher, rollout, FORMULAS[name]) for rollout in rollouts)
    total.backward()
    expected = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
    if name != "spans":  # a policy gradient's value is another matter
        assert loss == pytest.approx(total.item(), rel=1e-4)
    assert torch.allclose(gradient, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_gold_compares_equal_words_and_sorts_the_others(pair):
    student, teacher = pair
    aligner = Aligner(student.tokenizer, teacher.tokenizer)
    ours, theirs = aligner.shared_ids
    names = [(student.tokenizer.decode([a]), teacher.tokenizer.decode([b])) for a, b in zip(ours, theirs, strict=True)]
    assert all(a == b or {a, b} == {"</s>", "<|eot_id|>"} for a, b in names)
    assert len(set(ours)) == len(ours) and len(set(theirs)) == len(theirs)
    assert len(ours) > 60  # most letters of the corpus are a token of both
    vocabulary = student.vocab_size
    generator = torch.Generator().manual_seed(0)
    s = torch.randn(3, vocabulary, generator=generator, dtype=torch.float64).log_softmax(-1) - 0.3
    t = torch.randn(3, teacher.vocab_size, generator=generator, dtype=torch.float64).log_softmax(-1) - 0.2
    weight = len(ours) / vocabulary
    rest_s = [i for i in range(vocabulary) if i not in ours]
    rest_t = [i for i in range(teacher.vocab_size) if i not in theirs]
    value = merged(s, t, (torch.tensor(ours), torch.tensor(theirs)), jsd)
    for row in range(3):
        expected = weight * jsd(s[row, ours], t[row, theirs]) + (1 - weight) * _sorted(
            s[row, rest_s].exp(), t[row, rest_t].exp()
        )
        assert value[row].item() == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize(
    ("ours", "theirs"), [("unigram", "llama-3"), ("word-piece", "byte-level"), ("qwen", "llama-2")]
)
def test_tokens_of_equal_meaning_are_equal_text_behind_other_text(ours, theirs):
    aligner = Aligner(zoo()[ours], zoo()[theirs])
    pairs = list(zip(*aligner.shared_ids, strict=True))
    assert len(pairs) > 40

    def text(kind: str, token: int) -> str:
        word = zoo()[kind]("the", add_special_tokens=False)["input_ids"]
        decode = zoo()[kind].decode
        return decode([*word, token], clean_up_tokenization_spaces=False)[len(decode(word)) :]

    for a, b in pairs:
        if a != zoo()[ours].eos_token_id:
            assert text(ours, a) == text(theirs, b)


# --------------------------------------------------------------------------------------------------------- formulas


@settings(max_examples=200)
@given(st.floats(-30, -1e-5), st.floats(-30, -1e-5), st.sampled_from([1.0, 2.0, 100.0]))
def test_alm_is_the_kl_of_two_coins(student, teacher, tau):
    s, t = torch.tensor([student], dtype=torch.float64), torch.tensor([teacher], dtype=torch.float64)
    value = alm(s, t, tau).item()
    assert value >= -1e-12 and alm(s, s, tau).item() == pytest.approx(0, abs=1e-12)
    assert value == pytest.approx(_coin(s, t, tau).item(), rel=1e-5, abs=1e-9)


def test_alm_has_a_limit_and_finite_ends():
    s, t = torch.linspace(-20, -0.01, 50, dtype=torch.float64), torch.linspace(-0.02, -9, 50, dtype=torch.float64)
    assert torch.allclose(alm(s, t, 1e6), alm(s, t, None), rtol=1e-4)
    ends = torch.tensor([0.0, -1e-9, -1e4], requires_grad=True)
    for tau in (1.0, 100.0, None):
        for teacher in (0.0, -1e4):
            (gradient,) = torch.autograd.grad(alm(ends, torch.full((3,), teacher), tau).sum(), ends)
            assert torch.isfinite(alm(ends, torch.full((3,), teacher), tau)).all() and torch.isfinite(gradient).all()
    assert CERTAIN < 0


@settings(max_examples=100)
@given(st.lists(st.floats(-8, 0), min_size=1, max_size=9), st.lists(st.floats(-8, 0), min_size=1, max_size=9))
def test_uld_sorts_and_fills_up_with_zeros(student, teacher):
    s, t = (torch.tensor([x], dtype=torch.float64) for x in (student, teacher))
    assert sorted_l1(s, t).item() == pytest.approx(_sorted(s[0].exp(), t[0].exp()).item(), abs=1e-12)
    assert sorted_l1(s, t).item() == pytest.approx(sorted_l1(t, s).item(), abs=1e-12)
    assert sorted_l1(s, s.flip(-1)).item() == 0  # which token it is does not count


def test_a_loss_of_spans_wants_spans(pair):
    student, _ = pair
    rollout = rollout_of(student, "ok")
    dense = LocalScorer(student, ScoreRequest("dense")).score([rollout])[0]
    assert isinstance(dense, Dense)
    with pytest.raises(ValueError, match="write teacher.tokenizer=own"):
        loss_and_gradient(student, [Scored(rollout, rollout.weight_T(), dense)], SpanLoss(SpanLikelihood()))


# ------------------------------------------------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """`student` of characters and `teacher` of a BPE over the arithmetic world, with another chat template."""
    from tokenizers import Tokenizer, decoders, models, trainers
    from transformers import PreTrainedTokenizerFast

    from kibitz import worlds

    home = tmp_path_factory.mktemp("models")
    make_model(home / "student", seed=1)
    rows = worlds.get("arithmetic").demonstrations("train", 200, 0)
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=special, show_progress=False)
    backend.train_from_iterator((row["response"] for row in rows), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0]['content'] }}="
    options = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": 1,
        "pad_token_id": 0,
    }
    make_model(home / "teacher", seed=2, **options)
    tokenizer.save_pretrained(home / "teacher")
    return home


def own(folders: Path, output: Path, **sections):
    made = recipe(folders / "student", folders / "teacher", output, **sections)
    made["teacher"]["tokenizer"] = "own"
    return made


METHODS = [
    {"support": "sampled", "clip_advantage": 3.0},
    {"alignment": "alm"},
    {"alignment": "gold", "divergence": "jsd"},
    {"alignment": "uld", "token_weight": "entropy"},
]


@pytest.mark.filterwarnings("ignore:.*cannot be compared")  # random models write special tokens inside a response
@pytest.mark.parametrize("method", METHODS, ids=["spans", "alm", "gold", "uld"])
def test_a_run_with_a_teacher_of_another_tokenizer(folders, tmp_path, method):
    run = kibitz.train(own(folders, tmp_path / "run", method={"type": "opd", **method}, steps=2))
    for row in run.metrics:
        assert math.isfinite(row["loss"]) and row["grad_norm"] > 0 and 0 <= row["unaligned"] < 0.5
        assert row["reverse_kl"] > 0
    assert {"reverse_kl", "reverse_kl_per_byte", "unaligned"} <= run.evals[-1].keys()
    rows = [json.loads(line) for line in (run.folder / "rollouts.jsonl").read_text().splitlines()]
    for row in rows:
        spans = [token["span"] for token in row["tokens"]]
        assert spans[0] == 0 and all(b - a in (0, 1) for a, b in pairwise(spans))


def test_the_teacher_reads_its_own_template(folders, tmp_path):
    setup = prepare(own(folders, tmp_path / "run", method={"type": "opd", "support": "sampled"}))
    ids = toy_tokenizer()("5+6-4=1-4=7", add_special_tokens=False)["input_ids"] + [toy_tokenizer().eos_token_id]
    rollout = Rollout(setup.stream.prompts[0], ids, torch.zeros(len(ids)), finished=True)
    teacher = language_model(folders / "teacher", "teacher")
    reader = aligned(local_teacher(teacher), Aligner(toy_tokenizer(), teacher.tokenizer), {})
    (signal,) = reader.scorer(ScoreRequest("spans")).score([rollout])
    text = f"<s>{rollout.prompt.text}=" + toy_tokenizer().decode(rollout.response_ids, skip_special_tokens=True)
    ids = teacher.tokenizer(text)["input_ids"] + [teacher.tokenizer.eos_token_id] * rollout.finished
    logp = teacher.model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])
    number = len(teacher.tokenizer(f"<s>{rollout.prompt.text}=")["input_ids"]) - 1
    firsts = torch.cat([torch.tensor([True]), signal.span_T[1:] != signal.span_T[:-1]])
    assert signal.teacher_logp_T[firsts].sum().item() == pytest.approx(logp[number:].sum().item(), rel=1e-4)


def test_another_tokenizer_is_refused_with_the_way_out(folders, tmp_path):
    made = recipe(folders / "student", folders / "teacher", tmp_path / "run")
    with pytest.raises(ValueError, match="write teacher.tokenizer=own and method.support=sampled"):
        kibitz.train(made)


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        ({"type": "opd"}, "write method.support=sampled"),
        ({"type": "gkd", "on_policy": 1.0}, "write method.support=sampled with method.type=opd"),
        ({"type": "skd"}, "write method.support=sampled with method.type=opd"),
        ({"type": "sft", "source": "teacher"}, "lets the teacher write, and this one cannot"),
        ({"type": "opd", "support": "sampled", "discount": 0.5}, "drop method.policy.discount"),
        ({"type": "opd", "support": "sampled", "baseline": True}, "asks its teacher for dense or top_k"),
        ({"type": "opd", "support": "sampled", "seed_tokens": 2}, "lets the teacher write"),
        ({"type": "opd", "support": "sampled", "alignment": "alm"}, "write method.support=full"),
        ({"type": "opd", "alignment": "gold", "temperature": 2.0}, "drop method.temperature"),
    ],
)
def test_what_does_not_go_with_it_is_refused_before_weights_load(folders, tmp_path, method, sentence):
    with pytest.raises(RecipeError, match=sentence):
        prepare(own(folders, tmp_path / "run", method=method))


def test_a_loss_of_spans_needs_a_teacher_that_speaks_of_them(folders, tmp_path):
    made = recipe(
        folders / "student", folders / "student", tmp_path / "run", method={"type": "opd", "alignment": "alm"}
    )
    with pytest.raises(RecipeError, match="write teacher.tokenizer=own"):
        prepare(made)
