"""The fast path for small Llama, Qwen2 and Qwen3 models: the same mathematics over repacked weights.

What is repacked, all of it exact up to rounding: query, key and value projections are one matrix, gate and up another;
norm weights and the attention scale are folded into the matrices behind them; the two halves of a rotated head are
interleaved, so that rotation is one complex product (a permutation that queries and keys share does not change their
inner products). The matrices are repacked at the start of every `generate`, so they cannot be stale.

`python -m benchmarks.rollout` says where this pays. Anything that the mathematics here does not cover is refused by
`FusedDecoder.__init__`, and the engine checks the result against the model before it is used.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from kibitz.engines.packed import LEAST_NUMBERS
from kibitz.losses.products import speed_up

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
MAX_PARAMETERS = 200_000_000  # measured to pay from 0.15M to 135M; repacking takes the memory of the weights once more
SLOT_STEP = 16  # slots are attended to in multiples: kernels chosen per shape are chosen less often


@dataclass
class Layer:
    qkv: nn.Linear  # [(Hq + 2 Hk) d, D]
    qk_norm: Tensor | None  # [Hq + Hk, d]
    out: nn.Linear
    gate_up: nn.Linear
    down: nn.Linear
    keys: Tensor  # [rows, Hk, d, slots], views of one tensor of all layers, as values are
    values: Tensor  # [rows, Hk, slots, d]


class FusedDecoder:
    def __init__(self, model: PreTrainedModel):
        refuse_unless_covered(model)
        self.model, config = model, model.config
        self.body: Any = model.model
        self.num_heads, self.num_kv = config.num_attention_heads, config.num_key_value_heads
        attention = self.body.layers[0].self_attn
        self.dim = attention.head_dim
        self.eps = config.rms_norm_eps
        self.qk_eps = attention.q_norm.variance_epsilon if hasattr(attention, "q_norm") else None

    def start(self, num_rows: int, num_slots: int) -> None:
        self.num_slots = -(-num_slots // SLOT_STEP) * SLOT_STEP
        device = self.model.device
        self.slot_S = torch.arange(self.num_slots, device=device)
        self.row_R = torch.arange(num_rows, device=device)
        self.head_H1 = torch.arange(num_rows * self.num_kv, device=device).view(num_rows, self.num_kv) * self.num_slots
        angle_SF = self.slot_S[:, None] * self.body.rotary_emb.inv_freq.float()
        scale = torch.full_like(angle_SF, self.body.rotary_emb.attention_scaling)
        self.turn_SF = torch.polar(scale, angle_SF)
        cache = angle_SF.new_zeros(2, len(self.body.layers), num_rows, self.num_kv, self.dim * self.num_slots)
        self.keys = cache[0].unflatten(-1, (self.dim, self.num_slots))  # a product with queries reads it as it lies
        self.values = cache[1].unflatten(-1, (self.num_slots, self.dim))
        self.layers = [self._pack(*each) for each in zip(self.body.layers, self.keys, self.values, strict=True)]
        head, norm = self.model.get_output_embeddings(), self.body.norm
        self.head = linear(head.weight * norm.weight * norm.weight.numel() ** 0.5)
        self.least = self._least(norm.weight.numel(), self.eps)
        self.least_qk = None if self.qk_eps is None else self._least(self.dim, self.qk_eps)

    def _least(self, num: int, eps: float) -> Tensor:
        return torch.full((1,), (num * eps) ** 0.5, device=self.model.device)

    def _pack(self, layer: Any, keys: Tensor, values: Tensor) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        query, key, value = attention.q_proj, attention.k_proj, attention.v_proj
        scale, root = self.dim**-0.5, layer.input_layernorm.weight.numel() ** 0.5
        norm = None
        if self.qk_eps is not None:
            parts = [
                attention.q_norm.weight.expand(self.num_heads, -1) * scale,
                attention.k_norm.weight.expand(self.num_kv, -1),
            ]
            norm = (
                torch.cat([interleave(part.reshape(-1), self.dim) for part in parts]).view(-1, self.dim) * self.dim**0.5
            )
            scale = 1.0
        qkv = torch.cat([interleave(query.weight, self.dim) * scale, interleave(key.weight, self.dim), value.weight])
        bias = None
        if query.bias is not None:
            bias = torch.cat([interleave(query.bias, self.dim) * scale, interleave(key.bias, self.dim), value.bias])
        gate_up_bias = None if mlp.gate_proj.bias is None else torch.cat([mlp.gate_proj.bias, mlp.up_proj.bias])
        return Layer(
            qkv=linear(qkv * (layer.input_layernorm.weight * root), bias),
            qk_norm=norm,
            out=linear(attention.o_proj.weight, attention.o_proj.bias),
            gate_up=linear(
                torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]) * (layer.post_attention_layernorm.weight * root),
                gate_up_bias,
            ),
            down=linear(mlp.down_proj.weight, mlp.down_proj.bias),
            keys=keys,
            values=values,
        )

    def prefill(self, ids_GP: Tensor, prompt_R: Tensor, row_R: Tensor) -> None:
        num_prompts, length = ids_GP.shape
        x_ND = self.body.embed_tokens(ids_GP).flatten(0, 1)
        turn = self.turn_SF[:length].repeat(num_prompts, 1)[:, None]
        for index, layer in enumerate(self.layers):
            query, key, value = self._qkv(layer, x_ND, turn)
            query, key, value = (t.view(num_prompts, length, -1, self.dim).transpose(1, 2) for t in (query, key, value))
            layer.keys[row_R, :, :, :length] = key[prompt_R].transpose(2, 3)
            layer.values[row_R, :, :length] = value[prompt_R]
            if index + 1 < len(self.layers):  # of the last layer, nobody reads more than keys and values
                mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=1.0, enable_gqa=True)
                x_ND = self._after_attention(layer, x_ND, mixed.transpose(1, 2).flatten(2).flatten(0, 1))

    def step(self, token_N: Tensor, position_N: Tensor, num_slots: int) -> Tensor:
        num_slots = -(-num_slots // SLOT_STEP) * SLOT_STEP
        rows = len(token_N)
        unseen = self.slot_S[:num_slots] > position_N[:, None]
        mask = torch.zeros_like(unseen, dtype=self.head.weight.dtype).masked_fill_(unseen, -torch.inf)[:, None, None]
        target_N = (self.head_H1[:rows] + position_N[:, None]).flatten()
        row_N = self.row_R[:rows]
        turn = self.turn_SF.index_select(0, position_N)[:, None]
        x_ND = self.body.embed_tokens(token_N)
        for layer in self.layers:
            query, key, value = self._qkv(layer, x_ND, turn)
            layer.keys[row_N, :, :, position_N] = key
            layer.values.view(-1, self.dim).index_copy_(0, target_N, value.reshape(-1, self.dim))
            query = query.reshape(rows, self.num_kv, -1, self.dim)  # the heads that share keys are rows of one product
            score = torch.matmul(query, layer.keys[:rows, :, :, :num_slots]).add_(mask)
            mixed = torch.matmul(score.softmax(-1), layer.values[:rows, :, :num_slots])
            x_ND = self._after_attention(layer, x_ND, mixed.view(rows, -1))
        return self.head.forward(self._normed(x_ND))

    def _normed(self, x_ND: Tensor) -> Tensor:
        return normed(x_ND, self.least)

    def _qkv(self, layer: Layer, x_ND: Tensor, turn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys (both normalised where the model does, and rotated) and values, [N, heads, dim]."""
        heads = self.num_heads + self.num_kv
        joint = layer.qkv.forward(self._normed(x_ND)).view(len(x_ND), -1, self.dim)
        qk, value = joint[:, :heads], joint[:, heads:]
        if layer.qk_norm is not None and self.least_qk is not None:
            qk = normed(qk, self.least_qk).mul_(layer.qk_norm)
        qk = torch.view_as_complex(qk.view(-1, heads, self.dim // 2, 2)) * turn
        qk = torch.view_as_real(qk).view(-1, heads, self.dim)
        return qk[:, : self.num_heads], qk[:, self.num_heads :], value

    def _after_attention(self, layer: Layer, x_ND: Tensor, mixed_ND: Tensor) -> Tensor:
        x_ND = layer.out.forward(mixed_ND).add_(x_ND)
        gate, up = layer.gate_up.forward(self._normed(x_ND)).chunk(2, dim=-1)
        return layer.down.forward(F.silu(gate).mul_(up)).add_(x_ND)

    def move(self, source_M: Tensor, target_M: Tensor) -> None:
        for state in (self.keys, self.values):
            state[:, target_M] = state[:, source_M]

    def linears(self) -> Iterator[nn.Linear]:
        """The matrices that a step multiplies by, between `start` and `stop`."""
        for layer in self.layers:
            yield from (layer.qkv, layer.out, layer.gate_up, layer.down)
        yield self.head

    def stop(self) -> None:
        del self.layers, self.head, self.keys, self.values


def normed(x: Tensor, least_1: Tensor) -> Tensor:
    """RMS norm over the last dimension without its factor sqrt(D), which the matrices behind it have: the vector divided by
    its length, or nearly so where it is as short as `least_1` = sqrt(D eps)."""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(least_1)


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A linear layer of a given matrix. A small one is laid out by columns, so that a product reads it as it lies."""
    module = nn.Linear(1, 1, bias=bias is not None, device="meta")
    weight = weight.detach()
    if weight.numel() < LEAST_NUMBERS:
        weight = weight.t().contiguous().t()
    module.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        module.bias = nn.Parameter(bias.detach(), requires_grad=False)
    speed_up(module)
    return module


def interleave(weight: Tensor, dim: int) -> Tensor:
    """Rows of each head from (first half, second half) to pairs, the layout of complex numbers."""
    return weight.unflatten(0, (-1, 2, dim // 2)).transpose(1, 2).flatten(0, 2)


def refuse_unless_covered(model: PreTrainedModel) -> None:
    """Raises NotImplementedError with the reason. By exact type: a subclass or an adapter may compute something else."""
    config = model.config
    if type(model).__name__ not in ARCHITECTURES or not type(model).__module__.startswith("transformers."):
        raise NotImplementedError(f"{type(model).__name__} is not one of {', '.join(ARCHITECTURES)}")
    if any(type(parameter) is not nn.Parameter or parameter.dtype != torch.float32 for parameter in model.parameters()):
        raise NotImplementedError("weights that are sharded or not float32")
    if sum(parameter.numel() for parameter in model.parameters()) > MAX_PARAMETERS:
        raise NotImplementedError(f"more than {MAX_PARAMETERS:,} parameters")
    if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        raise NotImplementedError("layers other than full attention")
    if config.rope_parameters["rope_type"] not in ("default", "linear", "llama3", "yarn"):
        raise NotImplementedError("rotation angles that depend on the length")
    if config.hidden_act != "silu":
        raise NotImplementedError(f"activation {config.hidden_act}")
    body: Any = model.model
    for layer in body.layers:
        for name, module in [*layer.self_attn.named_children(), *layer.mlp.named_children()]:
            if name.endswith("_proj") and type(module) is not nn.Linear:
                raise NotImplementedError(f"{name} is a {type(module).__module__}.{type(module).__name__}")
    if type(model.get_output_embeddings()) is not nn.Linear:
        raise NotImplementedError("an output head that is more than a matrix")
