"""Programs that are right, wrong, or pretend to be right."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kibitz import graders
from kibitz.graders import sandbox
from kibitz.graders.code import judge, program_of
from kibitz.graders.sandbox import Limits
from kibitz.types import Prompt

SLOW = Limits(wall_seconds=120.0, cpu_seconds=60, memory_bytes=256 << 20)


@pytest.fixture(autouse=True)
def _all_walls(monkeypatch):
    monkeypatch.delenv("KIBITZ_UNSAFE_CODE", raising=False)


def a_prompt(**columns) -> Prompt:
    return Prompt((1,), "q", "k", columns=columns)


ADD = "def add(a, b):\n    return a + b"


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("x = 1", "x = 1"),
        ("First:\n```python\nx = 1\n```\nbetter:\n```Python\nx = 2\n```\nOutput:\n```\n2\n```", "x = 2\n"),
        ("```\nx = 3\n```\nand\n```bash\nls\n```", "x = 3\n"),
        ("1. do\n   ```py\n   if x:\n       y\n   ```", "if x:\n    y\n"),
        ("cut off:\n```python\nx = 4", "x = 4"),
    ],
)
def test_the_program_of_a_response(text, program):
    assert program_of(text) == program


@pytest.mark.parametrize(
    ("program", "tests", "passed"),
    [
        (ADD, ["assert add(1, 2) == 3", "assert 5 == add(2, 3), 'message'", "assert add('a', 'b') == 'ab'"], True),
        (ADD, ["assert add(1, 2) == 3", "assert add(1, 2) == 4"], False),
        (ADD, ["import math\nx = add(1, 2)", "assert math.isclose(x, 3.0)", "assert x is not None"], True),
        (ADD, ["def check(f):\n    for i in range(9):\n        assert f(i, i) == 2 * i", "check(add)"], True),
        (ADD, ["def check(f):\n    for i in range(9):\n        assert f(i, i) == i", "check(add)"], False),
        (ADD, ["assert add(1, None) == 3"], False),
        (ADD, ["assert abs(add(0.1, 0.2) - 0.3) < 1e-9", "assert add(1, 1) in (2, 3)", "assert add(1, 1) > 1"], True),
        (ADD, ["assert add((1,), ()) == [1]"], False),
        (
            "f=lambda: {(1, 'a'): {b'x', 2j}, 0: [(), 1e999]}",
            ["assert f() == {0: [(), 1e999], (1, 'a'): {2j, b'x'}}"],
            True,
        ),
        ("from collections import *\nf = lambda: (Counter('aab'), deque)", ["assert f()[0] == {'a': 2, 'b': 1}"], True),
        ("def f(x: return x", ["assert True"], False),
        ("\ud800\x00", ["assert True"], False),
        ("def f(): return 'é'\nprint('noise')", ["assert f() == 'é'"], True),
        (
            "from dataclasses import *\n@dataclass\nclass P:\n    x: 'int'",
            ["assert P(1) == P(1)", "assert P(3).x == 3"],
            True,
        ),
    ],
)
def test_statements(program, tests, passed):
    assert judge(program, tests, SLOW).passed == passed


@pytest.mark.parametrize(
    ("program", "given", "expected", "passed"),
    [
        ("a, b = map(int, input().split())\nprint(a + b)", "1 2\n", "3", True),
        ("import sys\nfor line in sys.stdin: print(line.strip()[::-1], '')\nexit()", "ab\ncd", "ba\ndc\n\n", True),
        ("if __name__ == '__main__':\n    print('é')", "", "é\n", True),
        ("print(4)", "1 2\n", "3", False),
        ("print(3)\nraise ValueError", "", "3", False),
        ("print(3", "", "3", False),
        ("import asyncio\nasync def f(): await asyncio.sleep(0); print(3)\nasyncio.run(f())", "", "3", True),
        ("open('a', 'w').write('3'); print(open('a').read())", "", "3", True),
        (
            "import os; print(os.listdir('.'), len(os.environ), os.environ['HOME'] == os.getcwd())",
            "",
            "[] 4 True",
            True,
        ),
        pytest.param(
            "print({'a', 'b', 'c', 'd'} == set('abcd'), hash('a'))", "", "True " + str(hash("a")), False, id="hashes"
        ),
        (
            "import math, heapq, re, decimal, zoneinfo, sqlite3, hashlib, itertools, bisect, random; print(3)",
            "",
            "3",
            True,
        ),
    ],
)
def test_output(program, given, expected, passed):
    verdict = judge(program, [{"input": given, "output": expected}], SLOW)
    assert verdict.passed == passed, verdict.reason


def test_sets_come_out_in_one_order():
    program = {"source": "print({str(i) for i in range(99)})"}
    assert sandbox.run(program, b"", SLOW) == sandbox.run(program, b"", SLOW)


def test_the_grader_reads_the_row():
    response = f"Here you are:\n```python\n{ADD}\n```"
    assert graders.code(a_prompt(tests=["assert add(1, 2) == 3"]), response) == 1
    assert graders.code(a_prompt(tests="assert add(1, 2) == 4"), response) == 0
    assert graders.pick("code", []) is graders.code


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        (None, "prompt k: no tests"),
        (["assert f( == 3"], "prompt k: tests: the test 'assert f\\( == 3' is not Python"),
        ([{"input": "1"}], "a test is a text of Python or"),
        ([3], "a test is a text"),
    ],
)
def test_tests_that_are_none_are_an_error(tests, message):
    with pytest.raises(ValueError, match=message):
        graders.code(a_prompt(tests=tests), ADD)


# ------------------------------------------------------------------ programs that lie

HONEST = "def f(x): return x + 1\ndef g(x): return x + 1.5"
WRONG = "def f(x): return -1\ng = f\n"
YES = """
class Yes:
    def __eq__(self, other): return True
    __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __instancecheck__ = __eq__
    def __sub__(self, other): return 0.0
    __add__ = __radd__ = __rsub__ = __mul__ = __mod__ = __sub__
    def __abs__(self): return 0.0
    def __float__(self): return 3.0
    def __len__(self): return 1
    def __round__(self, digits=0): return self
    def __hash__(self): return 3
