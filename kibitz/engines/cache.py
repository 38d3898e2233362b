"""Decoders ask an HF model for the next logits: with a preallocated KV cache, or with none at all.

A `Decoder` keeps rows of tokens; the row's slot of a token is its position. The engine decides which rows exist;
rows 0..N-1 are the live ones. It first puts all but the last token of each prompt into rows (`prefill`), and then
feeds every live row its pending token (`step`), so a fresh row needs no special case.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

PREFILL_TOKENS = 16384  # the most tokens, padding included, in one forward pass over prompts: bounds its memory


class Rows(Protocol):
    """The operations on rows that every decoder has."""

    def start(self, num_rows: int, num_slots: int) -> None:
        """Make room. Called at the beginning of a `generate`."""
        ...

    def prefill(self, ids_GP: Tensor, prompt_R: Tensor, row_R: Tensor) -> None:
        """Put right-padded token ids into rows: row `row_R[i]` gets `ids_GP[prompt_R[i]]`, from position 0 on.

        The padding is written too. It does no harm: a slot is written again before a query may look at it."""
        ...

    def move(self, source_M: Tensor, target_M: Tensor) -> None:
        """Copy rows over others."""
        ...

    def stop(self) -> None:
        """Let go of the memory."""
        ...


class Decoder(Rows, Protocol):
    def step(self, token_N: Tensor, position_N: Tensor, num_slots: int) -> Tensor:
        """Append a token to each of the rows 0..N-1; logits [N, V] of the next ones. Positions are < num_slots."""
        ...


def prefill(decoder: Rows, prefixes: Sequence[tuple[int, ...]], first_row: int, device: torch.device) -> None:
    """Prefixes into the rows from `first_row` on, each read once however many rows share it, those of similar length
    together."""
    rows_of: dict[tuple[int, ...], list[int]] = {}
    for row, prefix in enumerate(prefixes, first_row):
        if prefix:
            rows_of.setdefault(prefix, []).append(row)
    left = sorted(rows_of, key=len, reverse=True)
    while left:
        size = max(1, PREFILL_TOKENS // len(left[0]))
        group, left = left[:size], left[size:]
        ids_GP = torch.zeros(len(group), len(group[0]), dtype=torch.long)
        for index, prefix in enumerate(group):
            ids_GP[index, : len(prefix)] = torch.tensor(prefix)
        pairs = [(index, row) for index, prefix in enumerate(group) for row in rows_of[prefix]]
        prompt_R, row_R = torch.tensor(pairs, device=device).unbind(1)
        decoder.prefill(ids_GP.to(device), prompt_R, row_R)


class SlotCache(Cache):
    """A `transformers` cache in which every row has its own length: keys and values in [rows, heads, slots, dim].

    It returns views, never copies. What a row may see is decided by the mask alone, so a caller must pass 4-D masks.
    Buffers start as zeros because a masked slot still takes part in the sum, with weight 0, and 0 * NaN is NaN.
    """

    def __init__(self, num_rows: int, num_slots: int):
        super().__init__(layers=[])
        self.num_rows = num_rows
        self.num_slots = num_slots
        self.buffers: dict[int, tuple[Tensor, Tensor]] = {}
        self._prefill: tuple[Tensor, Tensor] | None = None
        self._decode: tuple[Tensor, Tensor, int] | None = None

    def will_prefill(self, prompt_R: Tensor, row_R: Tensor) -> None:
        self._prefill, self._decode = (prompt_R, row_R), None

    def will_decode(self, row_N: Tensor, position_N: Tensor, num_slots: int) -> None:
        self._prefill, self._decode = None, (row_N, position_N, num_slots)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The keys and values that the queries of this forward pass look at: of the prompts alone, or of all slots."""
        if layer_idx not in self.buffers:
            self.buffers[layer_idx] = (self._room(key_states), self._room(value_states))
        keys, values = self.buffers[layer_idx]
        if self._prefill is not None:
            prompt_R, row_R = self._prefill
            length = key_states.shape[2]
            keys[row_R, :, :length] = key_states[prompt_R]
            values[row_R, :, :length] = value_states[prompt_R]
            return key_states, value_states
        assert self._decode is not None, "a SlotCache must be told what the next forward pass is"
        row_N, position_N, num_slots = self._decode
        keys[row_N, :, position_N] = key_states[:, :, 0]
        values[row_N, :, position_N] = value_states[:, :, 0]
        return keys[: len(row_N), :, :num_slots], values[: len(row_N), :, :num_slots]

    def _room(self, states: Tensor) -> Tensor:
        _, heads, _, dim = states.shape
        return states.new_zeros(self.num_rows, heads, self.num_slots, dim)

    def move(self, source_M: Tensor, target_M: Tensor) -> None:
        for pair in self.buffers.values():
            for buffer in pair:
                buffer[target_M] = buffer[source_M]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        raise NotImplementedError("a SlotCache has rows of many lengths: pass a 4-D attention mask")


