"""The script inside the sandbox: it confines its process for good, then runs one program, or the tests of one.

`kibitz.graders.sandbox` starts this file as a script in a fresh interpreter; nothing imports it. Standard input
holds a job (ten digits of length, then JSON), and behind it what the program reads. The steps in their order:

1. read the job; 2. give up all rights, by limits, capabilities, Landlock and seccomp; 3. say `ready` on standard
error and close it, so that no program can pass its own failure off as one of the sandbox; 4. play the job's role:

- `output` runs a program that is judged by what it writes to standard output;
- `program` runs a program that answers, over two pipes, the calls of another process of this kind;
- `tests` runs tests that make such calls, and writes the verdict to standard output. No program runs there.
"""

import ctypes
import importlib
import json
import os
import platform
import resource
import site
import struct
import sys
import types

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SIGKILL = 9

# ------------------------------------------------------------------ giving up rights


def confine(limits):
    """Take every layer there is; the layers that there are not, each with its reason."""
    missing = []
    for name, layer in (
        ("resource limits", lambda: limit_resources(limits)),
        ("capabilities", drop_capabilities),
        ("Landlock", restrict_files),
        ("seccomp", restrict_system_calls),
    ):
        try:
            layer()
        except (OSError, AttributeError, ValueError, OverflowError, KeyError) as error:
            missing.append(f"{name} ({type(error).__name__}: {error})")
    return missing


def limit_resources(limits):
    cpu = limits["cpu_seconds"]
    for name, value in (
        ("RLIMIT_CORE", 0),
        ("RLIMIT_CPU", cpu),
        ("RLIMIT_FSIZE", limits["file_bytes"]),
        ("RLIMIT_NOFILE", 64),
        ("RLIMIT_NPROC", 0),  # does not bind root; seccomp does
        ("RLIMIT_AS", limits["memory_bytes"]),
    ):
        resource.setrlimit(getattr(resource, name), (value, value))


def drop_capabilities():
    """Root keeps its name and loses its powers, such as raising its own limits. Die with the parent."""
    header = struct.pack("=Ii", 0x20080522, 0)
    check(LIBC.capset(header, bytes(24)))
    check(LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    check(LIBC.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0))


LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
WRITE_FILE, READ_FILE, READ_DIR, MAKE_REG, TRUNCATE = (1 << bit for bit in (1, 2, 3, 8, 14))


SCOPE_ABSTRACT_SOCKET, SCOPE_SIGNAL = 1, 2
PACKAGES = ("site-packages", "dist-packages")
PACKAGES_READ = []
"""Folders of packages that may be read besides, by a process that runs no program of its own."""


def restrict_files():
    """Read Python's own library and the system's; read and write in the working directory, which stays flat. Nothing can be
    removed or replaced there: a file without a name would be on no list of those that count."""
    version = LIBC.syscall(LANDLOCK_CREATE, None, 0, 1)
    check(version)
    num_rights = {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)
    handled = (1 << num_rights) - 1
    attributes = struct.pack("=QQQ", handled, 3, SCOPE_ABSTRACT_SOCKET | SCOPE_SIGNAL)  # 3: TCP, bind and connect
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = LIBC.syscall(LANDLOCK_CREATE, attributes, size, 0)
    check(ruleset)
    for path in libraries():
        allow(ruleset, path, READ_FILE | READ_DIR)
    for path in ("/etc/ld.so.cache", "/dev/zero", "/dev/urandom"):
        allow(ruleset, path, READ_FILE)
    allow(ruleset, "/dev/null", READ_FILE | WRITE_FILE)
    allow(ruleset, ".", (READ_FILE | READ_DIR | WRITE_FILE | MAKE_REG | TRUNCATE) & handled)
    check(LIBC.syscall(LANDLOCK_RESTRICT, ruleset, 0))
    os.close(ruleset)


def libraries():
    """The standard library but for the packages that were installed into it, and the system's shared libraries."""
    standard = os.path.dirname(os.__file__)
    yield from (entry.path for entry in os.scandir(standard) if entry.name not in PACKAGES)
    for folder in (sys.base_prefix + "/lib", sys.base_prefix + "/lib64", "/lib", "/lib64", "/usr/lib", "/usr/lib64"):
        if os.path.isdir(folder):
            yield from (entry.path for entry in os.scandir(folder) if not entry.name.startswith("python"))
    yield "/usr/share/zoneinfo"
    yield from PACKAGES_READ


