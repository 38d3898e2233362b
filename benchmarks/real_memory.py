"""Where the memory of a step goes with a real language model: the parts that arithmetic knows, and the peak of each phase.

    python benchmarks/real_memory.py STUDENT TEACHER [--rows 16] [--tokens 48] [A.B=VALUE]...

STUDENT and TEACHER are folders, such as those that `make real` leaves in runs/real. Two steps of on-policy distillation, because
the optimizer's moments come with the first; peaks are the largest resident set of the process in each phase (run.json).
"""

import argparse
import json
import tempfile
from pathlib import Path

MIB = 2**20
FLOAT = 4  # bytes


def main() -> None:
    options = _options()
    import kibitz
    from kibitz import config
    from kibitz.experiments.real import write_instructions

    with tempfile.TemporaryDirectory() as name:
        prompts = write_instructions(Path(name) / "prompts") / "train.jsonl"
        tree = {
            "student": {"model": options.student},
            "teacher": {"model": options.teacher},
            "data": {"prompts": str(prompts)},
            "method": {"type": "opd"},
            "rollout": {"prompts_per_step": options.rows, "samples_per_prompt": 1, "max_tokens": options.tokens},
            "optim": {"lr": 1e-4},
            "steps": 2,
            "eval": {"every": 0, "num_prompts": 1, "heatmaps": 0},
            "threads": 1,
            "device": "cpu",
            "output": f"{name}/run",
        }
        run = kibitz.train(config.load(tree, options.settings), overwrite=True)
        info = json.loads((run.folder / "run.json").read_text(encoding="utf-8"))
    ours, theirs = FLOAT * info["student_params"], FLOAT * info["teacher_params"]
    parts = {
        "weights of the teacher": theirs,
        "weights of the student": ours,
        "its gradient": ours,
        "AdamW's two moments": 2 * ours,
    }
    for what, size in (parts | {"together": sum(parts.values())}).items():
        print(f"{what:<24} {size / MIB:>7,.0f} MiB")
    for phase, size in info["peak_bytes"].items():
        print(f"peak, {phase:<18} {size / MIB:>7,.0f} MiB")
    for phase, seconds in run.metrics[-1]["seconds"].items():
        print(f"second step, {phase:<11} {seconds:>7.1f} s")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student")
    parser.add_argument("teacher")
    parser.add_argument(
        "settings", nargs="*", metavar="A.B=VALUE", help="of the recipe, such as optim.chunk_tokens=170"
    )
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48, help="of a response, at most")
    return parser.parse_args()


if __name__ == "__main__":
    main()
