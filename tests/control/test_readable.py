"""Students that can be read: VIPER's weights by hand, sampling, and exports that act as the student does."""

from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("stable_baselines3")

from hypothesis import given
from hypothesis import strategies as st

from kibitz.config import RecipeError, load_as
from kibitz.control import distil, environments, export, formulas, students
from kibitz.control.environments import Shape
from kibitz.control.recipe import EnvConfig, StudentConfig
from kibitz.control.students import Labelled

CARTPOLE, PENDULUM = EnvConfig(id="CartPole-v1"), EnvConfig(id="Pendulum-v1")
RNG = np.random.default_rng(0)


def shape(env: EnvConfig) -> Shape:
    return environments.shape_of(environments.make(env), env.id)


def balancing(seen_BO: np.ndarray) -> np.ndarray:
    """A teacher of CartPole: push under the falling pole."""
    return (seen_BO[:, 2] + 0.3 * seen_BO[:, 3] + 0.05 * seen_BO[:, 1] > 0).astype(np.int64)


def labelled(num: int = 400) -> Labelled:
    seen = RNG.normal(size=(num, 4)).astype(np.float32)
    return Labelled(seen, balancing(seen), np.ones(num))


# ------------------------------------------------------------------ weights


def test_the_cost_of_a_wrong_action_by_hand():
    """Log-probabilities of (0.5, 0.25, 0.25) differ by log 2, of (0.9, 0.09, 0.01) by log 90, of equal ones by 0."""
    logp = np.log([[0.5, 0.25, 0.25], [0.9, 0.09, 0.01], [1 / 3, 1 / 3, 1 / 3]])
    np.testing.assert_allclose(distil.costs(logp), np.log([2.0, 90.0, 1.0]), atol=1e-12)


def test_states_are_drawn_in_proportion_to_their_cost():
    """Of 20,000 draws the share of a state with p = 0.75 has a deviation of 0.003: 0.015 off has odds of 1 in 10^6."""
    rows = distil.sample(np.array([0.0, 1.0, 3.0]), 3, 10, np.random.default_rng(0))
    assert len(rows) == 3 and 0 not in rows
    cost = np.zeros(20_000)
    cost[:2] = 1.0, 3.0
    rows = distil.sample(cost, len(cost), len(cost), np.random.default_rng(0))
    assert abs((rows == 1).mean() - 0.75) < 0.015


def test_without_costs_every_state_counts_once():
    assert distil.sample(None, 5, 10, np.random.default_rng(0)).tolist() == [0, 1, 2, 3, 4]
    assert len(set(distil.sample(np.zeros(50), 50, 10, np.random.default_rng(0)).tolist())) == 10


# ------------------------------------------------------------------ fits


def test_a_tree_keeps_its_limits():
    tree = students.fit(StudentConfig(depth=2), labelled(), shape(CARTPOLE), 0)
    assert tree.size()["depth"] == 2 and tree.size()["leaves"] <= 4
    assert students.fit(StudentConfig(leaves=5), labelled(), shape(CARTPOLE), 0).size()["leaves"] == 5


def test_a_linear_rule_finds_a_linear_teacher():
    data = labelled(3000)
    rule = students.fit(StudentConfig(type="linear"), data, shape(CARTPOLE), 0)
    assert students.agreement(rule.act(data.observed_NO), data.action, shape(CARTPOLE)) > 0.99
    assert rule.size() == {"terms": 5}


def test_a_sparse_polynomial_finds_the_terms_there_are():
    seen = RNG.normal(size=(200, 3))
    action = (0.5 * seen[:, 0] * seen[:, 2] - 0.25 * seen[:, 1])[:, None]
    rule = students.fit(
        StudentConfig(type="polynomial", terms=2), Labelled(seen, action, np.ones(200)), shape(PENDULUM), 0
    )
    assert rule.size() == {"terms": 2}
    np.testing.assert_allclose(rule.act(seen), action.clip(-2, 2), atol=1e-9)
    assert export.text(rule, ("a", "b", "c")) == "action 0 = -0.25 * b + 0.5 * a * c\n"


