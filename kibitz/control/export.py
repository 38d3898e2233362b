"""What a student that can be read leaves: text, a picture, a Python function that needs nothing, and ONNX.

The function acts as the student does, to the bit: a tree compares in float32 as scikit-learn does, a formula computes in the same
order.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from kibitz.control import formulas
from kibitz.control.students import FormulaStudent, Student, TreeStudent
from kibitz.files import write_atomically

ROUND = "import struct\n\n\ndef single(x):\n    return struct.unpack('f', struct.pack('f', x))[0]\n"


def write(student: Student, names: Sequence[str], folder: Path) -> dict[str, Any]:
    """`policy.py`, `policy.txt`, `policy.onnx` and, of a tree, `policy.svg`; returns the sections of the report."""
    rules = text(student, names)
    write_atomically(folder / "policy.py", python(student))
    write_atomically(folder / "policy.txt", rules)
    (folder / "policy.onnx").write_bytes(onnx(student))
    if isinstance(student, TreeStudent):
        write_atomically(folder / "policy.svg", svg(student, names))
        return {
            "title": "The policy",
            "words": "Each box asks: up is yes, down is no.",
            "image": "policy.svg",
            "text": rules,
        }
    return {"title": "The policy", "words": "", "text": rules}


def load(code: str) -> Any:
    """The function `act` of an exported policy."""
    space: dict[str, Any] = {}
    exec(compile(code, "policy.py", "exec"), space)
    return space["act"]


# ------------------------------------------------------------------ Python


def python(student: Student) -> str:
    """A file with `act(o)`: from the numbers of one observation to an action, or to a list of numbers."""
    if isinstance(student, TreeStudent):
        body = "\n".join(_branch(student, 0, 1))
        return f'"""A policy: act(o) takes the numbers of one observation."""\n\n{ROUND}\n\ndef act(o):\n{body}\n'
    assert isinstance(student, FormulaStudent)
    helpers = "".join(f"\n\n{formulas.HELPERS[name]}" for name in sorted(_used(student)) if name in formulas.HELPERS)
    return (
        f'"""A policy: act(o) takes the numbers of one observation."""\n{helpers}\n\ndef act(o):\n{_formula(student)}\n'
    )


def _used(student: FormulaStudent) -> set[str]:
    return set().union(*(formulas.used(node) for node in student.outputs))


def _formula(student: FormulaStudent) -> str:
    lines = [f"    v{k} = {formulas.source(node)}" for k, node in enumerate(student.outputs)]
    values, shape = [f"v{k}" for k in range(len(lines))], student.shape
    if not shape.discrete:
        bounds = zip(values, shape.low_A.tolist(), shape.high_A.tolist(), strict=True)
        result = f"[{', '.join(f'min(max({v}, {low!r}), {high!r})' for v, low, high in bounds)}]"
    elif len(values) == 1:
        result = "1 if v0 > 0 else 0"
    else:
        result = f"max(range({len(values)}), key=({', '.join(values)}).__getitem__)"
    return "\n".join([*lines, f"    return {result}"])


def _branch(student: TreeStudent, node: int, depth: int) -> list[str]:
    tree, pad, parts = student.model.tree_, "    " * depth, children(student, node)
    if parts is None:
        return [f"{pad}return {leaf(student, node)!r}"]
    question = f"{pad}if single(o[{int(tree.feature[node])}]) <= {float(tree.threshold[node])!r}:"
    return [question, *_branch(student, parts[0], depth + 1), *_branch(student, parts[1], depth)]


def children(student: TreeStudent, node: int) -> tuple[int, int] | None:
    """The nodes for yes and no; None of a leaf, and of a question after which both answers lead to one action."""
    tree = student.model.tree_
    yes, no = int(tree.children_left[node]), int(tree.children_right[node])
    return None if yes == no or len(_actions(student, node)) == 1 else (yes, no)


def _actions(student: TreeStudent, node: int) -> set[Any]:
    """All that is done below a node."""
    tree = student.model.tree_
    yes, no = int(tree.children_left[node]), int(tree.children_right[node])
    if yes == no:
        action = leaf(student, node)
        return {action if isinstance(action, int) else tuple(action)}
    return _actions(student, yes) | _actions(student, no)


def leaf(student: TreeStudent, node: int) -> int | list[float]:
    """The action of a leaf, or of a node whose leaves all act alike: of equal classes the first, as scikit-learn has it."""
    tree = student.model.tree_
    while tree.children_left[node] != tree.children_right[node]:
        node = int(tree.children_left[node])
    value = tree.value[node]
    if student.shape.discrete:
        return int(student.model.classes_[value[0].argmax()])
    return value[:, 0].clip(student.shape.low_A, student.shape.high_A).tolist()


# ------------------------------------------------------------------ words and pictures


def text(student: Student, names: Sequence[str]) -> str:
    """The rules in words."""
    if isinstance(student, TreeStudent):
        return "\n".join(_told(student, names, 0, 0)) + "\n"
    assert isinstance(student, FormulaStudent)
    parts = [formulas.text(node, names) for node in student.outputs]
    if not student.shape.discrete:
        return "".join(f"action {k} = {part}\n" for k, part in enumerate(parts))
    if len(parts) == 1:
        return f"action 1 if {parts[0]} > 0, else action 0\n"
    return "the action with the largest value:\n" + "".join(f"  action {k}: {part}\n" for k, part in enumerate(parts))


def _told(student: TreeStudent, names: Sequence[str], node: int, depth: int) -> list[str]:
    tree, pad, parts = student.model.tree_, "  " * depth, children(student, node)
    if parts is None:
        return [f"{pad}{_leaf_words(student, node)}"]
    question = f"{names[int(tree.feature[node])]} <= {float(tree.threshold[node]):.3g}"
    yes, no = (_told(student, names, child, depth + 1) for child in parts)
    return [f"{pad}if {question}:", *yes, f"{pad}else:", *no]


def _leaf_words(student: TreeStudent, node: int) -> str:
    action = leaf(student, node)
    return f"action {action}" if isinstance(action, int) else f"action {', '.join(f'{part:.3g}' for part in action)}"


WIDE, HIGH, GAP = 132, 26, 34  # of a box, and between a question and its answers, in points
ROW = 32  # from a leaf to the next


def svg(student: TreeStudent, names: Sequence[str]) -> str:
    """The tree as boxes from left to right, so that many leaves fit on a page: leaves one below the other, a question at the
    height of the middle of what it decides between."""
    boxes: list[str] = []
    height, right = _draw(student, names, 0, (0.0, 0.0), boxes)[1:]
    rules = (
        "text{font:12px sans-serif;text-anchor:middle;fill:#1e2022}rect{fill:#fff;stroke:#59636e}.leaf{fill:#dbeefa}"
        "path{fill:none;stroke:#808a94;stroke-width:1.5}"
    )
    size = f'viewBox="0 0 {right:g} {height:g}" width="{right:g}" height="{height:g}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{rules}</style>{"".join(boxes)}</svg>\n'


def _draw(
    student: TreeStudent, names: Sequence[str], node: int, corner: tuple[float, float], boxes: list[str]
) -> tuple[float, float, float]:
    """Draw what hangs on a node, from `corner` (left, top) on; returns the middle of its box, and where it ends below and to the
    right."""
    tree, parts, (left, top) = student.model.tree_, children(student, node), corner
    if parts is None:
        middle, end, right = top + ROW / 2, top + ROW, left + WIDE
        words, kind = _leaf_words(student, node), "leaf"
    else:
        beside = left + WIDE + GAP
        first, between, wide = _draw(student, names, parts[0], (beside, top), boxes)
        second, end, wider = _draw(student, names, parts[1], (beside, between), boxes)
        middle, right, kind = (first + second) / 2, max(wide, wider), "question"
        words = f"{names[int(tree.feature[node])]} ≤ {float(tree.threshold[node]):.3g}"
        for child in (first, second):
            boxes.append(f'<path d="M{left + WIDE - 2:g} {middle:g}h{GAP / 2:g}V{child:g}h{GAP / 2 + 4:g}"/>')
    shown = f"{words[:20]}…" if len(words) > 21 else words
    box = f'<rect class="{kind}" x="{left + 2:g}" y="{middle - HIGH / 2:g}" width="{WIDE - 4}" height="{HIGH}" rx="4"/>'
    label = f'<text x="{left + WIDE / 2:g}" y="{middle + 4:g}">{escape(shown)}<title>{escape(words)}</title></text>'
    boxes.append(box + label)
    return middle, end, right


# ------------------------------------------------------------------ ONNX


def onnx(student: Student) -> bytes:
    """An ONNX model from `observation` or `X`, float [B, O], to actions; its first output."""
    if isinstance(student, FormulaStudent):
        shape = student.shape
        return formulas.onnx_model(student.outputs, shape.low_A, shape.high_A, shape.discrete)
    from skl2onnx import to_onnx

    assert isinstance(student, TreeStudent)
    options = {"zipmap": False} if student.shape.discrete else {}
    sample = np.zeros((1, student.shape.num_observed), np.float32)
    return to_onnx(student.model, sample, options={id(student.model): options}).SerializeToString()