def allow(ruleset, path, rights):
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    if not os.path.isdir(path):
        rights &= READ_FILE | WRITE_FILE
    check(LIBC.syscall(LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", rights, place), 0))
    os.close(place)


# What one thread that computes, reads and writes may ask of the kernel: name, number on x86_64, on aarch64.
# No fork, no thread, no program, no socket, no signal to others, no mode or owner of a file, no shared memory.
SYSTEM_CALLS = """
read 0 63, write 1 64, close 3 57, stat 4 -, fstat 5 80, lstat 6 -, poll 7 -, lseek 8 62, mmap 9 222,
mprotect 10 226, munmap 11 215, brk 12 214, rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139,
pread64 17 67, pwrite64 18 68, readv 19 65, writev 20 66, access 21 -, pipe 22 -, select 23 -, sched_yield 24 124,
mremap 25 216, madvise 28 233, dup 32 23, dup2 33 -, pause 34 -, nanosleep 35 101, getitimer 36 102, alarm 37 -,
setitimer 38 103, getpid 39 172, sendfile 40 71, sendto 44 206, recvfrom 45 207, shutdown 48 210, getsockopt 55 209,
exit 60 93, uname 63 160, flock 73 32, fsync 74 82, fdatasync 75 83, ftruncate 77 46, getcwd 79 17,
chdir 80 49, fchdir 81 50, creat 85 -, readlink 89 -, gettimeofday 96 169, getrlimit 97 163,
getrusage 98 165, sysinfo 99 179, times 100 153, getuid 102 174, getgid 104 176, geteuid 107 175, getegid 108 177,
getppid 110 173, getpgrp 111 -, getgroups 115 158, getpgid 121 155, getsid 124 156, rt_sigpending 127 136,
rt_sigtimedwait 128 137, sigaltstack 131 132, arch_prctl 158 -, gettid 186 178, time 201 -, futex 202 98,
sched_getaffinity 204 123, getdents64 217 61, set_tid_address 218 96, restart_syscall 219 128, clock_gettime 228 113,
clock_getres 229 114, clock_nanosleep 230 115, exit_group 231 94, epoll_wait 232 -, epoll_ctl 233 21,
newfstatat 262 79, readlinkat 267 78, faccessat 269 48, pselect6 270 72, ppoll 271 73,
set_robust_list 273 99, get_robust_list 274 100, epoll_pwait 281 22, eventfd2 290 19, epoll_create1 291 20, dup3 292 24,
pipe2 293 59, preadv 295 69, pwritev 296 70, getrandom 318 278, membarrier 324 283, statx 332 291,
rseq 334 293
"""
# With conditions: numbers, then (argument, mask, values) of which all must hold. What is left out of `fcntl` and `ioctl` are
# the ways to have the kernel send a signal to any process when a file becomes ready (F_SETOWN, F_SETSIG, F_NOTIFY, O_ASYNC,
# FIOSETOWN, FIOASYNC), to type into a terminal, and to enlarge pipes. O_TMPFILE would make files that no folder lists.
# asyncio wakes itself through a socket pair; a stream can be connected to nothing else. A process may signal itself.
ALL_BITS, O_ASYNC, TMPFILE, AF_UNIX, SOCK_STREAM = 0xFFFFFFFF, 0x2000, 0x400000, 1, 1
F_SETFL = 4
FCNTL = (0, 1, 2, 3, 5, 6, 7, 1030, 1032)  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, locks, F_DUPFD_CLOEXEC, F_GETPIPE_SZ
IOCTL = (
    0x5401,
    0x802C542A,
    0x5413,
    0x541B,
    0x5421,
    0x5450,
    0x5451,
)  # TCGETS(2), TIOCGWINSZ, FIONREAD, FIONBIO, FIO(N)CLEX
OWN = "the number of this process"
CONDITIONAL_CALLS = (
    ((2, None), [(1, TMPFILE | O_ASYNC, (0,))]),  # open
    ((257, 56), [(2, TMPFILE | O_ASYNC, (0,))]),  # openat
    ((72, 25), [(1, ALL_BITS, FCNTL)]),
    ((72, 25), [(1, ALL_BITS, (F_SETFL,)), (2, O_ASYNC, (0,))]),
    ((16, 29), [(1, ALL_BITS, IOCTL)]),
    ((53, 199), [(0, ALL_BITS, (AF_UNIX,)), (1, 0xF, (SOCK_STREAM,))]),  # socketpair
    ((62, 129), [(0, ALL_BITS, (OWN,))]),  # kill
    ((234, 131), [(0, ALL_BITS, (OWN,))]),  # tgkill
)
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
FIRST_NEW_CALL = 424  # everything since 2019, and x32: the C library falls back to older calls when these are unknown
EPERM, ENOSYS = 1, 38
ALLOW, FAIL, KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
LOAD, JUMP_IF_EQUAL, JUMP_IF_AT_LEAST, AND, RETURN = 0x20, 0x15, 0x35, 0x54, 0x06


def restrict_system_calls():
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in call_filter(platform.machine(), os.getpid()))
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer))
    check(LIBC.prctl(PR_SET_SECCOMP, 2, program, 0, 0))


