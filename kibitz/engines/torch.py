"""The embedded engine: samples from the student itself, in the same process, with the same weights.

Token ids in, token ids out; it knows no text. Rows have lengths of their own: a finished row leaves the batch at once
and a waiting one takes its place. The model is driven by the first decoder that agrees with plain forward passes:
fused, cached, or, loudly, one that recomputes everything for each token.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kibitz.engines import OnReady, nobody_waits
from kibitz.engines.asked import Student, check_prompts, check_sampling, longest_text
from kibitz.engines.cache import CachedDecoder, Decoder, PlainDecoder, decoder_error, prefill, switches
from kibitz.engines.fused import FusedDecoder
from kibitz.engines.packed import PackedDecoder, packable
from kibitz.engines.room import laid_out_bytes, num_rows
from kibitz.engines.rounded import RoundedDecoder, require, require_kernel
from kibitz.engines.sampling import row_seed, sample, uniforms
from kibitz.ledger import Count, uncounted
from kibitz.models.rotary import hold_rotations, holds_rotations
from kibitz.types import Prompt, Rollout, Sampling, give_back_freed

LARGE = 64 * 2**20
"""Bytes of matrices laid out anew, from which on memory that was freed is given back around them."""


class TorchEngine:
    """Continuous batching over a Hugging Face causal model.

    The memory for keys and values is `max_rows` times the longest prompt plus `max_tokens`; on a GPU there are no more rows than
    fit. Dropout is off while it writes. The weights are the student's own, so that nothing can be stale. `rounded`: products
    are in bfloat16, for a float32 student on a CPU; raise ValueError for another.
    """

    def __init__(self, student: Student, max_rows: int = 256, rounded: bool = False):
        if max_rows < 1:
            raise ValueError(f"the engine needs room for at least one row, and max_rows is {max_rows}")
        if rounded:
            require_kernel(student.device, student.model.dtype)
        self.rounded = rounded
        self.student = student
        self.max_rows = max_rows
        self._decoder: Decoder | None = None
        self._checked: PreTrainedModel | None = None
        self._longest: float = 0  # the length up to which the decoder was checked

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, on_ready: OnReady = nobody_waits, count: Count = uncounted
    ) -> list[Rollout]:
        """The rollouts, prompt by prompt. `logp_T` is under the truncated, tempered distribution that was sampled
        from; with temperature 0 it is that of the likeliest token at temperature 1."""
        check_sampling(sampling)
        check_prompts(prompts, sampling, self.student)
        if not prompts:
            return []
        jobs = [(prompt, index) for prompt in prompts for index in range(sampling.num_samples)]
        longest = longest_text(prompts, sampling)
        chosen, most = self.decoder(longest), min(self.max_rows, len(jobs))
        with _without_gradients(chosen), evaluating(self.student.model):
            decoder = self._packed(chosen)
            rows = num_rows(most, self.student.model, self.student.device, longest, self.student.vocab_size)
            with self._room():
                decoder.start(rows, longest)
                try:
                    rollouts = _Flight(decoder, jobs, sampling, rows, self.student, on_ready).run()
                finally:
                    decoder.stop()
        count(self.student, rollouts)
        return rollouts

    def sync(self, student: Student) -> None:
        """Nothing to copy: the engine reads the student's weights. A student of another architecture is checked anew."""
        self.student = student

    def metrics(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        """Nothing to give back: the weights are the student's."""

    def decoder(self, longest: int = 0) -> Decoder:
        """The decoder for the student's model on texts of up to `longest` tokens. It is chosen when the model object is first
        seen, and checked again where longer texts reach a window or another switch that it has not crossed yet."""
        model = self.student.model
        if self._decoder is None or model is not self._checked or self._unchecked(model, longest):
            if not holds_rotations(model):  # a bare model: a LanguageModel holds them for its run
                hold_rotations(model, longest)
            with torch.no_grad(), evaluating(model):
                self._decoder = choose_decoder(model, self.student.vocab_size, longest)
                if self.rounded:
                    require(model, self._rounded(self._decoder), self.student.vocab_size, longest)
            self._checked, self._longest = model, longest
        return self._decoder

    @contextmanager
    def _room(self) -> Iterator[None]:
        """A context for matrices that are laid out anew while it writes, once at least: what training has freed is given back
        before, and they themselves behind."""
        once = laid_out_bytes(self.student.model, adapted=True)
        large = self.student.device.type == "cpu" and once >= LARGE
        if large:
            give_back_freed()
        yield
        if large:
            give_back_freed()

    def _packed(self, decoder: Decoder) -> Decoder:
        """The decoder with its matrices in the layout of a CPU's kernels, where there are such."""
        if self.student.device.type != "cpu":
            return decoder
        return self._rounded(decoder) if self.rounded else PackedDecoder(decoder, self._linears(decoder))

    def _rounded(self, decoder: Decoder) -> RoundedDecoder:
        return RoundedDecoder(decoder, self._linears(decoder))

    def _linears(self, decoder: Decoder) -> Callable[[], Iterator[nn.Linear]]:
        modules = decoder.linears if isinstance(decoder, FusedDecoder) else self.student.model.modules
        return lambda: packable(modules())

    def _unchecked(self, model: PreTrainedModel, longest: int) -> bool:
        if longest <= self._longest or isinstance(self._decoder, PlainDecoder):
            return False
        return len(switches(model, longest)) > len(switches(model, int(self._longest)))

    def use(self, decoder: Decoder) -> None:
        """Take this decoder for the student's present model, unchecked."""
        self._decoder, self._checked, self._longest = decoder, self.student.model, float("inf")


# ------------------------------------------------------------------ rows in flight


class _Flight:
    """The rows of one `generate`: 0..num_live-1 are live, and stay together at the front. A token of any row that is drawn in
    the n-th step stands in column n modulo `max_tokens`."""

    def __init__(
        self,
        decoder: Decoder,
        jobs: list[tuple[Prompt, int]],
        sampling: Sampling,
        num_rows: int,
        student: Student,
        on_ready: OnReady,
    ):
        self.on_ready = on_ready
        self.decoder, self.jobs, self.sampling, self.num_rows = decoder, jobs, sampling, num_rows
        self.device, self.vocab_size = student.device, student.vocab_size
        self.rollouts: dict[int, Rollout] = {}
        self.num_live = self.num_started = self.num_steps = 0
        self.job_R = [0] * num_rows
        self.shift_R = [0] * num_rows  # position of the pending token minus num_steps: constant while a row lives
        self.begin_R = [0] * num_rows  # num_steps when the row began
        self.max_tokens = sampling.max_tokens
        self.token_R = self._tensor([0] * num_rows)  # pending: written, and not yet seen by the model
        self.position_R = torch.zeros_like(self.token_R)
        self.uniform_RT = torch.zeros(num_rows, self.max_tokens, dtype=torch.float64, device=self.device)
        self.id_RT = torch.zeros_like(self.uniform_RT, dtype=torch.long)
        self.logp_RT = torch.zeros_like(self.uniform_RT, dtype=torch.float32)
        self.stop_ids = frozenset(sampling.stop_ids)

    def run(self) -> list[Rollout]:
        while self.num_live or self.num_started < len(self.jobs):
            self.admit()
            if done := self.step():
                self.release(done)
        return [self.rollouts[job] for job in range(len(self.jobs))]

    def admit(self) -> None:
        """Start waiting jobs, several at once: a forward pass over one prompt costs nearly as much as over many."""
        waiting = len(self.jobs) - self.num_started
        num_new = min(self.num_rows - self.num_live, waiting)
        if num_new == 0 or (self.num_live and num_new < min(waiting, self.num_rows // 8)):
            return
        first, rows = self.num_started, range(self.num_live, self.num_live + num_new)
        jobs = self.jobs[first : first + num_new]
        new = slice(rows.start, rows.stop)
        for row, (prompt, _) in zip(rows, jobs, strict=True):
            self.job_R[row] = first + row - rows.start
            self.shift_R[row] = len(prompt.ids) - 1 - self.num_steps
            self.begin_R[row] = self.num_steps
        self.token_R[new] = self._tensor([prompt.ids[-1] for prompt, _ in jobs])
        self.position_R[new] = self._tensor([len(prompt.ids) - 1 for prompt, _ in jobs])
        seed_N = self._tensor([row_seed(self.sampling.seed, prompt.key, index) for prompt, index in jobs])
        place_T = (torch.arange(self.max_tokens, device=self.device) - self.num_steps) % self.max_tokens
        self.uniform_RT[new] = uniforms(seed_N[:, None], place_T)
        prefill(self.decoder, [prompt.ids[:-1] for prompt, _ in jobs], rows.start, self.device)
        self.num_started += num_new
        self.num_live += num_new

    def step(self) -> list[int]:
        """One more token for every live row; which rows are done with it."""
        live, column = self.num_live, self.num_steps % self.max_tokens
        num_slots = max(self.shift_R[:live]) + self.num_steps + 1
        logits_NV = self.decoder.step(self.token_R[:live], self.position_R[:live], num_slots)[:, : self.vocab_size]
        token_N, logp_N = sample(logits_NV, self.uniform_RT[:live, column], self.sampling)
        self.id_RT[:live, column] = token_N
        self.logp_RT[:live, column] = logp_N
        self.token_R[:live] = token_N
        self.position_R[:live] += 1
        self.num_steps += 1
        full = self.num_steps - self.max_tokens
        pairs = enumerate(zip(token_N.tolist(), self.begin_R, strict=False))
        return [row for row, (token, begin) in pairs if token in self.stop_ids or begin == full]

    def release(self, done: list[int]) -> None:
        """Hand out the rollouts of finished rows, and close the gaps with the last live rows."""
        done_M = self._tensor(done)
        ids_MT, logp_MT = self.id_RT[done_M].tolist(), self.logp_RT[done_M].tolist()
        with torch.inference_mode(False), torch.no_grad():
            for row, ids_T, logp_T in zip(done, ids_MT, logp_MT, strict=True):
                self.rollouts[self.job_R[row]] = self._rollout(row, ids_T, logp_T)
            self.on_ready([self.rollouts[self.job_R[row]] for row in done])
        gone, kept = set(done), self.num_live - len(done)
        targets = [row for row in done if row < kept]
        sources = [row for row in range(kept, self.num_live) if row not in gone]
        self.num_live = kept
        if targets:
            self._move(sources, targets)

    def _rollout(self, row: int, ids_T: list[int], logp_T: list[float]) -> Rollout:
        """The rollout of a finished row, whose first token stands in the column of the step that it began at."""
        (prompt, index), begin = self.jobs[self.job_R[row]], self.begin_R[row]
        first, count = begin % self.max_tokens, self.num_steps - begin
        response, logp = (ids_T[first:] + ids_T[:first])[:count], (logp_T[first:] + logp_T[:first])[:count]
        if not all(map(isfinite, logp)):
            raise ValueError(
                f"the student's logits were not finite while it answered prompt {prompt.key!r}: its weights have "
                "diverged or overflow their dtype; lower the learning rate, clip gradients, or use bfloat16 or float32"
            )
        return Rollout(
            prompt, response, torch.tensor(logp, dtype=torch.float32), response[-1] in self.stop_ids, sample=index
        )

    def _move(self, sources: list[int], targets: list[int]) -> None:
        for source, target in zip(sources, targets, strict=True):
            for state in (self.job_R, self.shift_R, self.begin_R):
                state[target] = state[source]
        source_M, target_M = self._tensor(sources), self._tensor(targets)
        for state in (self.token_R, self.position_R, self.uniform_RT, self.id_RT, self.logp_RT):
            state[target_M] = state[source_M]
        self.decoder.move(source_M, target_M)

    def _tensor(self, values: list) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)


# ------------------------------------------------------------------ which decoder


def choose_decoder(model: PreTrainedModel, vocab_size: int, longest: int = 0) -> Decoder:
    """The fastest decoder whose logits equal those of a plain forward pass, on texts of up to `longest` tokens."""
    tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2
    reason = ""
    for build in (FusedDecoder, CachedDecoder):
        try:
            decoder = build(model)
            error = decoder_error(decoder, model, vocab_size, longest)
        except torch.OutOfMemoryError:
            raise
        except Exception as problem:  # noqa: BLE001 - a model may dislike the mask or the cache in any way; the warning tells
            reason = f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}"
            continue
        if error < tolerance:
            return decoder
        reason = f"its logits are off by {error:.1e} of their spread"
    warnings.warn(
        f"{type(model).__name__} cannot be driven with the engine's KV cache ({reason}); every token recomputes its "
        "whole sequence, which is right but slow. For long responses use the vLLM engine",
        stacklevel=4,
    )
    return PlainDecoder(model)


def _without_gradients(decoder: Decoder) -> AbstractContextManager[Any]:
    """torch's fastest mode for a decoder that calls nothing of the model's but its matrices: what is made in that mode can
    never be trained with, and a model may keep what it makes."""
    return torch.inference_mode() if isinstance(decoder, FusedDecoder) else torch.no_grad()


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Dropout off, and attention by a kernel that takes the 4-D masks of rows of many lengths: flash and flex attention do
    not. Every module's own mode and kernel are given back afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    kernels = [(config, config._attn_implementation) for config in _with_other_kernels(model)]
    for config, _ in kernels:
        config._attn_implementation_internal = "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for config, kernel in kernels:
            config._attn_implementation_internal = kernel


def _with_other_kernels(model: PreTrainedModel) -> list[Any]:
    """The configurations of a model and its parts whose attention takes no 4-D mask."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    return [
        one for one in configs.values() if getattr(one, "_attn_implementation", None) not in (None, "sdpa", "eager")
    ]