def f(x): return Yes()
g = f
"""
EDITED = WRONG + "import sys\nline = sys.modules['dialogue'].Line\n"
FRAUDS = {
    "sys.exit": "import sys\nsys.exit(0)",
    "os._exit": "import os\nos._exit(0)",
    "SystemExit in a test": "def f(x): raise SystemExit(0)\ng = f",
    "os._exit in a test": "import os\ndef f(x): os._exit(0)\ng = f",
    "os._exit(0) at the end": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return 0\ng = f",
    "a verdict on every file": (
        WRONG + "import os\ndef f(x):\n  for n in range(64):\n"
        '    try: os.write(n, b\'{"passed": true, "reason": ""}\\n\')\n    except OSError: pass\n  os._exit(0)\ng = f'
    ),
    "closed files": "import os\ndef f(x):\n  os.closerange(0, 64)\n  os._exit(0)\ng = f",
    "equal to all": YES,
    "an int equal to all": "class E(int):\n  def __eq__(self, other): return True\ndef f(x): return E()\ng = f",
    "a float that says 0": "class E(float):\n  def __sub__(self, other): return 0.0\ndef f(x): return E(9)\ng = f",
    "shadowed names": WRONG
    + (
        "def all(x): return True\nrange = lambda *x: []\ndef abs(x): return 0\nset = len = sorted = isinstance = all\n"
        "class math: isclose = staticmethod(lambda *x, **y: True)\nround = float = int = str = lambda *x: 3\n"
    ),
    "a test of its own": WRONG + "def check(candidate): pass\ncandidate = lambda x: x + 1",
    "patched builtins": WRONG
    + (
        "import builtins, math, sys\nbuiltins.AssertionError = None\nbuiltins.len = builtins.abs = lambda x: 3\n"
        "builtins.all = builtins.any = builtins.bool = lambda *x: True\nbuiltins.__build_class__ = None\n"
        "math.isclose = lambda *x, **y: True\nsys.modules['unittest'] = math"
    ),
    "no builtins": WRONG + "__builtins__ = {}",
    "patched encoders": WRONG + "import json\njson.dumps = json.JSONEncoder.encode = lambda *x: 'true'",
    "a trace": WRONG + "import sys\nsys.settrace(lambda *x: 1/0)\nsys.setprofile(lambda *x: None)",
    "a search of the frames": (
        "import sys\ndef f(x):\n  frame = sys._getframe()\n  while frame:\n"
        "    for name in ('y', 'expected', 'tests'):\n      if name in frame.f_locals: return frame.f_locals[name]\n"
        "    frame = frame.f_back\n  return 0\ng = f"
    ),
    "the line: all is true": EDITED + "line.answer = lambda self, message: self.send({'value': True})",
    "the line: builtins": EDITED + "line.encode = lambda self, value: {'builtin': 'exit'}",
    "the line: what the tests gave": EDITED + "line.encode = lambda self, value: {'yours': 0}",
    "the line: not what was given": EDITED + "line.encode = lambda self, value: {'yours': -1}",
    "the line: its own questions": EDITED
    + (
        "line.answer = lambda self, message: self.send({'ask': 'get', 'parts': [{'yours': 0}, '__globals__'], 'names': []})"
    ),
    "the line: operators": YES
    + (
        "import sys\nsays = sys.modules['dialogue'].FOR_THE_PROGRAM\nsays.update(eq=lambda *x: True, sub=lambda *x: 0, "
        "content=lambda *x: [3], abs=lambda *x: 0)"
    ),
    "eval": "f = g = eval",
    "an end of the tests' loop": "def f(x): raise StopIteration\ng = f",
    "a kind of end of the tests' loop": "class E(StopIteration): pass\ndef f(x): raise E\ng = f",
}
TESTS = [
    "assert f(2) == 3",
    "assert 3 == f(2)",
    "y = 3\nassert f(2) == y",
    "assert all(f(i) == i + 1 for i in range(3))",
    "assert all(map(lambda i: f(i) == i + 1, range(3)))",
    "assert all(a == b for a, b in zip(map(f, [1, 2]), [2, 3]))",
    "assert not list(filter(lambda i: f(i) != i + 1, range(3)))",
    "assert abs(g(2) - 3.5) < 1e-6",
    "assert math.isclose(g(2), 3.5)",
    "from math import isclose\nassert isclose(g(2), 3.5)",
    "assert set([f(2)]) == {3} and len({f(2), f(3)}) == 2",
    "def check(candidate):\n    assert candidate(2) == 3\n    assert candidate(3) == 4\ncheck(f)",
    "assert f(2) in (3, 4) and sorted([f(2), f(1)]) == [2, 3]",
    "assert not (f(2) - 3)",
    "assert round(g(2), 1) == 3.5",
    "assert type(f(2)) is int and isinstance(f(2), int) and 2 < f(2) < 4",
    "assert f(10) == 10**2 - 89 and str(f(2)) == '3'",
    "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        self.assertEqual(f(2), 3)\n"
    "r = unittest.TestResult()\nT('test').run(r)\nassert r.wasSuccessful() and r.testsRun == 1",
]


@pytest.mark.parametrize("test", TESTS)
def test_an_honest_program_passes(test):
    verdict = judge(HONEST, [test], SLOW)
    assert verdict.passed, verdict.reason


@pytest.mark.parametrize("fraud", FRAUDS)
def test_a_fraud_does_not_pass(fraud):
    rng = random.Random(fraud)
    for test in [TESTS[0], *rng.sample(TESTS[1:], 2)]:
        verdict = judge(FRAUDS[fraud], [test], SLOW)
        assert not verdict.passed and verdict.reason, test


@pytest.mark.slow
@pytest.mark.parametrize("fraud", FRAUDS)
def test_no_fraud_passes_any_test(fraud):
    assert [test for test in TESTS if judge(FRAUDS[fraud], [test], SLOW).passed] == []


def test_frauds_do_not_pass_by_output():
    for program in ("print('passed')", "import os\nos._exit(0)", "import os\nprint(os.pread(0, 9999, 0))"):
        assert not judge(program, [{"input": "1", "output": "42"}], SLOW).passed


def test_what_is_documented_as_not_prevented():
    """The tests take `isclose`, and the equality of two objects of the program's class, from the program."""
    assert judge(WRONG + "isclose = lambda *x: True", ["assert isclose(g(2), 3.5)"], SLOW).passed
    always = "class P:\n  def __init__(self, x): pass\n  def __eq__(self, other): return True"
    assert judge(always, ["assert P(1) == P(1)"], SLOW).passed
    assert judge("def sort(x):\n  x.clear()\n  return []", ["x = [2, 1]\nassert sort(x) == sorted(x)"], SLOW).passed


