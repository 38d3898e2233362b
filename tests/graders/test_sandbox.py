"""Programs that break out. They attack the sandbox, but do no harm where a wall is broken."""

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kibitz.graders import sandbox
from kibitz.graders.code import judge
from kibitz.graders.sandbox import Limits

FAST = Limits(wall_seconds=1.0, cpu_seconds=2, memory_bytes=256 << 20)
SLOW = Limits(wall_seconds=120.0, cpu_seconds=60, memory_bytes=256 << 20)
ADD = "def add(a, b):\n    return a + b"


@pytest.fixture(autouse=True)
def _all_walls(monkeypatch):
    monkeypatch.delenv("KIBITZ_UNSAFE_CODE", raising=False)


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
        ("import fcntl, os\nfcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, os.getppid())", "PermissionError"),
        ("import fcntl, os\nfcntl.fcntl(os.pipe()[0], 15, bytes(8))", "PermissionError"),  # F_SETOWN_EX
        ("import fcntl, os\nfcntl.fcntl(os.pipe()[0], 10, 9)", "PermissionError"),  # F_SETSIG
        ("import fcntl, os\nfcntl.fcntl(os.pipe()[0], fcntl.F_SETFL, os.O_ASYNC)", "PermissionError"),
        ("import fcntl, os\nfcntl.fcntl(os.open('.', 0), 1026, 1)", "PermissionError"),  # F_NOTIFY
        ("import fcntl, os\nfcntl.fcntl(os.pipe()[0], 1031, 1 << 20)", "PermissionError"),  # F_SETPIPE_SZ
        ("import fcntl, os\nfcntl.fcntl(open('a', 'w'), 1024, 1)", "PermissionError"),  # F_SETLEASE
        *(
            (f"import fcntl, socket\nfcntl.ioctl(socket.socketpair()[0], {request}, bytes(8))", "PermissionError")
            for request in (0x8901, 0x8902, 0x5452, 0x5412, 0x541C)
        ),  # FIOSETOWN, SIOCSPGRP, FIOASYNC, TIOCSTI, TIOCLINUX
        ("import socket\nsocket.socketpair(socket.AF_NETLINK)", "PermissionError"),
        *(
            (f"import ctypes\nassert ctypes.CDLL(None).syscall({call}, 0, 0, 0, 0, 0) >= 0", "AssertionError")
            for call in (
                *(
                    101,
                    129,
                    157,
                    200,
                    222,
                    240,
                    244,
                    250,
                    272,
                    297,
                    298,
                    310,
                    311,
                    312,
                    319,
                    321,
                    323,
                    424,
                    425,
                    434,
                    437,
                ),
                *(0x40000000 | 72, 0x40000000 | 520),
            )
        ),  # x86_64: ptrace, rt_sigqueueinfo, prctl, tkill, timer_create, mq_open and _notify, keyctl, rt_tgsigqueueinfo,
        # perf_event_open, process_vm_*, kcmp, memfd_create, bpf, userfaultfd, pidfd_*, io_uring_setup, openat2; x32
        ("import os\nos.open('.', os.O_TMPFILE | os.O_RDWR)", "PermissionError"),
        ("import os\nopen('a', 'w').close()\nos.remove('a')", "PermissionError"),
        ("import os\nopen('a', 'w').close()\nos.rename('a', 'b')", "PermissionError"),
        ("import os\nopen('a', 'w').close()\nopen('b', 'w').close()\nos.replace('a', 'b')", "PermissionError"),
        ("import sysconfig\nopen(sysconfig.get_path('purelib') + '/README.txt')", "FileNotFoundError PermissionError"),
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
    verdict = judge(program, [{"input": "", "output": ""}], limits)
    assert not verdict.passed
    with pytest.raises(ValueError, match=reason):
        raise ValueError(verdict.reason)


SIGNALS = {
    "fcntl": "r, w = os.pipe()\nfor command, value in ((8, PID), (10, 9), (4, 0x2000)):\n  try: fcntl.fcntl(r, command, value)\n"
    "  except OSError: pass\nos.write(w, b'x')",
    "ioctl": "a, b = socket.socketpair()\nfor request, value in ((0x8901, PID), (0x5452, 1)):\n"
    "  try: fcntl.ioctl(a, request, struct.pack('i', value))\n  except OSError: pass\nb.send(b'x')",
}


