"""Students that a person can read: trees, linear and sparse polynomial rules, formulas that were searched for. They fit labelled
states and act; what they say of themselves is in `export`."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from kibitz.control import formulas
from kibitz.control.environments import Shape
from kibitz.control.formulas import Node
from kibitz.control.recipe import StudentConfig


@dataclass(frozen=True)
class Labelled:
    """States that a teacher has labelled: observations, its actions ([N] or [N, A]), and what each counts."""

    observed_NO: np.ndarray
    action: np.ndarray
    weight_N: np.ndarray


class Student(Protocol):
    def act(self, observed_BO: np.ndarray) -> np.ndarray: ...
    def size(self) -> dict[str, int]: ...


@dataclass(frozen=True)
class TreeStudent:
    """CART of scikit-learn, which compares observations in float32."""

    model: Any
    shape: Shape

    def act(self, observed_BO: np.ndarray) -> np.ndarray:
        found = self.model.tree_.predict(
            observed_BO.astype(np.float32)
        )  # what `predict` does after its checks of the input
        if self.shape.discrete:
            return self.model.classes_.take(found.reshape(len(observed_BO), -1).argmax(1))
        return found.reshape(len(observed_BO), -1).clip(self.shape.low_A, self.shape.high_A)

    def size(self) -> dict[str, int]:
        return {"depth": int(self.model.get_depth()), "leaves": int(self.model.get_n_leaves())}


@dataclass(frozen=True)
class FormulaStudent:
    """One formula for each number of a continuous action, or for each discrete action, of which the largest wins; of two actions
    there is one formula, and above 0 it is the second."""

    outputs: tuple[Node, ...]
    shape: Shape
    kind: str

    def act(self, observed_BO: np.ndarray) -> np.ndarray:
        values_BK = np.stack([formulas.evaluate(node, observed_BO) for node in self.outputs], axis=1)
        if not self.shape.discrete:
            return values_BK.clip(self.shape.low_A, self.shape.high_A)
        return (values_BK[:, 0] > 0).astype(np.int64) if len(self.outputs) == 1 else values_BK.argmax(-1)

    def size(self) -> dict[str, int]:
        """`terms` of sums, `nodes` of formulas that were searched for."""
        if self.kind == "symbolic":
            return {"nodes": sum(formulas.num_nodes(node) for node in self.outputs)}
        return {"terms": sum(_num_terms(node) for node in self.outputs)}


def operations(student: Student) -> int:
    """Comparisons of a tree, or operations of formulas, for one observation at most."""
    if isinstance(student, TreeStudent):
        return int(student.model.get_depth())
    assert isinstance(student, FormulaStudent)
    return sum(formulas.num_nodes(node) // 2 for node in student.outputs)


def _num_terms(node: Node) -> int:
    return _num_terms(node[1]) + 1 if node[0] == "add" else 1


def fit(config: StudentConfig, data: Labelled, shape: Shape, seed: int) -> Student:
    """Fit a new student to the labelled states; the same states and seed give the same student."""
    return FITS[config.type](config, data, shape, seed)


# ------------------------------------------------------------------ trees


def _tree(config: StudentConfig, data: Labelled, shape: Shape, seed: int) -> TreeStudent:
    from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

    kind = DecisionTreeClassifier if shape.discrete else DecisionTreeRegressor
    depth = config.depth or (3 if config.leaves is None else None)
    model = kind(max_depth=depth, max_leaf_nodes=config.leaves, random_state=seed)
    model.fit(data.observed_NO.astype(np.float32), data.action, sample_weight=data.weight_N)
    return TreeStudent(model, shape)


# ------------------------------------------------------------------ sums of monomials


def _polynomial(config: StudentConfig, data: Labelled, shape: Shape, seed: int) -> FormulaStudent:
    """Sequential thresholding: fit all monomials, drop the one that matters least (by coefficient x deviation), and fit again,
    until as few as wanted are left. A linear rule keeps all."""
    from sklearn.preprocessing import PolynomialFeatures

    linear = config.type == "linear"
    powers_MO = PolynomialFeatures(1 if linear else config.degree).fit(data.observed_NO).powers_
    monomials_NM = _monomials(data.observed_NO, powers_MO)
    scale_M = monomials_NM.std(0)
    kept = np.arange(len(powers_MO))[(scale_M > 0) | (powers_MO.sum(1) == 0)]
    scale_M = np.where(scale_M > 0, scale_M, 1.0)
    regress = _logistic if shape.discrete else _least_squares
    while True:
        columns_NM = monomials_NM[:, kept] / scale_M[kept]
        weights_KM = regress(columns_NM, data)
        if linear or len(kept) <= config.terms:
            break
        kept = np.delete(kept, np.abs(weights_KM).max(0).argmin())
    outputs = tuple(formulas.polynomial(row_M / scale_M[kept], powers_MO[kept]) for row_M in weights_KM)
    return FormulaStudent(_for_all(outputs, data, shape), shape, config.type)


def _monomials(observed_NO: np.ndarray, powers_MO: np.ndarray) -> np.ndarray:
    return np.stack([(observed_NO.astype(np.float64) ** powers_O).prod(1) for powers_O in powers_MO], axis=1)


def _least_squares(columns_NM: np.ndarray, data: Labelled) -> np.ndarray:
    root_N1 = np.sqrt(data.weight_N)[:, None]
    found_MA, *_ = np.linalg.lstsq(columns_NM * root_N1, data.action.reshape(len(columns_NM), -1) * root_N1, rcond=None)
    return found_MA.T


def _logistic(columns_NM: np.ndarray, data: Labelled) -> np.ndarray:
    """[1, M] of two actions that occur, [number of actions that occur, M] of more. Little regularisation: of rules that part the
    states the steepest has no end."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    if len(np.unique(data.action)) == 1:
        return np.zeros((1, columns_NM.shape[1]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the best of 100 rounds is a rule, too
        model = LogisticRegression(C=100.0, fit_intercept=False, max_iter=100)
        model.fit(columns_NM, data.action, sample_weight=data.weight_N * len(columns_NM) / data.weight_N.sum())
    return model.coef_


def _for_all(outputs: tuple[Node, ...], data: Labelled, shape: Shape) -> tuple[Node, ...]:
    """Formulas for all actions from those of the actions that occur: what never occurs never wins."""
    if not shape.discrete:
        return outputs
    seen = np.unique(data.action).tolist()
    if len(seen) == 1:
        outputs = (("c", 1.0),)
    elif len(seen) == 2 and len(outputs) == 1:
        if shape.num_actions == 2:
            return outputs
        outputs = (("c", 0.0), outputs[0])
    by_action = dict(zip(seen, outputs, strict=True))
    if shape.num_actions == 2:
        return (("c", 1.0 if seen == [1] else -1.0),)
    return tuple(by_action.get(action, ("c", -1e9)) for action in range(shape.num_actions))


# ------------------------------------------------------------------ formulas that are searched for


def _symbolic(config: StudentConfig, data: Labelled, shape: Shape, seed: int) -> FormulaStudent:
    """A search for each output. gplearn: logistic loss of one action against the others, or squared error; operon: squared error,
    of one action against the others to 1 and -1."""
    if shape.discrete and len(np.unique(data.action)) == 1:
        return FormulaStudent(_for_all((("c", 1.0),), data, shape), shape, "symbolic")
    if not shape.discrete:
        targets = list(data.action.reshape(len(data.action), -1).T)
    else:
        targets = [data.action == action for action in (range(shape.num_actions) if shape.num_actions > 2 else (1,))]
    outputs = tuple(_search(config, data, target, shape.discrete, seed + 7 * k) for k, target in enumerate(targets))
    return FormulaStudent(outputs, shape, "symbolic")


def _search(config: StudentConfig, data: Labelled, target_N: np.ndarray, discrete: bool, seed: int) -> Node:
    from gplearn.genetic import SymbolicClassifier, SymbolicRegressor

    if discrete and len(np.unique(target_N)) == 1:
        return ("c", 1.0 if target_N[0] else -1e9)
    if config.search == "operon":
        return _operon(config, data, np.where(target_N, 1.0, -1.0) if discrete else target_N, seed)
    common: dict[str, Any] = {
        "population_size": config.population, "generations": config.generations, "function_set": tuple(config.functions),
        "parsimony_coefficient": config.parsimony, "random_state": seed, "tournament_size": 20, "const_range": (-2.0, 2.0),
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # gplearn lags scikit-learn and numpy, and says so of each program
        model = SymbolicClassifier(**common) if discrete else SymbolicRegressor(metric="mse", **common)
        model.fit(data.observed_NO, target_N.astype(int) if discrete else target_N, sample_weight=data.weight_N)
    return formulas.of_gplearn(model._program.program)


def _operon(config: StudentConfig, data: Labelled, target_N: np.ndarray, seed: int) -> Node:
    """The formula of the Pareto front of error and length that operon finds shortest to describe, at one thread."""
    try:
        from pyoperon.sklearn import SymbolicRegressor  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(
            "student.search: operon needs pyoperon, which is not installed: pip install pyoperon"
        ) from None
    model = SymbolicRegressor(
        allowed_symbols=",".join([*config.functions, "constant", "variable"]), population_size=config.population,
        generations=config.generations, max_length=config.nodes, objectives=["mse", "length"], n_threads=1,
        optimizer_iterations=3, random_state=seed,
    )  # fmt: skip
    model.fit(data.observed_NO.astype(np.float64), target_N.astype(np.float64))
    columns = {place: number for number, place in enumerate(model.variables_)}
    return formulas.of_operon(model.model_.Nodes, columns)


FITS: Mapping[str, Callable[[StudentConfig, Labelled, Shape, int], Student]] = {
    "tree": _tree, "linear": _polynomial, "polynomial": _polynomial, "symbolic": _symbolic,
}  # fmt: skip


def agreement(ours: np.ndarray, theirs: np.ndarray, shape: Shape) -> float:
    """The share of states in which two act alike; of continuous actions 1 - mean absolute difference over half their range."""
    if shape.discrete:
        return float((ours == theirs).mean())
    half_A = (shape.high_A - shape.low_A) / 2
    return float(1.0 - (np.abs(ours - theirs.reshape(ours.shape)) / half_A).mean())


def names_of(env_id: str, num: int) -> Sequence[str]:
    """What the numbers of an observation are called, where that is known."""
    return NAMES.get(env_id.partition("-")[0], [f"o[{i}]" for i in range(num)])


NAMES: Mapping[str, Sequence[str]] = {
    "CartPole": ("position", "velocity", "angle", "turning"),
    "Acrobot": ("cos1", "sin1", "cos2", "sin2", "turning1", "turning2"),
    "MountainCar": ("position", "velocity"),
    "MountainCarContinuous": ("position", "velocity"),
    "Pendulum": ("cos", "sin", "turning"),
    "LunarLander": ("x", "y", "speed_x", "speed_y", "angle", "turning", "left_foot", "right_foot"),
}
