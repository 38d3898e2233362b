"""Graders of form and of code. The programs here attack the sandbox, but do no harm where a wall is broken."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kibitz import graders
from kibitz.graders import sandbox
from kibitz.graders.code import judge, program_of
from kibitz.graders.sandbox import Limits
from kibitz.types import Prompt

FAST = Limits(wall_seconds=1.0, cpu_seconds=2, memory_bytes=256 << 20)
SLOW = Limits(wall_seconds=20.0, cpu_seconds=20, memory_bytes=256 << 20)


@pytest.fixture(autouse=True)
def _all_walls(monkeypatch):
    monkeypatch.delenv("KIBITZ_UNSAFE_CODE", raising=False)


def a_prompt(**columns) -> Prompt:
    return Prompt((1,), "q", "k", columns=columns)


# ------------------------------------------------------------------ constraints


@pytest.mark.parametrize(
    ("constraint", "good", "bad"),
    [
        ({"type": "min_words", "count": 3}, "one two three", "one two"),
        ({"type": "max_words", "count": 2}, " one two ", "one two three"),
        ({"type": "min_characters", "count": 3}, "日本語", "日本  "),
        ({"type": "max_characters", "count": 3}, "  日本語  ", "日本語だ"),
        ({"type": "num_sentences", "count": 2}, 'It costs 3.50. "Really?!"', "One."),
        ({"type": "num_sentences", "count": 2}, "很好。真的吗？", "很好。"),
        ({"type": "num_sentences", "count": 2}, "The first. And the last one without an end", "The first."),
        ({"type": "num_bullets", "count": 3}, "- a\n * b\n2. c", "- a\n-b\nc - d"),
        ({"type": "num_paragraphs", "count": 2}, "a\nb\n \nc", "a\nb"),
        ({"type": "num_lines", "count": 2}, "a\n\n b", "a"),
        ({"type": "contains", "keywords": ["Tea", "milk"]}, "TEA with Milk", "tea only"),
        ({"type": "contains", "keywords": ["tea"], "whole_words": True}, "a cup of tea.", "a team"),
        ({"type": "not_contains", "keywords": ["cat"]}, "dog", "concatenate"),
        ({"type": "not_contains", "keywords": ["c++"], "whole_words": True}, "abc++", "I like C++."),
        ({"type": "num_occurrences", "keyword": "ja", "count": 2}, "ja ja", "ja"),
        ({"type": "starts_with", "prefix": "Dear"}, "\nDear Ada", "dear Ada"),
        ({"type": "ends_with", "suffix": "Bye."}, "So long. Bye.\n", "Bye. So long."),
        ({"type": "regex", "pattern": r"\d{3}"}, "abc 123", "12 3"),
        ({"type": "regex", "pattern": r"\d+", "whole": True}, "123", "123a"),
        ({"type": "all_lowercase"}, "it is 5 o'clock, é", "It is"),
        ({"type": "all_uppercase"}, "IT IS 5", "IT is"),
        ({"type": "json"}, '```json\n{"a": [1, null]}\n```', "{'a': 1}"),
        ({"type": "json"}, "[1e3]", "[NaN]"),
        ({"type": "json"}, "5", "[" * 100_000),
    ],
)
def test_each_constraint_tells_good_from_bad(constraint, good, bad):
    rewards = [graders.constraints(a_prompt(constraints=[constraint]), text) for text in (good, bad, " \n")]
    assert rewards == [1, 0, 0]


def test_a_share_or_all_of_them():
    short = {"type": "max_words", "count": 2, "keywords": None}  # a table fills the gaps of a row with None
    prompt = a_prompt(constraints=[short, {"type": "all_lowercase"}, {"type": "contains", "keywords": ["x"]}])
    assert graders.constraints(prompt, "an X") == pytest.approx(2 / 3)
    assert graders.constraints_strict(prompt, "an X") == 0
    assert graders.constraints_strict(prompt, "an x") == 1


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        (None, "prompt k: no constraints"),
        ("max_words", "no constraints"),
        (
            [{"type": "max_word", "count": 1}],
            "prompt k: constraints: there is no constraint 'max_word': did you mean max_words?",
        ),
        ([{"type": "zzzzz"}], "there are min_words, "),
        ([{"count": 1}], 'a constraint is {"type"'),
        ([{"type": "max_words"}], "the constraint max_words takes count: int: missing"),
        ([{"type": "max_words", "count": 1, "prefix": "a"}], "takes count: int: got an unexpected"),
        ([{"type": "json", "text": "5"}], "takes no options"),
        ([{"type": "max_words", "count": "5"}], "count = '5': write a whole number"),
        ([{"type": "max_words", "count": True}], "write a whole number"),
        ([{"type": "contains", "keywords": "tea"}], "keywords = 'tea': write a list of texts"),
        ([{"type": "contains", "keywords": [""]}], "write a list of texts"),
        ([{"type": "regex", "pattern": "("}], "no regular expression, '\\('"),
    ],
)
def test_a_constraint_that_is_none_is_an_error(constraints, message):
    with pytest.raises(ValueError, match=message):
        graders.constraints(a_prompt(constraints=constraints), "text")


# ------------------------------------------------------------------ code that is right or wrong


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
        ("print({'a', 'b', 'c', 'd'} == set('abcd'), hash('a'))", "", "True " + str(hash("a")), False),
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

FRAUDS = {
    "sys.exit": "import sys\nsys.exit(0)",
    "os._exit": "import os\nos._exit(0)",
    "SystemExit in a test": "def f(x): raise SystemExit(0)",
    "os._exit in a test": "import os\ndef f(x): os._exit(0)",
    "os._exit(0) at the end": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return 0",
    "printed success": "print('true\\n0 true\\nready passed OK')\ndef f(x): return 0",
    "success on every file": (
        "import os\ndef f(x):\n  for n in range(64):\n    try: os.write(n, b'\\nabc 0 3\\n0 true\\ntrue\\n')\n"
        "    except OSError: pass\n  os._exit(0)"
    ),
    "closed files": "import os\ndef f(x):\n  os.closerange(0, 64)\n  os._exit(0)",
    "equal to all": "class E:\n  def __eq__(self, other): return True\ndef f(x): return E()",
    "an int equal to all": "class E(int):\n  def __eq__(self, other): return True\ndef f(x): return E()",
    "patched builtins": (
        "import builtins\nbuiltins.AssertionError = None\nbuiltins.len = builtins.abs = lambda x: 3\n"
        "builtins.all = builtins.any = builtins.bool = lambda *x: True\nbuiltins.__build_class__ = None\ndef f(x): return -1"
    ),
    "patched encoders": "import json\njson.dumps = json.JSONEncoder.encode = lambda *x: 'true'\ndef f(x): return 0",
    "a trace": "import sys\nsys.settrace(lambda *x: 1/0)\nsys.setprofile(lambda *x: None)\ndef f(x): return 0",
}
HONEST = "def f(x): return x + 1"


@pytest.mark.parametrize("fraud", FRAUDS)
def test_a_fraud_does_not_pass(fraud):
    value, inside = (
        "assert f(2) == 3",
        "assert type(f(2)) is int and all([f(2) > 0]) and len([f(2)]) == 1 == abs(f(2)) - 2",
    )
    for test in (value, inside):
        assert judge(HONEST, [test], SLOW).passed
        verdict = judge(FRAUDS[fraud], [test], SLOW)
        assert not verdict.passed and verdict.reason


def test_frauds_do_not_pass_by_output():
    for program in ("print('passed')", "import os\nos._exit(0)", "import os\nprint(os.pread(0, 9999, 0))"):
        assert not judge(program, [{"input": "1", "output": "42"}], SLOW).passed


# ------------------------------------------------------------------ programs that break out


def report_of(attack: str, limits: Limits = SLOW) -> sandbox.Outcome:
    """What happened to an attack: the name of its error, or `done`."""
    lines = "".join(f"    {line}\n" for line in attack.splitlines())
    source = f"try:\n{lines}except BaseException as error:\n    print(type(error).__name__)\nelse:\n    print('done')\n"
    return sandbox.run({"source": source}, b"", limits)


@pytest.mark.parametrize(
    ("attack", "error"),
    [
        ("import os\nfor _ in range(5): os.fork()", "PermissionError"),
        ("import subprocess\nsubprocess.Popen(['/bin/sleep', '99'])", "PermissionError"),
        ("import os\nos.posix_spawn('/bin/true', ['true'], {})", "PermissionError"),
        ("import os\nos.execv('/bin/true', ['true'])", "PermissionError"),
        ("import multiprocessing\nmultiprocessing.Process(target=print).start()", "PermissionError"),
        ("import threading\nwhile True: threading.Thread(target=input).start()", "RuntimeError"),
        ("import os\nos.kill(os.getppid(), 0)", "PermissionError"),
        ("import os\nos.kill(-1, 0)", "PermissionError"),
        ("import os\nos.setsid()", "PermissionError"),
        ("import resource\nresource.setrlimit(resource.RLIMIT_CPU, (99, 99))", "ValueError"),
        ("import socket\nsocket.socket()", "PermissionError"),
        ("import socket\nsocket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)", "PermissionError"),
        ("open('/proc/self/environ').read()", "PermissionError"),
        ("open(f'/proc/{__import__(\"os\").getppid()}/mem', 'rb')", "PermissionError"),
        ("open('/etc/passwd').read()", "PermissionError"),
        ("open('/dev/shm/kibitz', 'w')", "PermissionError"),
        ("open('/dev/tty', 'w')", "OSError PermissionError"),
        ("import os\nos.mkdir('folder')", "PermissionError"),
        ("import os\nos.symlink('/etc/passwd', 'link')", "PermissionError"),
        ("import os\nos.mkfifo('pipe')", "PermissionError"),
        ("import os\nos.chmod('.', 0o777)", "PermissionError"),
        ("import os\nos.environ['KIBITZ_SECRET']", "KeyError"),
        ("def f(n): return f(n + 1)\nf(0)", "RecursionError"),
        ("a = bytearray(1 << 40)", "MemoryError"),
        ("a = []\nwhile True: a.append(bytearray(1 << 20))", "MemoryError"),
        ("with open('a', 'wb') as f: f.write(bytes(9 << 20))", "OSError"),
        ("with open('a', 'wb') as f: f.truncate(1 << 40)", "OSError"),
        ("a = [open('a', 'wb') for _ in range(999)]", "OSError"),
        ("import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0", "AssertionError"),
        ("import ctypes\nassert ctypes.CDLL(None).shmget(0, 4096, 0o1666) >= 0", "AssertionError"),
        (
            "import ctypes\nassert ctypes.CDLL(None).syscall(425, 8, bytes(256)) >= 0",
            "AssertionError",
        ),  # io_uring_setup
        ("import os\nos.getpid()", "done"),
    ],
)
def test_an_attack_meets_an_error(attack, error, monkeypatch):
    monkeypatch.setenv("KIBITZ_SECRET", "x")
    outcome = report_of(attack)
    assert outcome.stopped == "" and outcome.output.decode().strip() in error.split()


@pytest.mark.parametrize(
    ("program", "limits", "reason"),
    [
        ("while True: pass", FAST, "took longer than 1.0 seconds"),
        ("import time\ntime.sleep(99)", FAST, "took longer"),
        ("import os, time\nos.close(1)\ntime.sleep(99)", FAST, "took longer"),
        (
            "import signal\n[signal.signal(s, signal.SIG_IGN) for s in (1, 2, 15, 24)]\nwhile True: pass",
            FAST,
            "took longer",
        ),
        ("while True: pass", Limits(wall_seconds=60, cpu_seconds=1), "status -9"),
        ("while True: print('x' * 9999)", SLOW, "wrote more than 1048576 bytes"),
        (
            "for i in range(10**9):\n  with open(str(i), 'wb') as f: f.write(bytes(1 << 20))",
            SLOW,
            "filled its working directory",
        ),
        ("for i in range(10**9): open(str(i), 'wb').close()", SLOW, "filled its working directory"),
        ("import sys\nsys.setrecursionlimit(10**9)\nf = lambda n: [f(n + 1)]\nf(0)", FAST, "left with status|longer"),
        ("import ctypes\nctypes.string_at(0)", SLOW, "status -11"),
    ],
)
def test_an_attack_on_resources_is_stopped(program, limits, reason):
    begin = time.monotonic()
    verdict = judge(program, [{"input": "", "output": ""}], limits)
    assert not verdict.passed
    with pytest.raises(ValueError, match=reason):
        raise ValueError(verdict.reason)
    assert time.monotonic() - begin < 20


def test_no_connection_comes_out():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        server.settimeout(0.2)
        socket.create_connection(address).close()
        server.accept()[0].close()  # the listener works
        assert report_of(f"import socket\nsocket.create_connection({address})").output == b"PermissionError\n"
        with pytest.raises(TimeoutError):
            server.accept()


def test_files_outside_are_neither_read_nor_written(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("x")
    for attack in (
        f"open({str(secret)!r}).read()",
        f"open({str(secret)!r}, 'w')",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"import os\nos.remove({str(secret)!r})",
        f"import os\nos.truncate({str(secret)!r}, 0)",
        f"import os\nos.chmod({str(secret)!r}, 0o777)",
        f"import os\nos.utime({str(secret)!r})",
        f"import os\nopen('a', 'w').close()\nos.rename('a', {str(tmp_path / 'new')!r})",
        f"import os\nos.link({str(secret)!r}, 'a')",
        f"import os\nos.chdir({str(tmp_path)!r})\nopen('secret')",
    ):
        assert report_of(attack).output in (b"PermissionError\n", b"OSError\n"), attack
    assert secret.read_text() == "x" and sorted(tmp_path.iterdir()) == [secret]


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert report_of("open('a', 'w').write('x')").output == b"done\n"
    assert report_of("open('a', 'w').write('x')\nwhile True: pass", FAST).stopped
    assert list(tmp_path.iterdir()) == []
    assert children_of(os.getpid()) == []


def children_of(pid: int) -> list[int]:
    """Of one process: those that run confined programs."""
    numbers = [int(n) for task in Path(f"/proc/{pid}/task").iterdir() for n in (task / "children").read_text().split()]
    return [n for n in numbers if b"confined.py" in Path(f"/proc/{n}/cmdline").read_bytes()]


def test_a_program_dies_with_its_parent(tmp_path):
    spec = importlib.util.find_spec("kibitz.graders.sandbox")
    helper = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('sandbox', {spec.origin!r})\n"
        "sys.modules['sandbox'] = sandbox = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(sandbox)\n"
        "job = {'source': 'import time; time.sleep(999)', 'tests': None, 'nonce': None}\n"
        "sandbox.run(job, b'', sandbox.Limits(wall_seconds=999))\n"
    )
    with subprocess.Popen([sys.executable, "-c", helper], env={"TMPDIR": str(tmp_path)}) as process:
        try:
            child = until(lambda: [n for n in children_of(process.pid) if "Seccomp:\t2" in status(n)])[0]
        finally:
            process.send_signal(signal.SIGKILL)
    assert until(lambda: not status(child) or "State:\tZ" in status(child))


def status(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def until(condition):
    deadline = time.monotonic() + 20
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return value


# ------------------------------------------------------------------ machines without the walls


def test_without_a_wall_programs_are_refused_or_warned_about(monkeypatch):
    broken = Limits(file_bytes=1 << 70)  # no kernel takes such a limit: one layer is missing
    with pytest.raises(
        RuntimeError, match=r"cannot be confined on this machine: resource limits \(.*KIBITZ_UNSAFE_CODE=1"
    ):
        judge(ADD, ["assert add(1, 2) == 3"], broken)
    monkeypatch.setenv("KIBITZ_UNSAFE_CODE", "1")
    with pytest.warns(RuntimeWarning, match="run without resource limits"):
        assert judge(ADD, ["assert add(1, 2) == 3"], broken).passed


def test_children_of_an_unconfined_program_die(monkeypatch):
    monkeypatch.setenv("KIBITZ_UNSAFE_CODE", "1")
    command = ["sh", "-c", "sleep 999 & echo $!"]  # the leader is gone, its child is not
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        child = int(process.stdout.readline())
        process.wait()
        until(lambda: "sleep" in status(child))
        sandbox._kill(process)
        assert until(lambda: not status(child) or "State:\tZ" in status(child))