class CachedDecoder:
    """Drives any HF model whose attention takes a 4-D mask and a cache object. Full and sliding-window layers."""

    def __init__(self, model: PreTrainedModel):
        config = model.config.get_text_config()
        self.model = model
        self.window = getattr(config, "sliding_window", None)
        self.layer_types = set(getattr(config, "layer_types", None) or ())
        unknown = self.layer_types - {"full_attention", "sliding_attention"}
        if unknown:
            raise NotImplementedError(f"layers of type {', '.join(sorted(unknown))}")
        self.keep_last = {"logits_to_keep": 1} if selects_logits(model) else {}
        # Of a mixture of experts that asks for its load-balancing loss, which takes no 4-D mask.
        self.options = {"output_router_logits": False} if getattr(config, "output_router_logits", False) else {}
        self.cache = SlotCache(0, 0)

    def start(self, num_rows: int, num_slots: int) -> None:
        self.cache = SlotCache(num_rows, num_slots)
        self.row_R = torch.arange(num_rows, device=self.model.device)
        self.slot_S = torch.arange(num_slots, device=self.model.device)

    def prefill(self, ids_GP: Tensor, prompt_R: Tensor, row_R: Tensor) -> None:
        self.cache.will_prefill(prompt_R, row_R)
        self._forward(ids_GP, self.slot_S[None, : ids_GP.shape[1]], ids_GP.shape[1])

    def step(self, token_N: Tensor, position_N: Tensor, num_slots: int) -> Tensor:
        self.cache.will_decode(self.row_R[: len(token_N)], position_N, num_slots)
        return self._forward(token_N[:, None], position_N[:, None], num_slots)[:, -1]

    def _forward(self, ids_NQ: Tensor, position_NQ: Tensor, num_slots: int) -> Tensor:
        outputs = self.model(
            input_ids=ids_NQ,
            attention_mask=self._masks(position_NQ, num_slots),
            position_ids=position_NQ.expand(ids_NQ.shape),
            past_key_values=self.cache,
            use_cache=True,
            **self.keep_last,
            **self.options,
        )
        return outputs.logits

    def _masks(self, position_NQ: Tensor, num_slots: int) -> Tensor | dict[str, Tensor]:
        slot_S = self.slot_S[:num_slots]
        seen = slot_S <= position_NQ[:, None, :, None]  # [N, 1, Q, S]
        if self.window is None or (self.layer_types and "sliding_attention" not in self.layer_types):
            return self._as_the_model_likes(seen)
        near = self._as_the_model_likes(seen & (slot_S > position_NQ[:, None, :, None] - self.window))
        if not self.layer_types:
            return near
        return {"full_attention": self._as_the_model_likes(seen), "sliding_attention": near}

    def _as_the_model_likes(self, seen: Tensor) -> Tensor:
        if self.model.config._attn_implementation == "sdpa":
            return seen
        dtype = self.model.dtype
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)

    def move(self, source_M: Tensor, target_M: Tensor) -> None:
        self.cache.move(source_M, target_M)

    def stop(self) -> None:
        self.cache = SlotCache(0, 0)


class PlainDecoder:
    """Recomputes the whole sequence for each token: slow, and right for every causal model, recurrent ones too.

    Padding stands on the right, where a causal model cannot see it, and so needs no mask.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.select = selects_logits(model)

    def start(self, num_rows: int, num_slots: int) -> None:
        self.ids_RS = torch.zeros(num_rows, num_slots, dtype=torch.long, device=self.model.device)

    def prefill(self, ids_GP: Tensor, prompt_R: Tensor, row_R: Tensor) -> None:
        self.ids_RS[row_R, : ids_GP.shape[1]] = ids_GP[prompt_R]

    def step(self, token_N: Tensor, position_N: Tensor, num_slots: int) -> Tensor:
        row_N = torch.arange(len(token_N), device=token_N.device)
        self.ids_RS[row_N, position_N] = token_N
        ids_NS = self.ids_RS[: len(token_N), :num_slots]
        if not self.select:
            return self.model(input_ids=ids_NS, use_cache=False).logits[row_N, position_N]
        last_U, which_N = position_N.unique(return_inverse=True)
        return self.model(input_ids=ids_NS, use_cache=False, logits_to_keep=last_U).logits[row_N, which_N]

    def move(self, source_M: Tensor, target_M: Tensor) -> None:
        self.ids_RS[target_M] = self.ids_RS[source_M]

    def stop(self) -> None:
        del self.ids_RS


def selects_logits(model: PreTrainedModel) -> bool:
    """Return whether the forward pass can skip the logits that nobody reads. peft hides that it can."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters


FIXED_ROTATIONS = ("default", "linear", "llama3", "yarn", "proportional")
"""Kinds of rotary factors that do not depend on a text's length, whatever their configuration calls original."""


def switches(model: PreTrainedModel, longest: int) -> list[int]:
    """The lengths below `longest` at which a model may begin to compute something else: the ends of windows and chunks of
    local attention, and where rotary factors change. Architectures name them in their own ways."""
    found: set[int] = set()
    sections = [model.config.get_text_config().to_dict()]
    while sections:
        section = sections.pop()
        kind = section.get("rope_type", section.get("type", ""))
        for name, value in section.items():
            if isinstance(value, dict):
                sections.append(value)
            elif type(value) is int and 0 < value < longest and "layers" not in name:
                rotary = name == "original_max_position_embeddings" and kind not in FIXED_ROTATIONS
                if rotary or "window" in name or "chunk" in name:
                    found.add(value)
    return sorted(found)


