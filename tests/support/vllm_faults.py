"""Servers that fail at one request, known by its seed, and that seed."""

from pathlib import Path

from support.vllm_stub import Stub

from kibitz.engines.completions import SEEDS
from kibitz.engines.sampling import row_seed
from kibitz.files import JSONL


def seed_of(folder: Path, step: int, place: int) -> int:
    """Of the request for a prompt of a step, counted from 0."""
    keys = list(
        dict.fromkeys(row["prompt_key"] for row in JSONL(folder / "stored.jsonl").read() if row["step"] == step + 1)
    )
    return row_seed(step, keys[place], 0) % SEEDS  # the seed of these recipes is 0


class Refusing(Stub):
    """Refuses the request with this seed."""

    seed = -1

    def answer(self, path, body):
        if path == "/v1/completions" and body["seed"] == self.seed:
            return 400, {"error": {"message": "this prompt is not for me"}}
        return super().answer(path, body)


class Restarted(Stub):
    """Dies at the request with this seed; what is asked of it after that finds nobody, until somebody brings weights, unless it
    `stays_dead`."""

    seed, stays_dead, down = -1, False, False
    times = 1

    def answer(self, path, body):
        if path == "/v1/completions" and body["seed"] == self.seed and self.times:
            self.times -= 1
            self.down = True
        if self.down and (path != "/collective_rpc" or self.stays_dead):
            return None
        self.down = False
        return super().answer(path, body)


class Replaced(Stub):
    """Loads the weights of its folder at the request with this seed, and nobody notices: no request fails."""

    seed = -1

    def answer(self, path, body):
        if path == "/v1/completions" and body["seed"] == self.seed:
            self.seed = -1
            with self._lock:
                self.model.model.load_state_dict(self.base, strict=False)
        return super().answer(path, body)