@pytest.mark.parametrize("kind", ["tree", "linear", "polynomial", "symbolic"])
@pytest.mark.parametrize("seen_actions", [(0,), (1,), (0, 2), (0, 1, 2)])
def test_actions_that_never_occur_are_never_taken(kind, seen_actions):
    three = Shape(2, 3, np.empty(0), np.empty(0))
    seen = RNG.normal(size=(60, 2))
    action = np.array(seen_actions)[(seen[:, 0] > 0).astype(int) % len(seen_actions)]
    small = {"population": 20, "generations": 2} if kind == "symbolic" else {}
    student = students.fit(StudentConfig(type=kind, **small), Labelled(seen, action, np.ones(60)), three, 0)
    assert set(student.act(seen).tolist()) <= set(seen_actions)


def test_agreement_of_continuous_actions_is_a_distance_over_half_the_range():
    ours, theirs = np.array([[0.0], [1.0]]), np.array([[1.0], [1.0]])
    assert students.agreement(ours, theirs, shape(PENDULUM)) == pytest.approx(0.75)


# ------------------------------------------------------------------ exports


def kinds() -> list[StudentConfig]:
    small = {"population": 30, "generations": 3, "functions": ["add", "sub", "mul", "div", "max"]}
    return [
        StudentConfig(depth=3), StudentConfig(type="linear"), StudentConfig(type="polynomial", terms=4),
        StudentConfig(type="symbolic", **small),
    ]  # fmt: skip


@pytest.mark.parametrize("config", kinds(), ids=lambda config: config.type)
def test_the_exported_function_plays_a_hundred_episodes_with_the_same_actions(config):
    student = students.fit(config, labelled(), shape(CARTPOLE), 0)
    act, steps = export.load(export.python(student)), 0
    for moment in environments.visits(student.act, CARTPOLE, range(100)):
        assert [act(visit.observation_O.tolist()) for visit in moment] == [visit.action for visit in moment]
        steps += len(moment)
    assert steps > 900


@pytest.mark.parametrize("config", kinds(), ids=lambda config: config.type)
def test_of_continuous_actions_too(config):
    teacher = lambda seen: np.clip(-2 * seen[:, 1:2] * seen[:, :1] - 0.3 * seen[:, 2:], -2, 2)  # noqa: E731
    seen = RNG.normal(size=(300, 3))
    student = students.fit(config, Labelled(seen, teacher(seen), np.ones(300)), shape(PENDULUM), 0)
    act, fresh = export.load(export.python(student)), RNG.normal(size=(500, 3))
    assert [act(row.tolist()) for row in fresh] == student.act(fresh).tolist()


@pytest.mark.parametrize("config", kinds(), ids=lambda config: config.type)
def test_onnx_acts_alike(config):
    """In float32 at its input. Next to a threshold a rounding may turn an action: at most 1 of 1,000 states."""
    ort = pytest.importorskip("onnxruntime")
    student = students.fit(config, labelled(), shape(CARTPOLE), 0)
    session = ort.InferenceSession(export.onnx(student), providers=["CPUExecutionProvider"])
    fresh = RNG.normal(size=(1000, 4)).astype(np.float32)
    (found, *_) = session.run(None, {session.get_inputs()[0].name: fresh})
    assert (np.asarray(found).reshape(-1) == student.act(fresh)).mean() >= 0.999


def test_a_tree_is_drawn_with_a_box_for_each_node_that_is_in_no_others_way():
    import xml.etree.ElementTree as ET

    tree = students.fit(StudentConfig(depth=3), labelled(), shape(CARTPOLE), 0)
    picture = ET.fromstring(export.svg(tree, "abcd"))
    boxes = list(picture.iter("{http://www.w3.org/2000/svg}rect"))
    words = export.text(tree, ("position", "velocity", "angle", "turning"))
    assert len(boxes) == words.count("action") + words.count("if ")
    wide, high = float(picture.get("width")), float(picture.get("height"))
    for x in {box.get("x") for box in boxes}:
        column = sorted((float(box.get("y")), float(box.get("height"))) for box in boxes if box.get("x") == x)
        assert all(top + height <= below for (top, height), (below, _) in pairwise(column))
        assert 0 <= float(x) < wide and column[-1][0] + column[-1][1] <= high
    assert 0 < words.count("action") <= tree.size()["leaves"]


