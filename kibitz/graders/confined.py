"""What runs inside the sandbox: confine this process for good, then run one program and its tests.

`kibitz.graders.sandbox` starts this file as a script in a fresh interpreter; nothing imports it. Standard input
holds a job (ten digits of length, then JSON), and behind it what the program reads. The steps in their order:

1. read the job; 2. give up all rights, by limits, capabilities, Landlock and seccomp; 3. say `ready` on standard
error and close it, so that no program can pass its own failure off as one of the sandbox; 4. run the program.

A program that is judged by its output writes to standard output. One that is judged by tests finds standard input
and output leading nowhere; the tests' results go to a copy of the pipe, each with the job's nonce.
"""

import ctypes
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
WRITE_FILE, READ_FILE, READ_DIR, REMOVE_FILE, MAKE_REG, TRUNCATE = (1 << bit for bit in (1, 2, 3, 5, 8, 14))


def restrict_files():
    """Read Python's own library and the system's; read and write in the working directory, which stays flat."""
    version = LIBC.syscall(LANDLOCK_CREATE, None, 0, 1)
    check(version)
    num_rights = {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)
    handled = (1 << num_rights) - 1
    ruleset = LIBC.syscall(LANDLOCK_CREATE, struct.pack("=Q", handled), 8, 0)
    check(ruleset)
    python = [os.path.dirname(os.__file__), sys.base_prefix + "/lib", sys.base_prefix + "/lib64"]
    for path in [*python, "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo"]:
        allow(ruleset, path, READ_FILE | READ_DIR)
    for path in ("/etc/ld.so.cache", "/dev/zero", "/dev/urandom"):
        allow(ruleset, path, READ_FILE)
    allow(ruleset, "/dev/null", READ_FILE | WRITE_FILE)
    allow(ruleset, ".", (READ_FILE | READ_DIR | WRITE_FILE | REMOVE_FILE | MAKE_REG | TRUNCATE) & handled)
    check(LIBC.syscall(LANDLOCK_RESTRICT, ruleset, 0))
    os.close(ruleset)