# ------------------------------------------------------------------ what the line between tests and program carries

CLASSES = """
import collections, datetime, decimal, enum, fractions
from dataclasses import dataclass
class Stack:
    def __init__(self): self.items = []
    def push(self, x): self.items.append(x)
    def pop(self):
        if not self.items: raise Empty("nothing there")
        return self.items.pop()
    def __len__(self): return len(self.items)
    def __iter__(self): return iter(self.items)
    def __getitem__(self, i): return self.items[i]
class Empty(KeyError): pass
class Vector:
    def __init__(self, x, y): self.x, self.y = x, y
    def __add__(self, other): return Vector(self.x + other.x, self.y + other.y)
    def __mul__(self, k): return Vector(self.x * k, self.y * k)
    def __eq__(self, other): return (self.x, self.y) == (other.x, other.y)
    def __abs__(self): return (self.x ** 2 + self.y ** 2) ** 0.5
    def __repr__(self): return f"<{self.x}, {self.y}>"
class Numbers(list):
    def total(self): return sum(self)
Colour = enum.IntEnum("Colour", "RED BLUE")
Point = collections.namedtuple("Point", "x y")
def same(x): return x
def apply(f, xs): return [f(x) for x in xs]
def count(n):
    for i in range(n): yield i
def rotate(m): m[:] = [list(row) for row in zip(*m[::-1])]
def fill(d, **more): d.update(more)
def fails(): raise ValueError("no")
def look(key): return {}[key]
def leaf(node): return node.left.value if node.left else None
"""


