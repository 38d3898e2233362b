"""Formulas that a person can read: evaluated, written as Python, as text, and as ONNX, from one tree of a few operations.

All operations round alike in numpy and in Python's floats, and both follow the same tree: the exported function gives the same
bits. A node is `("x", index)`, `("c", number)`, or an operation with its one or two nodes.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import numpy as np

Node = tuple[Any, ...]
SMALLEST_DIVISOR = 1e-3
"""gplearn's: what is divided by less is 1."""

BINARY: Mapping[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "max": np.maximum, "min": np.minimum,
    "div": lambda a, b: np.where(np.abs(b) > SMALLEST_DIVISOR, a / np.where(b == 0, 1.0, b), 1.0),
}  # fmt: skip
SIGNS = {"add": "+", "sub": "-", "mul": "*"}
HELPERS = {
    "div": f"def div(a, b):\n    return a / b if abs(b) > {SMALLEST_DIVISOR} else 1.0\n",
}


def evaluate(node: Node, observed_BO: np.ndarray) -> np.ndarray:
    """The value for each observation, [B], in float64."""
    match node:
        case ("x", index):
            return observed_BO[:, index].astype(np.float64)
        case ("c", number):
            return np.full(len(observed_BO), float(number))
        case ("abs", inner):
            return np.abs(evaluate(inner, observed_BO))
    return BINARY[node[0]](evaluate(node[1], observed_BO), evaluate(node[2], observed_BO))


def source(node: Node) -> str:
    """The formula as a Python expression of `o`, in the tree's order."""
    match node:
        case ("x", index):
            return f"o[{index}]"
        case ("c", number):
            return repr(float(number))
        case (name, inner):
            return f"{name}({source(inner)})"
    left, right = source(node[1]), source(node[2])
    return f"({left} {SIGNS[node[0]]} {right})" if node[0] in SIGNS else f"{node[0]}({left}, {right})"


def text(node: Node, names: Sequence[str], digits: int = 3) -> str:
    """The same for a person: names in the place of indices, numbers with few digits, signs between terms."""
    match node:
        case ("x", index):
            return str(names[index])
        case ("c", number):
            return f"{number:.{digits}g}"
        case (name, inner):
            return f"{name}({text(inner, names, digits)})"
    left, right = (text(part, names, digits) for part in node[1:])
    if node[0] not in SIGNS:
        return f"{node[0]}({left}, {right})"
    if node[0] == "mul":
        left, right = (
            f"({t})" if part[0] in ("add", "sub") else t for t, part in zip((left, right), node[1:], strict=True)
        )
        return f"{left} * {right}"
    if node[0] == "add" and right.startswith("-"):
        return f"{left} - {right[1:]}"
    return f"{left} {SIGNS[node[0]]} " + (f"({right})" if node[0] == "sub" and node[2][0] in ("add", "sub") else right)


def used(node: Node) -> set[str]:
    """The operations in it."""
    return {node[0]}.union(*(used(part) for part in node[1:] if isinstance(part, tuple))) - {"x", "c"}


def num_nodes(node: Node) -> int:
    return 1 + sum(num_nodes(part) for part in node[1:] if isinstance(part, tuple))


def polynomial(coefficients_M: Sequence[float], powers_MO: np.ndarray) -> Node:
    """sum_m c_m prod_i x_i^p_mi, without the monomials whose coefficient is 0."""
    terms = []
    for coefficient, powers_O in zip(coefficients_M, powers_MO, strict=True):
        if coefficient:
            factors = [("x", index) for index, power in enumerate(powers_O) for _ in range(int(power))]
            terms.append(reduce(lambda a, b: ("mul", a, b), factors, ("c", float(coefficient))))
    return reduce(lambda a, b: ("add", a, b), terms) if terms else ("c", 0.0)


def of_gplearn(program: Sequence[Any]) -> Node:
    """The tree of a gplearn program, which is a list in prefix order."""
    parts = iter(program)

    def read() -> Node:
        part = next(parts)
        if hasattr(part, "arity"):
            return (part.name, *(read() for _ in range(part.arity)))
        return ("x", int(part)) if isinstance(part, int | np.integer) else ("c", float(part))

    return read()


