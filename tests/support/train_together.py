"""What torchrun starts in a test: one run after another, from a JSON file of `kibitz.train` arguments and of what goes wrong.

A job's `signal` names a step and the signal that the first process sends itself after it; `at` names a step, a file and a text,
which is written there when that step begins; `told` is where each process writes with which error its run ended, and which
threads are left.
"""

import gc
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_forward_hook

import kibitz
from kibitz.parallel import sharded_files
from kibitz.training.trainer import NullProgress


def main() -> None:
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        if job.get("stand_in"):
            sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
            from support.receiver import stand_in

            stand_in()
        if "peak" in job:
            with peak_of_tensors() as peak:
                train(job)
            Path(f"{job['peak']}-{os.environ['RANK']}.json").write_text(json.dumps(peak[0]))
        elif "told" in job:
            Path(f"{job['told']}-{os.environ['RANK']}.json").write_text(json.dumps(failure(job)))
        else:
            train(job)
    print("process", os.environ["RANK"], "done", flush=True)


def train(job: dict) -> kibitz.Run:
    """The grader depends on the text alone and gives many different rewards."""
    return kibitz.train(
        job["recipe"],
        resume=job["resume"],
        grader=lambda prompt, text: (sum(map(ord, prompt.text + text)) % 7) / 6,
        progress=Troubled(job),
    )


class Troubled(NullProgress):
    """Brings a job's trouble about, in the process that watches."""

    def __init__(self, job: dict):
        self.signal, self.at, self.begun = job.get("signal"), job.get("at"), 0

    def phase(self, name: str) -> None:
        self.begun += name == "rollouts"
        if self.at is not None and (name, self.begun) == ("rollouts", self.at[0]):
            Path(self.at[1]).write_text(self.at[2])

    def step(self, row: dict[str, Any]) -> None:
        if self.signal is not None and row["step"] == self.signal[0]:
            os.kill(os.getpid(), getattr(signal, self.signal[1]))


def failure(job: dict) -> dict[str, Any]:
    """The error of a run that fails, and the threads of kibitz that do not end."""
    try:
        train(job)
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  # the test looks at it
        found = {"type": type(error).__name__, "text": str(error)}
    else:
        found = {"type": None, "text": ""}
    until = time.monotonic() + 60
    while (left := [one.name for one in threading.enumerate() if one.name.startswith("kibitz")]) and (
        time.monotonic() < until
    ):
        time.sleep(0.05)
    return found | {"threads": left}


@contextmanager
def peak_of_tensors(every: int = 23) -> Iterator[list[int]]:
    """The most bytes that this process's tensors took: looked at whenever a layer has been computed, a part of a file been
    read or a file written, every so many times. Files are small here, for several to be written."""
    peak, calls, before = [0], 0, held()
    fill, save, size = sharded_files.fill, sharded_files.save_file, sharded_files.FILE_BYTES

    def look(always: bool = False) -> None:
        nonlocal calls
        calls += 1
        if always or calls % every == 0:
            peak[0] = max(peak[0], held() - before)

    def looking_fill(*args) -> None:
        fill(*args)
        look()

    def looking_save(*args, **kwargs) -> None:
        look(always=True)
        save(*args, **kwargs)

    hook = register_module_forward_hook(lambda module, *_: look() if "Layer" in type(module).__name__ else None)
    sharded_files.fill, sharded_files.save_file, sharded_files.FILE_BYTES = looking_fill, looking_save, 2**18
    try:
        yield peak
    finally:
        hook.remove()
        sharded_files.fill, sharded_files.save_file, sharded_files.FILE_BYTES = fill, save, size


def held() -> int:
    """Bytes of all tensors that Python can reach."""
    found = {}
    for one in gc.get_objects():
        if issubclass(type(one), torch.Tensor) and not issubclass(type(one), DTensor) and one.device.type == "cpu":
            found[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
    return sum(found.values())


if __name__ == "__main__":
    main()