def decoder_error(decoder: Decoder, model: PreTrainedModel, vocab_size: int, longest: int = 0) -> float:
    """Root mean square error of a decoder's log-probs relative to their spread, on random rows of unequal progress: of the
    worst of a few short rows and of two rows beyond each switch of texts of up to `longest` tokens.

    Relative, because the log-probs of a freshly initialised model are nearly equal and would agree with anything.
    """

    def step_by_step(ids: Sequence[Tensor], starts: Sequence[int], num: int) -> Tensor:
        got = []
        for step in range(num):
            position_N = ids[0].new_tensor(starts) + step
            token_N = torch.stack([ids_L[start + step] for ids_L, start in zip(ids, starts, strict=True)])
            got.append(decoder.step(token_N, position_N, int(position_N.max()) + 1)[:, :vocab_size])
        return torch.stack(got, dim=1)

    return worst_error(decoder, model, vocab_size, longest, _short_error(decoder, model, vocab_size), step_by_step)


def worst_error(
    decoder: "Rows", model: PreTrainedModel, vocab_size: int, longest: int, short: float, read: Callable[..., Tensor]
) -> float:
    """The larger of `short` and the errors of two rows beyond each switch of texts of up to `longest` tokens, NaN if one is.
    `read(ids, starts, num)` gives the decoder's logits of the last `num` tokens of each row, [N, num, V]."""
    errors = [short]
    for switch in switches(model, longest):
        ids, starts = rows_across(switch, longest, vocab_size, model)
        num = len(ids[0]) - starts[0]
        decoder.start(2, len(ids[0]))
        for row, (ids_L, start) in enumerate(zip(ids, starts, strict=True)):
            if start > 0:
                decoder.prefill(ids_L[None, :start], ids_L.new_tensor([0]), ids_L.new_tensor([row]))
        got_NQV = read(ids, starts, num)
        decoder.stop()
        want = [last_logits(model, ids_L, num)[:, :vocab_size] for ids_L in ids]
        errors.append(relative_error(got_NQV, torch.stack(want)))
    return torch.tensor(errors).max().item()


def rows_across(
    switch: int, longest: int, vocab_size: int, model: PreTrainedModel
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """Two random rows, and where in each the tokens begin that a check steps through, to its end: one as far behind the
    switch as the switch is from the beginning, one from before the switch to behind it."""
    length = min(longest, 2 * switch + 8)
    num = min(8, length)
    starts = (length - num, max(0, min(switch - num // 2, length - num)))
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(vocab_size, (start + num,), generator=generator).to(model.device) for start in starts]
    return (ids[0], ids[1]), starts


def last_logits(model: PreTrainedModel, ids_L: Tensor, num: int) -> Tensor:
    """The logits `[num, V]` of the last tokens of one row, by a plain forward pass."""
    options = {"logits_to_keep": num} if selects_logits(model) else {}
    return model(input_ids=ids_L[None], use_cache=False, **options).logits[0, -num:]


def relative_error(got: Tensor, want: Tensor) -> float:
    """The root mean square difference of the log-probs of two `[..., V]` of logits, relative to the spread of the second."""
    got, want = got.float().log_softmax(-1), want.float().log_softmax(-1)
    spread = want - want.mean(-1, keepdim=True)
    return ((got - want).square().mean() / spread.square().mean()).sqrt().item()


def _short_error(decoder: Decoder, model: PreTrainedModel, vocab_size: int) -> float:
    """The error on three rows of a dozen tokens, or beyond a sliding window of up to 64; one row leaves meanwhile."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None) or 0
    length = min(2 * window + 8 if window <= 64 else 12, getattr(config, "max_position_embeddings", None) or 12)
    ids_GL = torch.randint(vocab_size, (3, length), generator=torch.Generator().manual_seed(0)).to(model.device)
    want_GLV = model(input_ids=ids_GL, use_cache=False).logits[..., :vocab_size]
    prompt_N = torch.tensor([2, 0, 1], device=model.device)
    position_N = torch.tensor([length // 2, length // 4, 0], device=model.device)
    decoder.start(4, length)
    decoder.prefill(ids_GL[:, : length // 2], prompt_N, torch.arange(3, device=model.device))
    got, want = [], []
    for step in range(length - length // 2):
        if step == 2:  # the first row leaves, the last one takes its place
            decoder.move(torch.tensor([2], device=model.device), torch.tensor([0], device=model.device))
            prompt_N, position_N = prompt_N[[2, 1]], position_N[[2, 1]]
        num_slots = int(position_N.max()) + 1
        got.append(decoder.step(ids_GL[prompt_N, position_N], position_N, num_slots)[:, :vocab_size])
        want.append(want_GLV[prompt_N, position_N])
        position_N = position_N + 1
    decoder.stop()
    return relative_error(torch.cat(got), torch.cat(want))
