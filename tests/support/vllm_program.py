"""A program that stands in for vLLM's server, in a process of its own: `vllm_program.py -m MODULE --model FOLDER --uds PATH ...`.

It answers by `vllm_stub.Stub`, wants the key that it was given, and has an engine beside it in a session of its own, which
ignores SIGTERM, as the worst of real ones do. Its arguments, processes and environment stand in a file of `KIBITZ_TEST_FOLDER`,
and files there tell it what it does wrong at which request: see `Misbehaves`.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ENGINE = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"


def program(folder: Path) -> str:
    """An executable that takes the arguments of a Python and runs this program instead of a module."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__).resolve()}" "$@"\n')
    path.chmod(0o755)
    return str(path)


class Misbehaves:
    """Bends answers: `die-NAME` in the folder holds a path, at whose next request the server called NAME kills itself, once;
    `hang-NAME` the same, but it stops answering."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name

    def __call__(self, path: str, answer: Any) -> Any:
        with (self.folder / f"{self.name}.asked").open("a") as file:
            file.write(path + "\n")
        for fault in ("die", "hang"):
            told = self.folder / f"{fault}-{self.name}"
            if told.exists() and told.read_text() == path:
                told.unlink()
                if fault == "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(600)
        return answer


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("--model", "--uds", "--served-model-name"):
        parser.add_argument(name)
    known, _ = parser.parse_known_args(sys.argv[3:])
    name, folder = Path(known.uds).stem, Path(os.environ["KIBITZ_TEST_FOLDER"])
    engine = subprocess.Popen([sys.executable, "-c", ENGINE], start_new_session=True)
    mine = {
        "pids": [os.getpid(), engine.pid],
        "arguments": sys.argv,
        "key": os.environ.get("VLLM_API_KEY"),
        "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "dev": os.environ.get("VLLM_SERVER_DEV_MODE"),
    }
    with (folder / f"{name}.started").open("a") as file:
        file.write(json.dumps(mine) + "\n")
    if (folder / f"fail-{name}").exists():
        sys.exit("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB")
    import torch
    from support.vllm_stub import Stub

    torch.set_num_threads(1)
    with Stub(Path(known.model), name=known.served_model_name, bend=Misbehaves(folder, name), path=known.uds) as stub:
        stub.key = mine["key"]
        signal.pause()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
