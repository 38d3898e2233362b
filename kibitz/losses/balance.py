"""The load-balancing loss of a mixture of experts."""

from collections.abc import Sequence

import torch
from torch import Tensor


def load_balance(router_logits: Sequence[Tensor], row_N: Tensor, num_rows: int, top_k: int) -> Tensor:
    """E sum_e f_e P_e of each row, `[B]`: f_e is the share of its tokens and layers that choose expert e among their `top_k`,
    P_e the mean probability of e (Switch Transformer, 2101.03961, equations 4-6; with k choices as transformers has it, k for
    a uniform router). The gradient goes through P.

    Each of `router_logits`, one a layer, is `[N, E]`; `row_N` names the row of each position, below 0 padding. Taken row by
    row, because a mean over a micro-batch would make the loss depend on how rows are grouped."""
    real_M = (row_N >= 0).nonzero()[:, 0]
    row_M, num_experts = row_N[real_M], router_logits[0].shape[-1]
    chosen_BE, mass_BE = torch.zeros(2, num_rows, num_experts, device=row_N.device)
    for logits_NE in router_logits:
        prob_ME = logits_NE.to(row_N.device)[real_M].float().softmax(-1)
        hot_ME = torch.zeros_like(prob_ME).scatter(-1, prob_ME.topk(top_k, dim=-1).indices, 1.0)
        chosen_BE = chosen_BE.index_add(0, row_M, hot_ME)
        mass_BE = mass_BE.index_add(0, row_M, prob_ME)
    num_B1 = torch.bincount(row_M, minlength=num_rows)[:, None].clamp(min=1) * len(router_logits)
    return num_experts * (chosen_BE / num_B1 * (mass_BE / num_B1)).sum(-1)
