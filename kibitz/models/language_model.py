"""A Hugging Face model as student or teacher: one body, one output head, one vocabulary."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from kibitz.batching import without_padding
from kibitz.config import RecipeError
from kibitz.models import lora
from kibitz.models.head import build_head
from kibitz.types import Batch, Prompt, Rollout

T = TypeVar("T")


CHUNK_NUMBERS = 2**25

"""Logits that exist at one time: 128 MiB in float32, of which an exact divergence needs about ten such tensors."""


class LanguageModel(nn.Module):
    """A causal language model and its tokenizer, in eval mode always: dropout would make the student disagree with
    the log-probabilities that it sampled with. `adapter`: what of `model` is LoRA, if that alone is to learn."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, name: str = "model", adapter: lora.Adapter | None = None
    ):
        super().__init__()
        self.model = model.eval()
        self.tokenizer: Any = tokenizer  # a PreTrainedTokenizerBase, whose methods return unions of everything
        self.name = name
        self.adapter = adapter
        self.vocab_size: int = min(len(tokenizer), model.get_input_embeddings().weight.shape[0])
        self.head, self.head_stands_alone = build_head(model, self.vocab_size, name)
        self.packs = False  # see `kibitz.models.packing`
        self.compute_device: torch.device | None = (
            None  # where it computes, if its weights wait elsewhere: see `kibitz.models.offload`
        )
        self.loaded: Callable[[], AbstractContextManager[None]] = nullcontext  # while which they have come
        self.write: Callable[[Path], object] = self.model.save_pretrained if adapter is None else adapter.save
        self._compiled: tuple[Any, ...] = ()  # in a tuple, so that it is no second child

    @property
    def device(self) -> torch.device:
        return self.compute_device or self.model.device

    @property
    def max_positions(self) -> int | None:
        """The longest sequence that the model was made for, if it says so."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def chunk_tokens(self) -> int:
        """How many tokens to take through the head at one time."""
        return max(16, CHUNK_NUMBERS // self.vocab_size)

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def num_trainable(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    @contextmanager
    def adapter_off(self) -> Iterator[None]:
        """The base that the adapter stands on, without a second copy of its weights; the head too, for later use."""
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
        """A Hugging Face folder: the whole model, or of LoRA the adapter in peft's format; and the tokenizer."""
        self.write(folder)
        self.tokenizer.save_pretrained(folder)

    def hidden(self, ids_BL: Tensor, position_BL: Tensor | None = None) -> Tensor:
        """The last hidden states `[B, L, D]` of right-padded rows. No attention mask: padding stands on the right. Positions
        that begin anew inside a row begin another sequence there, for models that pack."""
        positions = {} if position_BL is None else {"position_ids": position_BL}
        body = self._compiled[0] if self._compiled else self._body()
        with self.loaded():
            output = body(ids_BL, use_cache=False, **positions)
        return output.last_hidden_state if self.head_stands_alone else output.logits

    def _body(self) -> Any:
        return self.model.base_model if self.head_stands_alone else self.model

    def compile_body(self) -> None:
        """Let the forward pass of the loss, and its backward pass, be compiled; the engine goes on as before."""
        self._compiled = (torch.compile(self._body(), dynamic=True),)

    def recompute_activations(self) -> None:
        """Keep only the input of each layer for the backward pass, and compute its inside again there."""
        layers = [module for module in self.model.modules() if isinstance(module, GradientCheckpointingLayer)]
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
        """`work` inside a forward pass, where a sharded model has its weights."""
        return self(None, lambda *_: work())

    def forward(self, batch: Batch | None, use: Callable[..., T]) -> T:
        """`use(hidden_TD, head)` on the positions that score response tokens. The loss runs in here, where a sharded
        model has its output head whole."""
        if batch is None:
            return use(None, self.head)
        if not self.packs:
            return use(self.hidden(batch.ids_BL).flatten(0, 1)[batch.position_T], self.head)
        ids_1N, position_1N, place = without_padding(batch.ids_BL, batch.length_B)
        return use(self.hidden(ids_1N, position_1N)[0, place[batch.position_T]], self.head)

    def pass_flops(self, rollouts: Sequence[Rollout]) -> float:
        """The FLOPs of one forward pass over these prompts and responses, without padding."""
        lengths = [len(r.prompt.ids) + r.num_tokens for r in rollouts]
        return self.forward_flops(sum(lengths), sum(n * n for n in lengths), sum(r.num_tokens for r in rollouts))

    def forward_flops(self, num_positions: int, num_squared: int, num_scored: int) -> float:
        """Multiply-adds x 2 of one forward pass: body on all positions, causal attention (`num_squared` = the sum of
        squared lengths), head on the scored positions. Backward costs twice this again."""
        return forward_flops(self.model, num_positions, num_squared, num_scored)

    def check_lengths(self, prompts: Sequence[Prompt], max_tokens: int) -> None:
        """Raise ValueError where a prompt with `max_tokens` more has no room."""
        longest, room = max(len(prompt.ids) for prompt in prompts), self.max_positions
        if room is None or longest + max_tokens <= room:
            return
        where = f"the longest prompt has {longest} tokens and the {self.name} has {room} positions"
        if longest < room:
            raise RecipeError(f"rollout.max_tokens: {where}: write rollout.max_tokens={room - longest} or less")
        raise RecipeError(f"data: {where}: leave out long prompts")


def forward_flops(model: Any, num_positions: float, num_squared: float, num_scored: float) -> float:
    """As `LanguageModel.forward_flops`, of a model with or without weights."""
    config = model.config.get_text_config()
    head = model.get_output_embeddings().weight.numel()
    embedding = model.get_input_embeddings().weight
    tied = embedding is model.get_output_embeddings().weight
    body = sum(p.numel() for p in model.parameters()) - embedding.numel() - (0 if tied else head)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 2.0 * config.num_hidden_layers * config.num_attention_heads * head_dim * num_squared
    return 2.0 * body * num_positions + attention + 2.0 * head * num_scored
