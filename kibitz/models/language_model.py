"""A Hugging Face model as student or teacher: one body, one output head, one vocabulary."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial, wraps
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from kibitz.batching import without_padding
from kibitz.config import RecipeError
from kibitz.losses.balance import load_balance
from kibitz.losses.products import speed_up
from kibitz.models import lora, quantized
from kibitz.models.flops import PassFlops, flops_of, num_experts
from kibitz.models.head import body_of, build_head, keep_float32
from kibitz.models.layers import compile_layers, recomputable
from kibitz.models.progress import no_progress_bars
from kibitz.models.rotary import hold_rotations
from kibitz.signals import Batch
from kibitz.types import Prompt, Rollout

T = TypeVar("T")

CHUNK_NUMBERS = 2**25
"""Logits that exist at one time: 128 MiB in float32, of which an exact divergence needs about ten such tensors."""


@dataclass(frozen=True)
class Placement:
    """The device that a model computes on, and the context inside which its weights are resident there: weights that are
    offloaded lie in host memory otherwise."""

    device: torch.device
    resident: Callable[[], AbstractContextManager[None]] = nullcontext


class FolderWriter(Protocol):
    """Writes the weights of a model that no process holds whole; `weights` gathers them, one at a time."""

    def __call__(self, folder: Path) -> object: ...
    def weights(self) -> Iterator[tuple[str, Tensor]]: ...


class LanguageModel(nn.Module):
    """A causal language model and its tokenizer, in eval mode always: dropout would make the student disagree with
    the log-probabilities that it sampled with.

    `adapter` is the LoRA part of `model`, if that alone is trained; `placement` is None where the weights stay on
    `model.device`; `writer` writes the weights of `save` into a folder; a `packed` model reads rows without padding
    (`kibitz.models.packing`); a `compiled` one compiles each layer's forward and backward pass, not the engine's steps.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        name: str = "model",
        adapter: lora.Adapter | None = None,
        *,
        placement: Placement | None = None,
        writer: FolderWriter | None = None,
        packed: bool = False,
        compiled: bool = False,
    ):
        super().__init__()
        self.model = model.eval()
        self.tokenizer: Any = tokenizer  # a PreTrainedTokenizerBase, whose methods return unions of everything
        self.name, self.adapter, self.packed = name, adapter, packed
        self.placement, self._writer = placement, writer
        self.vocab_size: int = min(num_ids(tokenizer), model.get_input_embeddings().weight.shape[0])
        if self.max_positions is not None:
            self.read_up_to(self.max_positions)
        keep_float32(model.get_output_embeddings())
        with self.loaded():
            self.head, self.head_stands_alone = build_head(model, self.vocab_size, name)
        if compiled:
            compile_layers(model)
        elif self.device.type == "cpu":
            speed_up(model)

    @property
    def device(self) -> torch.device:
        """The device that the model computes on."""
        return self.model.device if self.placement is None else self.placement.device

    def loaded(self) -> AbstractContextManager[None]:
        """A context inside which the weights are on `device`; contexts may be nested."""
        return nullcontext() if self.placement is None else self.placement.resident()

    @property
    def max_positions(self) -> int | None:
        """The longest sequence, in tokens, that the configuration allows; None where it sets no limit."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def chunk_tokens(self) -> int:
        """The number of tokens whose logits are computed at one time."""
        return max(16, CHUNK_NUMBERS // self.vocab_size)

    @property
    def num_parameters(self) -> int:
        return sum(map(quantized.num_numbers, self.model.parameters()))

    @property
    def num_trainable(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    @contextmanager
    def adapter_off(self) -> Iterator[None]:
        """A context inside which the model and its head are the base model: the same weights without the LoRA update."""
        if self.adapter is None:
            raise ValueError(f"the {self.name} has no adapter that could be switched off: write student.lora")
        adapted = self.head
        self.head = adapted.without_adapter()
        try:
            with self.adapter.off():
                yield
        finally:
            self.head = adapted

    def save(self, folder: Path) -> None:
        """Write a Hugging Face folder: the model (with LoRA only the adapter, in peft's format), where responses end, and the
        tokenizer."""
        write = self._writer or (self.model.save_pretrained if self.adapter is None else self.adapter.save)
        with no_progress_bars():
            write(folder)
            if self.adapter is not None:
                quantized.record(self.model, folder)
            if self.adapter is not None and self.model.generation_config is not None:
                self.model.generation_config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter whole, with its name; of a model in parts each is gathered when its turn comes."""
        if self._writer is not None:
            return self._writer.weights()
        return ((name, parameter.detach()) for name, parameter in self.model.named_parameters())

    def hidden(self, ids_BL: Tensor, position_BL: Tensor | None = None) -> Tensor:
        """The last hidden states `[B, L, D]` of right-padded rows, which need no attention mask in a causal model. Where
        positions restart at 0 inside a row, another sequence begins there (packed models only)."""
        return self._states(self._read(ids_BL, position_BL))

    def _read(self, ids_BL: Tensor, position_BL: Tensor | None, **wanted: bool) -> Any:
        positions = {} if position_BL is None else {"position_ids": position_BL}
        with self.loaded():
            return self._body()(ids_BL, use_cache=False, **positions, **wanted)

    def _states(self, output: Any) -> Tensor:
        return output.last_hidden_state if self.head_stands_alone else output.logits

    def _body(self) -> Any:
        return body_of(self.model) if self.head_stands_alone else self.model

    def cut_vocabulary(self, size: int) -> None:
        """Give no probability to tokens from the id `size` on."""
        self.vocab_size = self.head.vocab_size = min(size, self.vocab_size)

    def read_up_to(self, longest: int) -> None:
        """Take the rotary factors of a text of `longest` tokens for every text, where the architecture chooses them by a text's
        length. A new model takes those of `max_positions`."""
        hold_rotations(self.model, longest)

    def pack_rows(self, packed: bool) -> None:
        """Read rows without padding from now on, or with it. `kibitz.models.packing` says whether a model can."""
        self.packed = packed

    def round_like(self, student: "LanguageModel") -> None:
        """Read to the same bits as `student` where the two are equal. torch chooses how to multiply by a matrix by whether it
        requires a gradient, under `no_grad` too: a frozen Jamba would differ from the one that learns by rounding, which Adam
        turns into steps as long as any other. So what the student's parameters require, those of this model require."""
        if type(self.model) is not type(student.model):
            return
        learnt = {name for name, parameter in student.model.named_parameters() if parameter.requires_grad}
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in learnt and parameter.is_floating_point())

    def materialize(self, fill: Callable[[nn.Module], None], device: torch.device) -> None:
        """Finish a model whose parameters are on the meta device: allocate them on `device`, let `fill` write the
        weights, and check on them whether the head can be called alone."""
        self._apply(lambda t: torch.empty_like(t, device=device) if t.device.type == "meta" else t.to(device))
        self.model.tie_weights()
        fill(self.model)
        if device.type == "cpu":
            speed_up(self.model)
        with torch.no_grad():
            self.head, self.head_stands_alone = self.within(lambda: build_head(self.model, self.vocab_size, self.name))

    def enclose_passes(self, before: Callable[[], None]) -> None:
        """Make every forward pass one of this module and call `before` ahead of each. Engines call the bare model, and
        FSDP gathers the parameters around its layers (embedding, norm, head) only in this module's forward pass."""
        bare: Callable[..., Any] = self.model.forward
        inside = False

        def begin(*_: Any) -> None:
            nonlocal inside
            before()
            inside = True

        def end(*_: Any) -> None:
            nonlocal inside
            inside = False

        @wraps(bare)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return bare(*args, **kwargs) if inside else self.within(lambda: bare(*args, **kwargs))

        self.register_forward_pre_hook(begin, prepend=True)
        self.register_forward_hook(end, always_call=True)
        self.model.forward = forward

    def recompute_activations(self) -> None:
        """Activation checkpointing: keep only the input of each layer and recompute the rest in the backward pass."""
        layers: list[Any] = recomputable(self.model)
        if not layers:
            raise ValueError(
                f"optim.checkpointing: {type(self.model).__name__} has no layers that can be recomputed: leave it out"
            )
        ids_BL = torch.arange(min(8, self.vocab_size), device=self.device)[None]
        with torch.no_grad():
            before = self.within(lambda: self.hidden(ids_BL))
            for layer in layers:
                layer.gradient_checkpointing = layer.training = True  # wanted together; dropout has a flag of its own
                again: Any = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
                layer._gradient_checkpointing_func = again
            same = torch.equal(before, self.within(lambda: self.hidden(ids_BL)))
        if not same:
            raise ValueError(
                f"optim.checkpointing: {type(self.model).__name__} computes something else then (dropout?): leave it out"
            )

    def within(self, work: Callable[[], T]) -> T:
        """The result of `work`, called inside a forward pass, where FSDP has gathered the weights around the layers."""
        return self(None, lambda *_: work())

    def forward(self, batch: Batch | None, use: Callable[..., T], balanced: bool = False) -> T:
        """The result of `use(hidden_TD, head)` on the positions that score response tokens. The loss runs in here,
        where FSDP has gathered the output head. A `balanced` pass of a model with a `balance` is
        `use(hidden_TD, head, balance_T)`: the load-balancing loss of each token's row, times its coefficient."""
        if batch is None:
            return use(None, self.head)
        wanted = {"output_router_logits": True} if balanced and self.balance > 0 else {}
        if self.packed:
            ids_BL, position_BL, place = without_padding(batch.ids_BL, batch.length_B)
            output = self._read(ids_BL, position_BL, **wanted)
            hidden_TD = self._states(output)[0, place[batch.position_T]]
        else:
            output = self._read(batch.ids_BL, None, **wanted)
            hidden_TD = self._states(output).flatten(0, 1)[batch.position_T]
        if not wanted:
            return use(hidden_TD, self.head)
        return use(hidden_TD, self.head, self._balance(output.router_logits, batch))

    @cached_property
    def balance(self) -> float:
        """The coefficient of the load-balancing loss, where the configuration asks for one (`output_router_logits`) and
        transformers would add it; 0 otherwise."""
        config = self.model.config.get_text_config()
        known = hasattr(sys.modules[type(self.model).__module__], "load_balancing_loss_func")
        asked = known and getattr(config, "output_router_logits", False)
        return float(getattr(config, "router_aux_loss_coef", 0.0) or 0.0) if asked else 0.0

    def _balance(self, router_logits: Sequence[Tensor], batch: Batch) -> Tensor:
        num_rows, length = batch.ids_BL.shape
        row_BL = torch.arange(num_rows, device=self.device)[:, None].expand(num_rows, length)
        real_BL = torch.arange(length, device=self.device) < batch.length_B[:, None]
        row_N = row_BL[real_BL] if self.packed else row_BL.masked_fill(~real_BL, -1).flatten()
        _, top_k = num_experts(self.model.config.get_text_config())
        layers = [logits.flatten(0, -2) for logits in router_logits]
        return self.balance * load_balance(layers, row_N, num_rows, top_k)[batch.position_T // length]

    def pass_flops(self, rollouts: Sequence[Rollout]) -> float:
        """The FLOPs of one forward pass over these prompts and responses, without padding."""
        lengths = [len(r.prompt.ids) + r.num_tokens for r in rollouts]
        return self.forward_flops(sum(lengths), sum(n * n for n in lengths), sum(r.num_tokens for r in rollouts))

    def forward_flops(self, num_positions: int, num_squared: int, num_scored: int) -> float:
        """FLOPs (multiply-adds x 2) of one forward pass: body on all positions, causal attention (`num_squared` = the sum of
        squared lengths), head on the scored positions. A backward pass costs twice as many."""
        return self._flops.of(num_positions, num_squared, num_scored)

    @cached_property
    def _flops(self) -> PassFlops:
        return flops_of(self.model)

    def check_lengths(self, prompts: Sequence[Prompt], max_tokens: int) -> None:
        """Raise ValueError if a prompt and a response of `max_tokens` exceed `max_positions`, or the model has no row for a
        token of a prompt."""
        rows = self.model.get_input_embeddings().weight.shape[0]
        for prompt in prompts:
            if max(prompt.ids, default=0) >= rows:
                raise ValueError(
                    f"data: the prompt {prompt.key} holds the token {max(prompt.ids)}, and the {self.name} has rows for "
                    f"{rows}: leave it out, or choose a model that has it"
                )
        longest, room = max(len(prompt.ids) for prompt in prompts), self.max_positions
        if room is None or longest + max_tokens <= room:
            return
        where = f"the longest prompt has {longest} tokens and the {self.name} has {room} positions"
        if longest < room:
            raise RecipeError(f"rollout.max_tokens: {where}: write rollout.max_tokens={room - longest} or less")
        raise RecipeError(f"data: {where}: leave out long prompts")


def num_ids(tokenizer: Any) -> int:
    """One more than the largest id: `len` counts the tokens, and some tokenizers leave ids out."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))
