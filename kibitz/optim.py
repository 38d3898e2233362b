"""The optimizer, and how its learning rate goes."""

import math

import torch
from torch import Tensor, nn

from kibitz.config import OptimConfig


def lr_factor(step: int, steps: int, config: OptimConfig) -> float:
    """What the learning rate of step 0, 1, ... `steps`-1 is multiplied by. The decay ends just above 0, so that the
    last step still moves the weights."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    match config.schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - progress
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))


class Optimizer:
    """AdamW, or Muon on the matrices with AdamW on the rest (embedding, output head, norms), as one thing to step."""

    def __init__(self, model: nn.Module, config: OptimConfig):
        self.config = config
        self.names: dict[Tensor, str] = {p: name for name, p in model.named_parameters() if p.requires_grad}
        self.parameters = list(self.names)
        outer = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings())}
        matrices = [p for p in self.parameters if config.name == "muon" and p.ndim == 2 and id(p) not in outer]
        chosen = {id(p) for p in matrices}
        rest = [p for p in self.parameters if id(p) not in chosen]
        adam = {"betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
        self.parts: list[torch.optim.Optimizer] = (
            [torch.optim.AdamW(rest, lr=config.lr, fused=True, **adam)] if rest else []
        )
        if matrices:
            muon = {"momentum": config.momentum, "weight_decay": config.weight_decay, "adjust_lr_fn": "original"}
            self.parts.append(torch.optim.Muon(matrices, lr=config.muon_lr or 10 * config.lr, **muon))
        self.rates = [group["lr"] for part in self.parts for group in part.param_groups]

    def step(self, factor: float) -> float:
        """One update at `factor` times the learning rate; returns the gradient's norm before clipping. Gradients that
        are not finite change nothing."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip or math.inf).item()
        groups = [group for part in self.parts for group in part.param_groups]
        for group, rate in zip(groups, self.rates, strict=True):
            group["lr"] = rate * factor
        if math.isfinite(norm):
            for part in self.parts:
                part.step()
        self.zero_grad()
        return norm

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """All moments by the names of their parameters, fit for safetensors."""
        return {
            f"{self.names[parameter]}|{key}": value.detach().cpu().contiguous()
            for part in self.parts
            for parameter, moments in part.state.items()
            for key, value in moments.items()
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        for part in self.parts:
            for parameter in (p for group in part.param_groups for p in group["params"]):
                prefix = self.names[parameter] + "|"
                moments = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
                part.state[parameter] = {
                    key: value.clone() if key == "step" else value.to(parameter.device, copy=True)
                    for key, value in moments.items()
                }
