"""A model judges a block of drafted tokens in one forward pass over the new tokens of every row, on a KV cache.

To roll back is to do nothing. The slot of a token is its position, a query sees no slot behind its own position, and
what stands behind a rejected token is written over by the next block before a query may look at it.
"""

import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kibitz.engines.cache import (
    CachedDecoder,
    PlainDecoder,
    Rows,
    SlotCache,
    relative_error,
    worst_error,
)


class BlockDecoder(Rows, Protocol):
    def block(self, ids_NQ: Tensor, position_NQ: Tensor, num_slots: int) -> Tensor:
        """Write several tokens into each of the rows 0..N-1; logits [N, Q, V] of the token after each of them.

        Positions are < num_slots, and every slot below a row's first one has been written. A row of fewer tokens is
        filled up with its last token at its last position, which writes the same slot again."""
        ...


class BlockCache(SlotCache):
    """A slot cache into which a row may write several tokens at once."""

    def __init__(self, num_rows: int, num_slots: int):
        super().__init__(num_rows, num_slots)
        self.block: tuple[Tensor, Tensor, int] | None = None

    def will_prefill(self, prompt_R: Tensor, row_R: Tensor) -> None:
        super().will_prefill(prompt_R, row_R)
        self.block = None

    def will_read_block(self, row_N: Tensor, position_NQ: Tensor, num_slots: int) -> None:
        self.block = (row_N, position_NQ, num_slots)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self.block is None:
            return super().update(key_states, value_states, layer_idx)
        if layer_idx not in self.buffers:
            self.buffers[layer_idx] = (self._room(key_states), self._room(value_states))
        row_N, position_NQ, num_slots = self.block
        keys, values = (buffer[: len(row_N), :, :num_slots] for buffer in self.buffers[layer_idx])
        keys[row_N[:, None], :, position_NQ] = key_states.transpose(1, 2)
        values[row_N[:, None], :, position_NQ] = value_states.transpose(1, 2)
        return keys, values


class CachedBlocks:
    """Drives any HF model that a `CachedDecoder` can drive."""

    def __init__(self, model: PreTrainedModel):
        self.decoder = CachedDecoder(model)
        self.cache = BlockCache(0, 0)

    def start(self, num_rows: int, num_slots: int) -> None:
        self.decoder.start(num_rows, num_slots)
        self.decoder.cache = self.cache = BlockCache(num_rows, num_slots)

    def prefill(self, ids_GP: Tensor, prompt_R: Tensor, row_R: Tensor) -> None:
        self.decoder.prefill(ids_GP, prompt_R, row_R)

    def block(self, ids_NQ: Tensor, position_NQ: Tensor, num_slots: int) -> Tensor:
        self.cache.will_read_block(self.decoder.row_R[: len(ids_NQ)], position_NQ, num_slots)
        return self.decoder.model(
            input_ids=ids_NQ,
            attention_mask=self.decoder._masks(position_NQ, num_slots),
            position_ids=position_NQ,
            past_key_values=self.cache,
            use_cache=True,
            **self.decoder.options,
        ).logits

    def move(self, source_M: Tensor, target_M: Tensor) -> None:
        self.cache.move(source_M, target_M)

    def stop(self) -> None:
        self.decoder.stop()
        self.cache = BlockCache(0, 0)


class PlainBlocks:
    """Recomputes the whole sequence for each block: right for every causal model, recurrent ones too."""

    def __init__(self, model: PreTrainedModel):
        self.decoder = PlainDecoder(model)

    def start(self, num_rows: int, num_slots: int) -> None:
        self.decoder.start(num_rows, num_slots)

    def prefill(self, ids_GP: Tensor, prompt_R: Tensor, row_R: Tensor) -> None:
        self.decoder.prefill(ids_GP, prompt_R, row_R)

    def block(self, ids_NQ: Tensor, position_NQ: Tensor, num_slots: int) -> Tensor:
        row_N1 = torch.arange(len(ids_NQ), device=ids_NQ.device)[:, None]
        self.decoder.ids_RS[row_N1, position_NQ] = ids_NQ
        ids_NS = self.decoder.ids_RS[: len(ids_NQ), :num_slots]
        return self.decoder.model(input_ids=ids_NS, use_cache=False).logits[row_N1, position_NQ]

    def move(self, source_M: Tensor, target_M: Tensor) -> None:
        self.decoder.move(source_M, target_M)

    def stop(self) -> None:
        self.decoder.stop()