@pytest.mark.parametrize("way", SIGNALS)
@pytest.mark.parametrize("layers", ["both", "Landlock", "seccomp"])
def test_no_signal_reaches_another_process(way, layers, monkeypatch, tmp_path):
    """Nor if one of the two layers that stop it were away."""
    source = sandbox.SCRIPT.read_text()
    if layers == "Landlock":
        source = source.replace('("seccomp", restrict_system_calls)', '("seccomp", lambda: None)')
    elif layers == "seccomp":
        source = source.replace("version < 4 else 16 if version < 6 else 24", "version < 4 else 16")
    assert (layers == "both") == (source == sandbox.SCRIPT.read_text())
    (tmp_path / "confined.py").write_text(source)
    monkeypatch.setattr(sandbox, "SCRIPT", tmp_path / "confined.py")
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as victim:
        try:
            for number in (victim.pid, -victim.pid):
                program = (
                    "import fcntl, os, socket, struct\n" + SIGNALS[way].replace("PID", str(number)) + "\nprint('sent')"
                )
                assert sandbox.run({"source": program}, b"", SLOW).output == b"sent\n"
            until(lambda: "sleep" in status(victim.pid))
            time.sleep(0.2)
            assert victim.poll() is None
        finally:
            victim.kill()


def test_files_without_a_name_do_not_escape_the_count(tmp_path, monkeypatch):
    """Each file of 1 MB would be alive by one mapped page."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    program = (
        "import mmap, os\nalive = []\nfor i in range(400):\n"
        "  f = os.open(f'f{i}', os.O_RDWR | os.O_CREAT)\n  os.write(f, bytes(1 << 20))\n"
        "  alive.append(mmap.mmap(f, 4096, access=mmap.ACCESS_READ))\n  os.close(f)\n"
        "  try: os.unlink(f'f{i}')\n  except OSError: pass\nprint('filled')"
    )
    outcome = sandbox.run({"source": program}, b"", SLOW)
    assert outcome.stopped == sandbox.FULL and list(tmp_path.iterdir()) == []


def test_what_a_program_writes_before_its_tests_are_ready_counts(tmp_path, monkeypatch):
    """A program begins while the interpreter of its tests, here one that never comes to an end of it, still starts. That it
    shrinks its files behind the look which found too much is no help: there is one such look here."""
    script = shutil.copytree(sandbox.SCRIPT.parent, tmp_path / "inside") / sandbox.SCRIPT.name
    waits = 'import time\n    time.sleep(600 * (b\'"role": "tests"\' in os.pread(0, 64, 0)))\n    main()'
    before, _, after = script.read_text().rpartition("main()")
    script.write_text(before + waits + after)
    monkeypatch.setattr(sandbox, "SCRIPT", script)
    is_full, found = sandbox._folder_is_full, []

    def seen_once(folder, limits) -> bool:
        found.append(not any(found) and is_full(folder, limits))
        return found[-1]

    monkeypatch.setattr(sandbox, "_folder_is_full", seen_once)
    fill = f"import time\nfor n in range(24): open(str(n), 'wb').write(bytes(1 << 20))\ntime.sleep(600)\n{ADD}"
    job = {"tests": ["assert add(1, 2) == 3"], "names": ["add"], "modules": []}
    assert sandbox.run_tests(fill, job, SLOW).stopped == sandbox.FULL


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
    numbers = [int(n) for task in Path(f"/proc/{pid}/task").iterdir() for n in said_by(task / "children").split()]
    return [n for n in numbers if "confined.py" in said_by(Path(f"/proc/{n}/cmdline"))]


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
    return said_by(Path(f"/proc/{pid}/status"))


def said_by(path: Path) -> str:
    """What the system says of a process or a thread; nothing of one that ended meanwhile."""
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def until(condition):
    deadline = time.monotonic() + 300
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