def test_a_question_whose_answers_act_alike_is_not_asked():
    """CART parts 3 to 1 from 2 to 1, by which the likelier action is the same; what is left of the tree acts as it does."""
    seen = np.array([[0.0], [0.0], [0.0], [0.0], [1.0], [1.0], [1.0], [2.0], [2.0]], np.float32)
    action = np.array([0, 0, 0, 1, 0, 0, 1, 1, 1])
    one = Shape(1, 2, np.empty(0), np.empty(0))
    tree = students.fit(StudentConfig(depth=2), Labelled(seen, action, np.ones(9)), one, 0)
    assert tree.size()["leaves"] == 3
    assert export.text(tree, ["x"]) == "if x <= 1.5:\n  action 0\nelse:\n  action 1\n"
    assert export.svg(tree, ["x"]).count("<rect") == 3
    act = export.load(export.python(tree))
    assert [act([x]) for x in (0.0, 1.0, 2.0)] == tree.act(np.array([[0.0], [1.0], [2.0]])).tolist() == [0, 0, 1]


# ------------------------------------------------------------------ formulas

LEAVES = st.one_of(
    st.tuples(st.just("x"), st.integers(0, 2)),
    st.tuples(st.just("c"), st.floats(-3, 3, allow_nan=False)),
)
NODES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.tuples(st.sampled_from(["add", "sub", "mul", "div", "max", "min"]), inner, inner),
        st.tuples(st.just("abs"), inner),
    ),
    max_leaves=12,
)


@given(NODES)
def test_python_and_numpy_give_the_same_bits(node):
    seen = np.array([[0.1, -0.7, 2.5], [0.0, 0.0, -0.3]])
    helpers = "".join(formulas.HELPERS.values())
    space: dict = {}
    exec(f"{helpers}\ndef f(o):\n    return {formulas.source(node)}\n", space)
    assert [float(space["f"](row.tolist())) for row in seen] == formulas.evaluate(node, seen).tolist()


# ------------------------------------------------------------------ operon


@dataclass(frozen=True)
class Part:
    """A node as operon's programs have it."""

    kind: str
    number: float = 0.0
    place: int = 0
    num_operands: int = 0

    IsConstant = property(lambda self: self.kind == "Constant")
    IsVariable = property(lambda self: self.kind == "Variable")
    Value = property(lambda self: self.number)
    HashValue = property(lambda self: self.place)
    Arity = property(lambda self: self.num_operands)
    Type = property(lambda self: SimpleNamespace(name=self.kind))


def test_a_program_of_operon_is_read_from_its_end():
    """An operation comes after its operands, the first of them last: 3 - 2 x0."""
    program = [Part("Variable", 2.0, place=77), Part("Constant", 3.0), Part("Sub", num_operands=2)]
    node = formulas.of_operon(program, {77: 0})
    assert formulas.text(node, ["speed"]) == "3 - 2 * speed"
    negated = formulas.of_operon([Part("Variable", 2.0, place=77), Part("Sub", num_operands=1)], {77: 0})
    assert formulas.evaluate(negated, np.array([[5.0]])).tolist() == [-10.0]


def test_a_setting_of_the_other_search_is_refused():
    for settings, words in (
        ({"nodes": 9}, "nodes is no setting of search gplearn"),
        ({"search": "operon", "parsimony": 0.1}, "parsimony is no setting of search operon"),
        ({"search": "operon", "functions": ["div"]}, "operon searches with add, sub and mul, not div"),
    ):
        with pytest.raises(RecipeError, match=words):
            load_as(StudentConfig, {"type": "symbolic", **settings})


def test_operon_finds_the_formula_there_is_and_its_export_acts_alike():
    pytest.importorskip("pyoperon")
    config = StudentConfig(type="symbolic", search="operon", population=200, generations=20)
    seen = np.random.default_rng(0).normal(size=(300, 3)).clip(-1, 1)
    teacher = 1.5 * seen[:, :1] * seen[:, 1:2] - 0.2
    student = students.fit(config, Labelled(seen, teacher, np.ones(300)), shape(PENDULUM), 0)
    assert np.abs(student.act(seen) - teacher).max() < 1e-3
    act = export.load(export.python(student))
    assert [act(row.tolist()) for row in seen] == student.act(seen).tolist()