OF_OPERON = {"Add": "add", "Sub": "sub", "Mul": "mul"}


def of_operon(nodes: Sequence[Any], columns: Mapping[int, int]) -> Node:
    """The tree of an operon program, a list in which an operation comes after its operands, the first of them last. A variable
    has a coefficient; `columns` says which number of the observation a hash is."""
    parts = iter(reversed(nodes))

    def read() -> Node:
        part = next(parts)
        if part.IsConstant:
            return ("c", float(part.Value))
        if part.IsVariable:
            return ("mul", ("c", float(part.Value)), ("x", columns[part.HashValue]))
        name, operands = OF_OPERON[part.Type.name], [read() for _ in range(part.Arity)]
        if len(operands) == 1:
            return (name, ("c", 0.0), operands[0]) if name == "sub" else operands[0]
        return reduce(lambda a, b: (name, a, b), operands)

    return read()


# ------------------------------------------------------------------ ONNX


class Graph:
    """Collects ONNX nodes; `add` gives the name of a node's output."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def add(self, operation: str, *inputs: str, **attributes: Any) -> str:
        from onnx import helper

        name = f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(operation, list(inputs), [name], **attributes))
        return name

    def constant(self, values: Any, dtype: Any) -> str:
        from onnx import numpy_helper

        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(values, dtype=dtype), name))
        return name

    def formula(self, node: Node) -> str:
        """The output [B, 1] of a formula of the input `double`, [B, O]."""
        match node:
            case ("x", index):
                return self.add("Gather", "double", self.constant([index], np.int64), axis=1)
            case ("c", number):
                zero = self.add("Mul", self.formula(("x", 0)), self.constant(0.0, np.float64))
                return self.add("Add", zero, self.constant(number, np.float64))
            case ("abs", inner):
                return self.add("Abs", self.formula(inner))
        left, right = self.formula(node[1]), self.formula(node[2])
        if node[0] != "div":
            return self.add(
                {"add": "Add", "sub": "Sub", "mul": "Mul", "max": "Max", "min": "Min"}[node[0]], left, right
            )
        large = self.add("Greater", self.add("Abs", right), self.constant(SMALLEST_DIVISOR, np.float64))
        one = self.constant(1.0, np.float64)
        return self.add("Where", large, self.add("Div", left, self.add("Where", large, right, one)), one)


def onnx_model(outputs: Sequence[Node], low_A: np.ndarray, high_A: np.ndarray, discrete: bool) -> bytes:
    """`observation` float [B, O] -> `action`: int64 [B] of discrete actions, else double [B, A] within its bounds."""
    from onnx import TensorProto, helper

    graph = Graph()
    graph.nodes.append(helper.make_node("Cast", ["observation"], ["double"], to=TensorProto.DOUBLE))
    columns = [graph.formula(node) for node in outputs]
    if discrete and len(columns) == 1:
        above = graph.add("Greater", columns[0], graph.constant(0.0, np.float64))
        last = graph.add("Squeeze", graph.add("Cast", above, to=TensorProto.INT64), graph.constant([1], np.int64))
    elif discrete:
        last = graph.add("ArgMax", graph.add("Concat", *columns, axis=1), axis=1, keepdims=0)
    else:
        joined = graph.add("Max", graph.add("Concat", *columns, axis=1), graph.constant(low_A, np.float64))
        last = graph.add("Min", joined, graph.constant(high_A, np.float64))
    graph.nodes.append(helper.make_node("Identity", [last], ["action"]))
    seen = helper.make_tensor_value_info("observation", TensorProto.FLOAT, [None, None])
    kind = helper.make_tensor_value_info("action", TensorProto.INT64 if discrete else TensorProto.DOUBLE, None)
    whole = helper.make_graph(graph.nodes, "policy", [seen], [kind], graph.constants)
    model = helper.make_model(whole, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString()
