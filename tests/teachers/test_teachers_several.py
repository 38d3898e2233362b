"""Several teachers against brute force in float64: routing, the mixture in probability space, what they disagree about."""

import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from support.models import full_logp, language_model, make_model, tokenizer
from support.runs import recipe

from kibitz import config, methods, train
from kibitz.config import LocalTeacherConfig, RecipeError
from kibitz.engines.torch import TorchEngine
from kibitz.evaluate.annotate import annotate
from kibitz.ledger import Ledger
from kibitz.logprobs import disagreement, log_mixture
from kibitz.signals import Dense, Sampled, TopK, cat_signals
from kibitz.teachers import ScoreRequest
from kibitz.teachers.local import local_teacher
from kibitz.teachers.several import mix_for, several
from kibitz.training.setup import prepare
from kibitz.types import Prompt, Rollout, Sampling, Step

TASKS = ("sum", "product", "both")


def section(**options):
    return LocalTeacherConfig(model="m", **options)


CONFIGS = (
    section(name="one", tasks=["sum", "both"], weight={"both": 3.0}),
    section(name="two", tasks=["product", "both"]),
    section(name="three"),
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three teachers of different widths, on disk and in memory."""
    folder = tmp_path_factory.mktemp("models")
    for seed, (name, size) in enumerate({"student": 32, "one": 32, "two": 48, "three": 16}.items()):
        make_model(folder / name, seed=seed, hidden_size=size)
    return folder


@pytest.fixture(scope="module")
def loaded(models):
    return [language_model(models / name, name) for name in ("one", "two", "three")]


@pytest.fixture(scope="module")
def teacher(loaded):
    return several([local_teacher(model) for model in loaded], CONFIGS)


def rollout(task: str, ids: list[int], route: str | None = None) -> Rollout:
    prompt = Prompt(ids=(1, 5, 6, 3), text="", key=f"{task}{ids}", task=task, route=route)
    return Rollout(prompt, ids, torch.zeros(len(ids)), finished=True)


ROLLOUTS = [
    rollout("sum", [5, 6, 7, 2]),
    rollout("both", [9, 10, 2]),
    rollout("product", [8]),
    rollout("else", [5, 5, 5, 5, 2]),
    rollout("both", [7, 2]),
    rollout("both", [11, 12], route="three"),
]
WEIGHTS = [(1, 0, 0), (0.75, 0.25, 0), (0, 1, 0), (0, 0, 1), (0.75, 0.25, 0), (0, 0, 1)]


def mixed(loaded, index: int):
    """The mixture as the definition has it: probabilities, weighed and added."""
    parts = [w * full_logp(m, ROLLOUTS[index]).exp() for w, m in zip(WEIGHTS[index], loaded, strict=True)]
    return sum(parts).log()


def test_who_speaks_about_a_prompt():
    for r, weights in zip(ROLLOUTS, WEIGHTS, strict=True):
        mix = {place: math.exp(logw) for place, logw in mix_for(CONFIGS, r.prompt)}
        assert mix == pytest.approx({place: w for place, w in enumerate(weights) if w})
    with pytest.raises(ValueError, match=r"route is 'four' and the teachers are 'one', 'two', 'three'"):
        mix_for(CONFIGS, rollout("sum", [2], route="four").prompt)
    with pytest.raises(ValueError, match="no teacher scores the task 'else'"):
        mix_for(CONFIGS[:2], ROLLOUTS[3].prompt)
    with pytest.raises(ValueError, match="no teacher scores"):
        mix_for([section(weight=0.0)], ROLLOUTS[3].prompt)


@pytest.mark.parametrize("micro_batch", [1, 11, 1000])
def test_a_dense_mixture_is_the_sum_of_probabilities_however_it_is_cut_and_joined(teacher, loaded, micro_batch):
    signals = teacher.scorer(ScoreRequest("dense", tokens_per_micro_batch=micro_batch)).score(ROLLOUTS)
    order = [4, 0, 3, 2, 5, 1]
    joined = cat_signals([signals[i] for i in order])
    assert isinstance(joined, Dense)
    whole = joined.head(joined.hidden_TD).log_softmax(-1)
    torch.testing.assert_close(whole.double(), torch.cat([mixed(loaded, i) for i in order]), rtol=0, atol=2e-5)
    for size, start in product((1, 3), range(0, len(whole), 2)):
        part = joined[start : start + size]
        torch.testing.assert_close(part.head(part.hidden_TD).log_softmax(-1), whole[start : start + size])
    assert joined.head(joined.hidden_TD[:0]).shape == (0, whole.shape[1])


def test_a_single_voice_has_its_own_logits(teacher, loaded):
    signal = teacher.scorer(ScoreRequest()).score(ROLLOUTS[:1])[0]
    alone = local_teacher(loaded[0]).scorer(ScoreRequest()).score(ROLLOUTS[:1])[0]
    assert torch.equal(signal.head(signal.hidden_TD), alone.head(alone.hidden_TD))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_and_sampled_signals_are_those_of_the_mixture(teacher, loaded, temperature):
    top = teacher.scorer(ScoreRequest("top_k", 5, temperature)).score(ROLLOUTS)
    written = teacher.scorer(ScoreRequest("sampled", temperature=temperature)).score(ROLLOUTS)
    for i, r in enumerate(ROLLOUTS):
        want_TV = (mixed(loaded, i) / temperature).log_softmax(-1)
        assert isinstance(top[i], TopK) and isinstance(written[i], Sampled)
        best = want_TV.topk(5, dim=-1)
        assert torch.equal(top[i].ids_TK, best.indices)
        torch.testing.assert_close(top[i].logp_TK.double(), best.values, rtol=0, atol=2e-5)
        want_T = want_TV.gather(-1, torch.tensor(r.response_ids)[:, None])[:, 0]
        torch.testing.assert_close(written[i].logp_T.double(), want_T, rtol=0, atol=2e-5)


def test_teachers_that_tell_the_sampled_token_only_are_mixed_exactly(teacher, loaded):
    quiet = [replace(local_teacher(model), kinds=("top_k", "sampled")) for model in loaded]
    both = several(quiet, CONFIGS)
    assert both.kinds == ("top_k", "sampled")
    exact = teacher.scorer(ScoreRequest("sampled")).score(ROLLOUTS)
    for a, b in zip(both.scorer(ScoreRequest("sampled")).score(ROLLOUTS), exact, strict=True):
        torch.testing.assert_close(a.logp_T, b.logp_T, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="write method.support=sampled, or give each task one teacher"):
        both.scorer(ScoreRequest("top_k")).score(ROLLOUTS)


def test_disagreement_is_zero_for_one_opinion_and_at_most_the_entropy_of_the_weights(teacher, loaded):
    generator = torch.Generator().manual_seed(0)
    logp_ICV = (4 * torch.randn(3, 50, 7, generator=generator, dtype=torch.float64)).log_softmax(-1)
    weight_I = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    mixture = (weight_I[:, None, None] * logp_ICV.exp()).sum(0)
    torch.testing.assert_close(log_mixture(logp_ICV, weight_I.log()).exp(), mixture)
    entropy = lambda p: -(p * p.log()).sum(-1)  # noqa: E731
    want = entropy(mixture) - (weight_I[:, None] * entropy(logp_ICV.exp())).sum(0)  # H(M) - sum w H(p): another way
    torch.testing.assert_close(disagreement(logp_ICV, weight_I.log()), want)
    assert disagreement(logp_ICV[:1].expand(3, -1, -1), weight_I.log()).abs().max() < 1e-12
    apart = torch.eye(3, 7, dtype=torch.float64)[:, None].clamp(min=1e-30).log()
    torch.testing.assert_close(disagreement(apart, weight_I.log()), entropy(weight_I)[None])


def test_disagreement_is_logged_of_the_tokens_that_have_several_teachers(teacher, loaded):
    teacher.scorer(ScoreRequest("sampled")).score(ROLLOUTS)
    nats, same = [], []
    for i in (1, 4):
        logp = torch.stack([full_logp(m, ROLLOUTS[i]) for m in loaded[:2]])
        nats += disagreement(logp, torch.tensor([0.75, 0.25]).double().log()).tolist()
        same += (logp[0].argmax(-1) == logp[1].argmax(-1)).tolist()
    numbers = teacher.metrics()
    assert numbers["teachers_disagreement"] == pytest.approx(sum(nats) / len(nats), abs=1e-5)
    assert numbers["teachers_agree"] == pytest.approx(sum(same) / len(same))
    teacher.scorer(ScoreRequest("sampled")).score(ROLLOUTS[:1])
    assert teacher.metrics() == {}


def test_costs_and_lengths_are_those_of_whoever_speaks(teacher, loaded):
    want = sum(
        loaded[p].pass_flops([r]) for r, ws in zip(ROLLOUTS, WEIGHTS, strict=True) for p, w in enumerate(ws) if w
    )
    ledger = Ledger()
    teacher.scorer(ScoreRequest("sampled", count=ledger.reading("scoring"))).score(ROLLOUTS)
    assert ledger.close_step()["flops"] == {"scoring": want}
    assert teacher.num_parameters == sum(model.num_parameters for model in loaded)
    teacher.check([r.prompt for r in ROLLOUTS], 124)
    with pytest.raises(RecipeError, match="write rollout.max_tokens=124 or less"):
        teacher.check([ROLLOUTS[0].prompt], 125)


def test_each_prompt_is_answered_by_its_teacher_and_a_mixture_token_by_token(teacher, loaded):
    """Alone: exactly the text of that teacher. Together: the log-probability of each written token is the mixture's."""
    engine = teacher.writer(TorchEngine)
    prompts = [ROLLOUTS[i].prompt for i in (2, 1, 0, 3)]
    sampling = Sampling(max_tokens=9, num_samples=3, stop_ids=(2,), seed=4)
    ledger, ready = Ledger(), []
    written = engine.generate(prompts, sampling, ready.extend, ledger.reading("sampling"))
    assert [r.prompt.key for r in written] == [prompt.key for prompt in prompts for _ in range(3)]
    assert sorted(map(id, ready)) == sorted(map(id, written))
    readers = [1, 1, 1, 0, 0, 0, 0, 0, 0, 2, 2, 2]  # of both that write the second prompt's text, one and the other
    want = sum(loaded[place].pass_flops([r]) for place, r in zip(readers, written, strict=True))
    assert ledger.close_step()["flops"]["sampling"] == want + loaded[1].pass_flops(written[3:6])
    for prompt, place, start in ((prompts[0], 1, 0), (prompts[2], 0, 6), (prompts[3], 2, 9)):
        alone = TorchEngine(loaded[place]).generate([prompt], sampling)
        assert [r.response_ids for r in alone] == [r.response_ids for r in written[start : start + 3]]
    weight_I = torch.tensor([0.75, 0.25]).double()
    for r in written[3:6]:
        logp = log_mixture(torch.stack([full_logp(m, r) for m in loaded[:2]]), weight_I.log())
        want_T = logp.gather(-1, torch.tensor(r.response_ids)[:, None])[:, 0]
        torch.testing.assert_close(r.logp_T.double(), want_T, rtol=0, atol=1e-4)


def test_the_heat_map_says_what_each_teacher_thinks(teacher, loaded, models):
    student = language_model(models / "student")
    rows = annotate(student, teacher, ROLLOUTS[:2])
    for i, row in enumerate(rows):
        assert [t["name"] for t in row["teachers"]] == ["one", "two", "three"]
        assert [t["weight"] for t in row["teachers"]] == pytest.approx(WEIGHTS[i])
        mixture_TV = mixed(loaded, i)
        for place, model in enumerate(loaded):
            own_TV = full_logp(model, ROLLOUTS[i])
            kl_T = (own_TV.exp() * (own_TV - mixture_TV)).sum(-1)
            for t, token in enumerate(row["tokens"]):
                voice = token["teachers"][place]
                assert voice["logp"] == pytest.approx(own_TV[t, token["id"]].item(), abs=1e-4)
                assert voice["kl"] == pytest.approx(kl_T[t].item(), abs=1e-4)
                assert voice["top"][0][0] == tokenizer().decode([own_TV[t].argmax()])


METHODS = [
    {"type": "opd"},
    {"type": "opd", "support": "top_k", "top_k_of": "teacher", "top_k": 4},
    {"type": "opd", "support": "sampled"},
    {"type": "opd", "support": "sampled", "baseline": True},
    {"type": "opd", "seed_tokens": 2},
    {"type": "gkd", "source": "teacher", "on_policy": 0.5},
    {"type": "sft", "source": "teacher"},
]


def rows(folder: Path) -> str:
    """Two tasks, and a row with a route."""
    lines = ['{"prompt": "1+2", "answer": "3", "task": "sum"}', '{"prompt": "2*3", "answer": "6", "task": "product"}']
    lines += ['{"prompt": "4+2", "answer": "6", "task": "both"}', '{"prompt": "4*2", "answer": "8", "route": "one"}']
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder / "rows.jsonl")


