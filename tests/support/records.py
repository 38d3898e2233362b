"""Made-up records of experiments, as runs write them."""

from pathlib import Path

from kibitz.experiments import records


def record(arm: str, lr: float, seed: int, dev: float, test: float | None = None, **more) -> dict:
    """As a run writes it, with accuracies in the place of a run."""

    def measured(share: float, num: int) -> dict:
        return {
            "num_prompts": num,
            "sampled": {"accuracy": share},
            "greedy": {"accuracy": share},
            "reverse_kl": 1 - share,
        }

    found = {"arm": arm, "lr": lr, "seed": seed, "settings": {}, "dev": measured(dev, 512)}
    found |= {"commit": "c0ffee", "date": "2026-11-22T10:00:00", "machine": "toy", "threads": 1, "cpu_seconds": 2.0}
    flops = {"student_training": 3e9, "student_sampling": 1e9, "teacher_scoring": 2e9, "opponent_training": 5e9}
    found |= {"flops": flops, **more}
    return found | ({} if test is None else {"test": measured(test, 100)})


def put(folder: Path, *found: dict) -> Path:
    for one in found:
        records.write(folder / f"{records.name_of(one['arm'], one['lr'], one['seed'])}.json", one)
    return folder
