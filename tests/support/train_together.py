"""What torchrun starts in test_distributed.py: one run after another, from a JSON file of `kibitz.train` arguments."""

import gc
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_forward_hook

import kibitz
from kibitz.parallel import sharded_files


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
        else:
            train(job)
    print("process", os.environ["RANK"], "done", flush=True)


def train(job: dict) -> kibitz.Run:
    """The grader depends on the text alone and gives many different rewards."""
    return kibitz.train(
        job["recipe"], resume=job["resume"], grader=lambda prompt, text: (sum(map(ord, prompt.text + text)) % 7) / 6
    )


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
