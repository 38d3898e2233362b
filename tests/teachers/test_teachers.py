"""A teacher as a value: what it can say decides what evaluation and heat-map show, and which methods may ask it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.models import make_model
from support.runs import recipe

from kibitz import config
from kibitz.config import RecipeError, TeacherConfig
from kibitz.evaluate.annotate import annotate
from kibitz.evaluate.evaluate import mean_reverse_kl
from kibitz.methods.parts import scorer
from kibitz.signals import Dense, Sampled, TopK
from kibitz.training.setup import prepare
from kibitz.types import Step

KINDS = {"dense": Dense, "top_k": TopK, "sampled": Sampled}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("student", "one", "two")):
        make_model(folder / name, seed=seed)
    return folder


@pytest.fixture(scope="module")
def setup(models, tmp_path_factory):
    return prepare(recipe(models / "student", models / "one", tmp_path_factory.mktemp("run") / "run"))


@pytest.fixture(scope="module")
def rollouts(setup):
    from kibitz import methods

    return methods.build(setup.parts).rollout(setup.stream.prompts[:8], Step(0, 1, seed=1))


def only(teacher, kind):
    """The same teacher, if that is all that it could say."""
    return replace(teacher, kinds=(kind,))


def test_evaluation_takes_the_most_telling_signal(setup, rollouts):
    """Exact from a dense one; from the top K a lower bound, which is exact for K = V; from the sampled token the k3 estimate."""
    exact = mean_reverse_kl(setup.parts.student, setup.parts.teacher, rollouts)
    bound = mean_reverse_kl(
        setup.parts.student, only(setup.parts.teacher, "top_k"), rollouts
    )  # asked for 64 of 21 tokens: all
    assert bound == pytest.approx(exact, rel=1e-4)
    total, num = 0.0, 0
    for r, mine, theirs in zip(
        rollouts, *(_sampled(setup, model, rollouts) for model in ("student", "teacher")), strict=True
    ):
        gap_T = theirs - mine
        total += (gap_T.exp() - 1 - gap_T).sum().item()
        num += r.num_tokens
    assert mean_reverse_kl(setup.parts.student, only(setup.parts.teacher, "sampled"), rollouts) == pytest.approx(
        total / num, rel=1e-4
    )


def _sampled(setup, who, rollouts):
    model = setup.parts.student if who == "student" else setup.parts.teacher.writer(lambda model: model)
    for r in rollouts:
        ids, first = torch.tensor([[*r.prompt.ids, *r.response_ids]]), len(r.prompt.ids) - 1
        with torch.no_grad():
            logp_TV = model.model(ids).logits[0, first:-1, : model.vocab_size].log_softmax(-1)
        yield logp_TV.gather(-1, torch.tensor(r.response_ids)[:, None])[:, 0]


def test_the_heat_map_shows_what_the_teacher_can_tell(setup, rollouts):
    dense, top_k, sampled = (
        annotate(setup.parts.student, only(setup.parts.teacher, kind), rollouts[:3])
        for kind in ("dense", "top_k", "sampled")
    )
    for exact, bound, single in zip(dense, top_k, sampled, strict=True):
        assert exact["fork"] == bound["fork"] == single["fork"]
        for a, b, c in zip(exact["tokens"], bound["tokens"], single["tokens"], strict=True):
            assert a["teacher_logp"] == pytest.approx(b["teacher_logp"], abs=1e-4)
            assert a["teacher_logp"] == pytest.approx(c["teacher_logp"], abs=1e-4)
            assert [text for text, _ in a["teacher_top"]] == [text for text, _ in b["teacher_top"]]
            assert c["teacher_top"] == [] and a["student_top"] == c["student_top"]


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ({"type": "opd"}, "dense"),
        ({"type": "opd", "support": "top_k", "top_k_of": "teacher"}, "top_k"),
        ({"type": "opd", "support": "top_k", "top_k_of": "union"}, "dense"),
        ({"type": "opd", "support": "sampled"}, "sampled"),
        ({"type": "opd", "support": "sampled", "baseline": True}, "dense"),
        ({"type": "gkd"}, "dense"),
        ({"type": "skd"}, "dense"),
    ],
)
def test_a_method_asks_for_the_least_that_its_loss_can_do_with(setup, rollouts, method, kind):
    tree = recipe(Path("s"), Path("t"), Path("o"), method=method)
    changed = replace(setup.parts, recipe=config.load(tree))
    assert all(isinstance(s, KINDS[kind]) for s in scorer(changed, changed.recipe.method).score(rollouts[:2]))


class Quiet(TeacherConfig):
    def answers(self):
        return ("sampled",)

    def writes(self):
        return False


def test_a_method_refuses_a_teacher_that_cannot_give_what_it_asks_for():
    def refuse(match, **method):
        checked = config.load(recipe(Path("s"), Path("t"), Path("o"), method=method)).method
        with pytest.raises(ValueError, match=match):
            checked.check_teacher(Quiet())

    refuse("asks its teacher for dense signals and this one gives sampled: write method.support=sampled", type="opd")
    refuse("dense or top_k signals", type="opd", support="sampled", baseline=True)
    refuse("lets the teacher write, and this one cannot", type="sft", source="teacher")
    refuse("lets the teacher write", type="opd", support="sampled", seed_tokens=2)
    config.load(
        recipe(Path("s"), Path("t"), Path("o"), method={"type": "opd", "support": "sampled"})
    ).method.check_teacher(Quiet())


def test_a_mistake_in_the_teachers_section_is_told_without_its_kind():
    for section, message in [
        ({"modle": "x"}, "teacher.model is missing; unknown key teacher.modle: did you mean model?"),
        ({"model": "x", "dtyp": "auto"}, "unknown key teacher.dtyp: did you mean dtype?"),
        ({"model": 3}, "teacher.model: input should be a valid string, got 3"),
    ]:
        with pytest.raises(RecipeError) as raised:
            config.load({"student": {"model": "s"}, "teacher": section, "data": {"world": "arithmetic"}})
        assert str(raised.value) == message


def test_a_run_without_a_teacher_needs_none(models, tmp_path):
    setup = prepare(recipe(models / "student", None, tmp_path / "run", method={"type": "sft"}))
    assert setup.parts.teacher is None and setup.evaluator.teacher is None
