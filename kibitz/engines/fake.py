"""An engine without a model, for tests of everything behind it: a table of bigrams, or responses from a script.

Same rules as the real ones: order of rollouts, seeds, stop tokens, cut-off, log-probs of what was really sampled.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kibitz.engines import OnReady, nobody_waits
from kibitz.engines.sampling import row_seed, sample, uniforms
from kibitz.ledger import Count, uncounted
from kibitz.types import Prompt, Rollout, Sampling

Script = Callable[[Prompt, int], Sequence[int]]


class FakeEngine:
    """`FakeEngine(logits_VV)` draws each token from the row of the token before it, so that every probability of a
    response can be computed by hand. `FakeEngine(script=...)` answers with `script(prompt, sample)` instead, cut at the
    first stop token and at `max_tokens`; a script is certain of itself, its log-probs are 0.

    `calls` keeps what `generate` was asked, `num_syncs` how often new weights were announced. No model is read, so that
    nothing is counted.
    """

    def __init__(self, logits_VV: Tensor | None = None, script: Script | None = None):
        if logits_VV is not None and script is None:
            self._write = partial(_draw, logits_VV)
        elif script is not None and logits_VV is None:
            self._write = partial(_recite, script)
        else:
            raise ValueError("a FakeEngine needs either a table of bigram logits or a script")
        self.calls: list[tuple[list[Prompt], Sampling]] = []
        self.num_syncs = 0

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, on_ready: OnReady = nobody_waits, count: Count = uncounted
    ) -> list[Rollout]:
        self.calls.append((list(prompts), sampling))
        rollouts = []
        for prompt in prompts:
            written = [self._answer(prompt, index, sampling) for index in range(sampling.num_samples)]
            on_ready(written)
            rollouts += written
        return rollouts

    def sync(self, student: Any) -> None:
        self.num_syncs += 1

    def metrics(self) -> dict[str, Any]:
        return {}

    def close(self) -> None: ...

    def _answer(self, prompt: Prompt, index: int, sampling: Sampling) -> Rollout:
        ids, logps = self._write(prompt, index, sampling)
        finished = bool(ids) and ids[-1] in sampling.stop_ids
        return Rollout(prompt, ids, torch.tensor(logps, dtype=torch.float32), finished, sample=index)


def _recite(script: Script, prompt: Prompt, index: int, sampling: Sampling) -> tuple[list[int], list[float]]:
    ids: list[int] = []
    for token in script(prompt, index)[: sampling.max_tokens]:
        ids.append(token)
        if token in sampling.stop_ids:
            break
    return ids, [0.0] * len(ids)


def _draw(logits_VV: Tensor, prompt: Prompt, index: int, sampling: Sampling) -> tuple[list[int], list[float]]:
    seed = torch.tensor([row_seed(sampling.seed, prompt.key, index)])
    ids, logps, last = [], [], prompt.ids[-1]
    for uniform in uniforms(seed, torch.arange(sampling.max_tokens)):
        token_N, logp_N = sample(logits_VV[last][None], uniform[None], sampling)
        last = int(token_N)
        ids.append(last)
        logps.append(logp_N.item())
        if last in sampling.stop_ids:
            break
    return ids, logps