def call_filter(machine, pid):
    """A classic BPF program over `struct seccomp_data`: number at 0, architecture at 4, arguments from 16."""
    column, audit = ARCHITECTURES[machine]
    yield from [(LOAD, 0, 0, 4), (JUMP_IF_EQUAL, 1, 0, audit), (RETURN, 0, 0, KILL_PROCESS)]
    yield from [(LOAD, 0, 0, 0), (JUMP_IF_AT_LEAST, 0, 1, FIRST_NEW_CALL), (RETURN, 0, 0, FAIL | ENOSYS)]
    for entry in SYSTEM_CALLS.split(","):
        number = entry.split()[1 + column]
        if number != "-":
            yield from [(JUMP_IF_EQUAL, 0, 1, int(number)), (RETURN, 0, 0, ALLOW)]
    for numbers, conditions in CONDITIONAL_CALLS:
        if numbers[column] is not None:
            yield from conditional(numbers[column], conditions, pid)
    yield (RETURN, 0, 0, FAIL | EPERM)


def conditional(number, conditions, pid):
    """Allow one call if all its conditions hold; else go on behind this block, where others may allow it."""
    checks = [(LOAD, 0, 0, 0), (JUMP_IF_EQUAL, 0, "behind", number)]
    for argument, mask, values in conditions:
        checks += [(LOAD, 0, 0, 16 + 8 * argument), (AND, 0, 0, mask)]
        for left, value in zip(reversed(range(len(values))), values, strict=True):
            checks.append((JUMP_IF_EQUAL, left, 0 if left else "behind", pid if value is OWN else value))
    checks.append((RETURN, 0, 0, ALLOW))
    for place, (code, yes, no, value) in enumerate(checks):
        yield (code, yes, len(checks) - place - 1 if no == "behind" else no, value)


def check(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


# ------------------------------------------------------------------ running the program


def read_exactly(size):
    data = b""
    while len(data) < size:
        chunk = os.read(0, size - len(data))
        assert chunk, "the job is cut off"
        data += chunk
    return data


def run_program(source, name):
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(compile(source, "program.py", "exec"), module.__dict__)
    return module.__dict__


def main():
    job = json.loads(read_exactly(int(read_exactly(10))))
    role = job.get("role", "output")
    if role != "output":
        sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
        importlib.import_module("dialogue")
        del sys.path[0]
    missing = confine(job["limits"])
    if missing and not job["unsafe"]:
        sys.exit("; ".join(missing))
    os.write(2, ("ready " + "; ".join(missing)).encode())
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    site.setquit()
    if role == "output":
        run_program(job["source"], "__main__")
        return
    verdict, nowhere = os.dup(1), os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    dialogue = sys.modules["dialogue"]
    if role == "tests":
        dialogue.run_tests(job["tests"], job["names"], job["modules"], job["channel"], verdict)
    else:
        os.close(verdict)
        dialogue.serve(lambda: run_program(job["source"], "program"), job["channel"])


LIBC = ctypes.CDLL(None, use_errno=True)

if __name__ == "__main__":
    main()