@pytest.mark.parametrize(
    "test",
    [
        "s = Stack()\ns.push(1)\ns.push([2])\nassert len(s) == 2 and list(s) == [1, [2]] and s[0] == 1 and s.items == [1, [2]]",
        "s = Stack()\ntry:\n    s.pop()\nexcept Empty as e:\n    assert 'nothing' in str(e)\nelse:\n    assert False",
        "try:\n    Stack().pop()\nexcept KeyError:\n    pass\nelse:\n    assert False",
        "try:\n    fails()\nexcept ValueError as e:\n    assert str(e) == 'no'",
        "try:\n    look('key')\nexcept KeyError as e:\n    assert e.args == ('key',) and str(e) == repr('key')",
        "try:\n    next(count(0))\nexcept StopIteration:\n    pass\nelse:\n    assert False",
        "v = Vector(1, 2) + Vector(2, 2)\nassert v == Vector(3, 4) and abs(v) == 5 and v.x == 3 and str(v) == '<3, 4>'",
        "v = Vector(1, 2) * 3\nassert v == Vector(3, 6) and v.y == 6",
        "assert isinstance(Vector(1, 2), Vector) and not isinstance(3, Vector)",
        "n = Numbers([1, 2])\nassert n == [1, 2] and n.total() == 3 and same(n) is n",
        "assert Colour.RED == 1 and Point(1, 2).y == 2 and Point(1, 2) == (1, 2)",
        "assert apply(lambda x: x + 1, [1, 2]) == [2, 3] and apply(len, ['ab']) == [2] and apply(str.upper, ['a']) == ['A']",
        "assert list(count(3)) == [0, 1, 2] and sum(count(4)) == 6 and next(count(1)) == 0",
        "m = [[1, 2], [3, 4]]\nrotate(m)\nassert m == [[3, 1], [4, 2]]",
        "d = {'a': 1}\nfill(d, b=2)\nassert d == {'a': 1, 'b': 2}",
        "class Node:\n    def __init__(self, value, left=None):\n        self.value, self.left = value, left\n"
        "assert leaf(Node(1, Node(2))) == 2 and leaf(Node(1)) is None",
        "import datetime\nt = datetime.datetime(2020, 2, 29, 1, 2, 3, 4)\nassert same(t) == t and same(t - t) == t - t",
        "from fractions import Fraction\nfrom decimal import Decimal\nfrom collections import Counter, deque, OrderedDict\n"
        "for x in (Fraction(1, 3), Decimal('1.10'), Counter('aab'), deque([1], 3), OrderedDict(a=1), range(1, 9, 2), "
        "b'x', bytearray(b'y'), 2j, 10**5000, -0.0, float('inf'), frozenset({1}), {(1, 'a'): None}, '\\ud800'):\n"
        "    assert same(x) == x and type(same(x)) is type(x)",
        "assert str(same(float('nan'))) == 'nan'",
    ],
)
def test_a_test_of_objects(test):
    verdict = judge(CLASSES, [test], SLOW)
    assert verdict.passed, verdict.reason


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda parts: st.lists(parts, max_size=4) | st.dictionaries(st.text(max_size=4), parts, max_size=4),
    max_leaves=12,
)


@settings(max_examples=5, deadline=None)
@given(st.lists(JSON, min_size=1, max_size=8))
def test_any_json_value_goes_there_and_back(values):
    tests = [f"assert same({value!r}) == {value!r}" for value in values]
    assert judge("def same(x): return x", tests, SLOW).passed
    verdict = judge(f"def same(x): return {[*values, 'more']!r}", tests[-1:], SLOW)
    assert not verdict.passed


def test_a_program_that_never_ends_is_late_and_one_that_is_wrong_is_not():
    limits = Limits(wall_seconds=1.0)
    for tests in (["assert f(2) == 3"], [{"input": "", "output": "3"}]):
        assert judge("def f(x): return 0", tests, SLOW).late is False
        assert judge("while True: pass", tests, limits).late is True