def entries(models):
    options = ({"tasks": ["sum", "both"]}, {"tasks": ["product", "both"], "weight": {"both": 2}})
    return [{"model": str(models / n), "name": n, **o} for n, o in zip(("one", "two"), options, strict=True)]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: "-".join(str(v) for v in m.values()))
def test_every_method_learns_from_several_teachers(models, tmp_path, method):
    data = {"world": None, "prompts": rows(tmp_path), "limit": None}
    tree = recipe(
        models / "student", None, tmp_path / "run", teacher=entries(models), data=data, method=method, steps=2
    )
    run = train({**tree, "eval": {**tree["eval"], "prompts": data["prompts"]}})
    assert all(math.isfinite(row["loss"]) for row in run.metrics) and run.evals[-1]["reverse_kl"] > 0
    if method["type"] != "sft":
        assert run.metrics[-1]["teachers_disagreement"] > 0
    assert run.metrics[-1]["flops"]


def test_skd_takes_routed_teachers_and_refuses_a_mixture(models, tmp_path):
    data = {"world": None, "prompts": rows(tmp_path), "limit": None}
    tree = recipe(models / "student", None, tmp_path / "run", data=data, method={"type": "skd"}, steps=1)
    alone = [{**entry, "tasks": entry["tasks"][:1]} for entry in entries(models)]
    setup = prepare({**tree, "teacher": [*alone, {"model": str(models / "three"), "tasks": ["both"]}]})
    rollouts = methods.build(setup.parts).rollout(setup.stream.prompts, Step(0, 1, seed=1))
    assert all(r.writer_T is not None for r in rollouts)
    with pytest.raises(ValueError, match="skd has one teacher judge a text, and the task 'both' has 2"):
        prepare({**tree, "teacher": entries(models)})


def test_what_cannot_be_routed_is_refused_before_weights_load(models, tmp_path, monkeypatch):
    monkeypatch.setattr("kibitz.training.setup.load_student", lambda *_: pytest.fail("weights were loaded"))
    data = {"world": None, "prompts": rows(tmp_path), "limit": None}
    tree = recipe(models / "student", None, tmp_path / "run", data=data)
    with pytest.raises(ValueError, match="no teacher scores the task 'both'"):
        prepare({**tree, "teacher": [{**entry, "tasks": entry["tasks"][:1]} for entry in entries(models)]})
    with pytest.raises(ValueError, match="a row's route is 'one'"):
        prepare({**tree, "teacher": [{"model": str(models / n)} for n in ("one", "two")]})
    with pytest.raises(RecipeError, match="two have the same name"):
        config.load({**tree, "teacher": [{"model": "a", "name": "x"}, {"model": "b", "name": "x"}]})
    with pytest.raises(RecipeError, match="cannot be negative"):
        config.load({**tree, "teacher": [{"model": "a", "weight": -1}]})