def allow(ruleset, path, rights):
    if not os.path.exists(path):
        return
    folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
    check(LIBC.syscall(LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", rights, folder), 0))
    os.close(folder)


# What one thread that computes, reads and writes may ask of the kernel: name, number on x86_64, on aarch64.
# No fork, no thread, no program, no socket, no signal to others, no mode or owner of a file, no shared memory.
SYSTEM_CALLS = """
read 0 63, write 1 64, open 2 -, close 3 57, stat 4 -, fstat 5 80, lstat 6 -, poll 7 -, lseek 8 62, mmap 9 222,
mprotect 10 226, munmap 11 215, brk 12 214, rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, ioctl 16 29,
pread64 17 67, pwrite64 18 68, readv 19 65, writev 20 66, access 21 -, pipe 22 -, select 23 -, sched_yield 24 124,
mremap 25 216, madvise 28 233, dup 32 23, dup2 33 -, pause 34 -, nanosleep 35 101, getitimer 36 102, alarm 37 -,
setitimer 38 103, getpid 39 172, sendfile 40 71, sendto 44 206, recvfrom 45 207, shutdown 48 210, getsockopt 55 209,
exit 60 93, uname 63 160, fcntl 72 25, flock 73 32, fsync 74 82, fdatasync 75 83, ftruncate 77 46, getcwd 79 17,
chdir 80 49, fchdir 81 50, rename 82 -, creat 85 -, unlink 87 -, readlink 89 -, gettimeofday 96 169, getrlimit 97 163,
getrusage 98 165, sysinfo 99 179, times 100 153, getuid 102 174, getgid 104 176, geteuid 107 175, getegid 108 177,
getppid 110 173, getpgrp 111 -, getgroups 115 158, getpgid 121 155, getsid 124 156, rt_sigpending 127 136,
rt_sigtimedwait 128 137, sigaltstack 131 132, arch_prctl 158 -, gettid 186 178, time 201 -, futex 202 98,
sched_getaffinity 204 123, getdents64 217 61, set_tid_address 218 96, restart_syscall 219 128, clock_gettime 228 113,
clock_getres 229 114, clock_nanosleep 230 115, exit_group 231 94, epoll_wait 232 -, epoll_ctl 233 21, openat 257 56,
newfstatat 262 79, unlinkat 263 35, renameat 264 38, readlinkat 267 78, faccessat 269 48, pselect6 270 72, ppoll 271 73,
set_robust_list 273 99, get_robust_list 274 100, epoll_pwait 281 22, eventfd2 290 19, epoll_create1 291 20, dup3 292 24,
pipe2 293 59, preadv 295 69, pwritev 296 70, renameat2 316 276, getrandom 318 278, membarrier 324 283, statx 332 291,
rseq 334 293
"""
# With a condition on one argument: (numbers, argument, mask, value). asyncio wakes itself through a socket pair; a
# stream can be connected to nothing else. A process may raise a signal in itself.
KILL, TGKILL, SOCKETPAIR = (62, 129), (234, 131), (53, 199)
SOCK_STREAM = 1
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
    for numbers, argument, mask, value in (
        (KILL, 0, 0xFFFFFFFF, pid),
        (TGKILL, 0, 0xFFFFFFFF, pid),
        (SOCKETPAIR, 1, 0xF, SOCK_STREAM),
    ):
        yield from [(JUMP_IF_EQUAL, 0, 5, numbers[column]), (LOAD, 0, 0, 16 + 8 * argument), (AND, 0, 0, mask)]
        yield from [(JUMP_IF_EQUAL, 0, 1, value), (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, FAIL | EPERM)]
    yield (RETURN, 0, 0, FAIL | EPERM)


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


def plain(value):
    """A value as JSON that tells lists from tuples and sets; subclasses become what they are made of, so that no
    `__eq__` of the program's reaches the comparison. TypeError for what is not plain."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    for name, kind in (("list", list), ("tuple", tuple), ("set", (set, frozenset))):
        if isinstance(value, kind):
            return {name: [plain(part) for part in value]}
    if isinstance(value, dict):
        return {"dict": [[plain(key), plain(part)] for key, part in value.items()]}
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    raise TypeError(f"a test got a {type(value).__name__}, which does not leave the sandbox")


def run_program(source, name):
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(compile(source, "program.py", "exec"), module.__dict__)
    return module


def run_tests(source, tests, nonce):
    """Every test must report; the first exception ends it all, SystemExit too. Builtins are those of before."""
    write, leave, dumps, encode = os.write, os._exit, json.dumps, plain
    untrace, unprofile = sys.settrace, sys.setprofile
    builtins = dict(vars(__import__("builtins")))
    results = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    namespace = {**run_program(source, "program").__dict__, "__builtins__": builtins}
    for number, (kind, test) in enumerate(tests):
        if kind == "value":
            result = dumps(encode(eval(compile(test, f"test {number}", "eval"), namespace)))
        else:
            exec(compile(test, f"test {number}", "exec"), namespace)
            result = "true"
        untrace(None)
        unprofile(None)
        line = f"{nonce} {number} {result}\n".encode()
        while line:
            line = line[write(results, line) :]
    leave(0)


def main():
    job = json.loads(read_exactly(int(read_exactly(10))))
    missing = confine(job["limits"])
    if missing and not job["unsafe"]:
        sys.exit("; ".join(missing))
    os.write(2, ("ready " + "; ".join(missing)).encode())
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    site.setquit()
    if job["tests"] is None:
        run_program(job["source"], "__main__")
    else:
        run_tests(job["source"], job["tests"], job["nonce"])


LIBC = ctypes.CDLL(None, use_errno=True)

if __name__ == "__main__":
    main()
