"""Problems and verifiers of the package reasoning-gym, for `bounded.py`, in a process that can do nothing but compute.

Some of its verifiers hand the text of a model to `eval` or to sympy's parser: whoever grades with them runs what a model wrote.
So every answer is judged behind the walls of `confined.py`: it reads no file of yours, writes none and reaches no network. The
problem is made there again from its number. Not guaranteed: a text that is code may tamper with the verdicts on later ones.
"""

import dataclasses
import difflib
import functools
import json
import os
import sys
import tempfile

import confined

MEMORY_BYTES, CPU_SECONDS = 4 << 30, 1 << 30
OURS = ("seed", "size")
"""Settings of a family that a recipe's seed and data.limit decide."""


def walls():
    """Load all families, and return what confines the process that answers."""
    import reasoning_gym  # noqa: F401

    folder = tempfile.mkdtemp(prefix="kibitz-")
    os.chdir(folder)
    os.rmdir(folder)  # where one may write, there is nothing to write into
    packages = [path for path in sys.path if os.path.isdir(path)]
    limits = {"cpu_seconds": CPU_SECONDS, "file_bytes": 0, "memory_bytes": MEMORY_BYTES}
    unsafe = os.environ.get("KIBITZ_UNSAFE_CODE") == "1"

    def confine():
        confined.PACKAGES_READ.extend(packages)
        missing = confined.confine(limits)
        if missing and not unsafe:
            MISSING.extend(missing)

    return confine


MISSING = []
"""Walls that this machine does not have."""


def family(name, options):
    """What is wrong with a family and its settings, as a sentence; nothing if they can be used."""
    from reasoning_gym.factory import DATASETS

    if MISSING:
        return (
            f"the verifiers of reasoning-gym run what a model wrote, and cannot be confined here: {'; '.join(MISSING)}. "
            "They need Linux 5.13 with Landlock and seccomp; write KIBITZ_UNSAFE_CODE=1 into the environment to run them without "
            "these walls where there is nothing to steal or break"
        )
    families = [known for known in DATASETS if known != "composite"]  # which makes problems of the others
    if name not in families:
        near = difflib.get_close_matches(str(name), families, n=1, cutoff=0.0)[0]
        return f"reasoning-gym has no family {name!r}; did you mean {near!r}? It has {len(families)}, such as chain_sum"
    fields = {field.name: field for field in dataclasses.fields(DATASETS[name][1])}
    for key, value in options.items():
        if key in OURS:
            return f"{key} is decided by the run's seed and data.limit: leave it out"
        if key not in fields:
            near = difflib.get_close_matches(key, [known for known in fields if known not in OURS], n=1, cutoff=0.0)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            return f"the family {name} has no setting {key!r}{hint}"
        if wrong := mistaken(fields[key], value):
            return f"{key} = {json.dumps(value)} is {wrong}"
    try:
        made(name, json.dumps(options, sort_keys=True), 0)
    except Exception as error:
        return f"the family {name} refuses these settings: {str(error)[:200] or type(error).__name__}"
    return None


def mistaken(field, value):
    """What a value should be, judged by the field's default; nothing if it fits or if there is none to judge by."""
    default = field.default
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "neither true nor false"
    if isinstance(default, int):
        return None if type(value) is int else "no whole number"
    if isinstance(default, float):
        return None if type(value) in (int, float) else "no number"
    if isinstance(default, str):
        return None if isinstance(value, str) else "no text"
    if isinstance(default, (list, tuple)):
        return None if isinstance(value, list) else "no list"
    return None


@functools.lru_cache(maxsize=4)
def made(name, options, seed):
    from reasoning_gym.factory import create_dataset

    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in json.loads(options).items()}
    return create_dataset(name, **settings, seed=seed, size=1 << 20)


@functools.lru_cache(maxsize=4096)
def entry(name, options, seed, index):
    return made(name, options, seed)[index]


def problems(name, options, seed, start, count):
    """Question and answer of some problems, in the order of their numbers; null for one that the family cannot make."""
    found, spelled = [], json.dumps(options, sort_keys=True)
    for index in range(start, start + count):
        try:
            one = made(name, spelled, seed)[index]
            found.append([one["question"], None if one["answer"] is None else str(one["answer"])])
        except Exception:
            found.append(None)
    return found


def verify(name, options, seed, index, question, text):
    """The score of an answer, from 0 to 1. A text on which the verifier stumbles is no answer."""
    one = entry(name, json.dumps(options, sort_keys=True), seed, index)
    if one["question"] != question:
        raise ValueError(f"the family {name} does not make the same problem {index} twice: choose another")
    try:
        return float(made(name, json.dumps(options, sort_keys=True), seed).score_answer(text, one))
    except Exception:
        return 0.0