def choose_block_decoder(model: PreTrainedModel, vocab_size: int, longest: int = 0) -> BlockDecoder:
    """The one with a cache, if its logits equal those of a plain forward pass, on texts of up to `longest` tokens."""
    try:
        decoder = CachedBlocks(model)
        error = block_error(decoder, model, vocab_size, longest)
        if error < (1e-4 if model.dtype == torch.float32 else 5e-2):
            return decoder
        reason = f"its logits are off by {error:.1e} of their spread"
    except torch.OutOfMemoryError:
        raise
    except Exception as problem:  # noqa: BLE001 - a model may dislike the mask or the cache in any way; the warning tells
        reason = f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}"
    warnings.warn(
        f"{type(model).__name__} cannot judge drafts with a KV cache ({reason}); every block recomputes its whole "
        "sequence, which is right but slow",
        stacklevel=4,
    )
    return PlainBlocks(model)


def block_error(decoder: BlockDecoder, model: PreTrainedModel, vocab_size: int, longest: int = 0) -> float:
    """Root mean square error of a decoder's log-probs relative to their spread: of the worst of a few short rows and of two
    rows beyond each switch of texts of up to `longest` tokens."""

    def at_once(ids: Sequence[Tensor], starts: Sequence[int], num: int) -> Tensor:
        position_NQ = ids[0].new_tensor(starts)[:, None] + torch.arange(num, device=model.device)
        token_NQ = torch.stack([ids_L[-num:] for ids_L in ids])
        return decoder.block(token_NQ, position_NQ, len(ids[0]))[..., :vocab_size]

    return worst_error(decoder, model, vocab_size, longest, _short_error(decoder, model, vocab_size), at_once)


def _short_error(decoder: BlockDecoder, model: PreTrainedModel, vocab_size: int) -> float:
    """The error on three rows of a dozen tokens, or beyond a sliding window of up to 64, that are rolled back after each
    block."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None) or 0
    length = min(2 * window + 8 if window <= 64 else 12, getattr(config, "max_position_embeddings", None) or 12)
    generator = torch.Generator().manual_seed(0)
    ids_NL, junk_NL = torch.randint(vocab_size, (2, 3, length), generator=generator).to(model.device)
    want_NLV = model(input_ids=ids_NL, use_cache=False).logits[..., :vocab_size]
    row_N = torch.arange(3, device=model.device)
    start_N = torch.tensor([length // 2, length // 4, 0], device=model.device)
    decoder.start(3, length)
    decoder.prefill(ids_NL[:, : length // 2], row_N, row_N)
    got, want = [], []
    while int(start_N.max()) + 2 < length:
        position_NQ = start_N[:, None] + torch.arange(3, device=model.device)
        for tokens_NL in (junk_NL, ids_NL):
            logits_NQV = decoder.block(tokens_NL[row_N[:, None], position_NQ], position_NQ, int(position_NQ.max()) + 1)
        got.append(logits_NQV[..., :vocab_size].flatten(0, 1))
        want.append(want_NLV[row_N[:, None], position_NQ].flatten(0, 1))
        start_N = start_N + 2
    decoder.stop()
    return relative_error(torch.cat(got), torch.cat(want))


def rank(logits_NQV: Tensor, token_NQ: Tensor) -> Tensor:
    """Return how many tokens come before this one, `[N, Q]`. Of equal logits the lower id comes first, so that exactly K
    tokens have a rank below K: in bfloat16 equal logits are common. Among NaNs every rank is V, which no K lets pass."""
    logit_NQ1 = logits_NQV.gather(-1, token_NQ[..., None])
    id_V = torch.arange(logits_NQV.shape[-1], device=logits_NQV.device)
    behind_NQV = (logits_NQV < logit_NQ1) | (logits_NQV == logit_NQ1) & (id_V >= token_NQ[..., None])
    return logits_NQV.shape[-1] - behind_NQV.sum(-1)
