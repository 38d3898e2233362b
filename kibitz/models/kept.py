"""What a backward pass needs of the forward pass, counted by a hook on every saved tensor.

Rows have one token, where attention keeps nothing that grows with the square of the length, which is what fused attention does at
any length.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

PROBED_TOKENS = 64


def kept_bytes_per_token(model: nn.Module, read: Callable[[Tensor], object], device: torch.device | str) -> float:
    """The bytes that `read(ids_N1)`, a forward pass of `model`, keeps for each token beside the parameters."""
    kept: dict[int, Tensor] = {}
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)  # kept alive, so that no address comes twice
        return tensor

    ids_N1 = torch.zeros(PROBED_TOKENS, 1, dtype=torch.long, device=device)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        read(ids_N1)
    total = sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in parameters)
    return total / PROBED_TOKENS
