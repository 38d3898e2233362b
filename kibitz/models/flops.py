"""The FLOPs of a forward pass, by a model's configuration and the sizes of its parameters."""

from dataclasses import dataclass
from typing import Any

from kibitz.models import quantized

NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
NUM_CHOSEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "top_k_experts",
    "moe_top_k",
    "moe_k",
)
"""The names under which configurations keep how many experts a layer has, and how many of them a token visits."""


@dataclass(frozen=True)
class PassFlops:
    """What one forward pass takes, in FLOPs (multiply-adds x 2): of the body for each position, of causal attention for each
    pair, of the head for each position that is scored."""

    per_position: float
    per_pair: float
    per_scored: float

    def of(self, num_positions: float, num_squared: float, num_scored: float) -> float:
        """The FLOPs of texts whose squared lengths sum to `num_squared`."""
        return self.per_position * num_positions + self.per_pair * num_squared + self.per_scored * num_scored


def forward_flops(model: Any, num_positions: float, num_squared: float, num_scored: float) -> float:
    """`flops_of`, for one pass."""
    return flops_of(model).of(num_positions, num_squared, num_scored)


def flops_of(model: Any) -> PassFlops:
    """What a pass of a bare model takes, which may be on the meta device. Of a mixture of experts those that a token visits
    count, and of layers those that attend to all tokens before count with the square."""
    config = model.config.get_text_config()
    head = model.get_output_embeddings().weight.numel()
    embedding = model.get_input_embeddings().weight
    tied = embedding is model.get_output_embeddings().weight
    body = sum(map(quantized.num_numbers, model.parameters())) - embedding.numel() - (0 if tied else head)
    body -= _num_idle(model, config)
    return PassFlops(2.0 * body, _attention_width(config), 2.0 * head)


def _attention_width(config: Any) -> float:
    """FLOPs of attention for each pair of positions. Mamba, RWKV and xLSTM have no attention heads, and hybrid models
    none in their recurrent layers."""
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        return 0.0
    kinds = getattr(config, "layer_types", None) or ["attention"] * config.num_hidden_layers
    layers = sum(kind == "hybrid" or ("attention" in kind and kind != "linear_attention") for kind in kinds)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2.0 * layers * heads * head_dim


def num_experts(config: Any) -> tuple[int, int]:
    """How many experts a layer has, and how many of them a token visits; 0 and 0 where there are none."""
    settings = [config, getattr(config, "ffn_config", None)]  # of DBRX
    found = ([getattr(one, name, None) for one in settings for name in names] for names in (NUM_EXPERTS, NUM_CHOSEN))
    total, chosen = (next((value for value in values if isinstance(value, int)), 0) for values in found)
    return total, chosen


def _num_idle(model: Any, config: Any) -> int:
    """Parameters of the experts that a token does not visit."""
    total, chosen = num_experts(config)
    if not 0 < chosen < total:
        return 0
    routed: dict[int, int] = {}
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if not last.startswith("shared") and (last == "experts" or type(module).__name__.endswith("Experts")):
            routed.update((id(parameter), parameter.numel()) for parameter in module.parameters())
    return sum(routed.values()) * (total - chosen) // total
