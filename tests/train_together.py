"""What torchrun starts in test_distributed.py: one run after another, from a JSON file of `kibitz.train` arguments."""

import json
import os
import sys
from pathlib import Path

import torch

import kibitz


def main() -> None:
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        train(job)
    print("process", os.environ["RANK"], "done", flush=True)


def train(job: dict) -> kibitz.Run:
    """The grader depends on the text alone and gives many different rewards."""
    return kibitz.train(
        job["recipe"], resume=job["resume"], grader=lambda prompt, text: (sum(map(ord, prompt.text + text)) % 7) / 6
    )


if __name__ == "__main__":
    main()
