"""The optimizer, and how its learning rate goes."""

import importlib.util
import math
from typing import Any

import torch
from torch import Tensor, nn

from kibitz.config import OptimConfig
from kibitz.parallel.ranks import plain, shared_like, to_save


def lr_factor(step: int, steps: int, config: OptimConfig) -> float:
    """Return the factor on the learning rate at step 0, 1, ... `steps`-1. The decay ends just above 0, so that the
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
    """AdamW, plain or with moments of 8 bits, SGD, or Muon on the matrices with AdamW on the rest (embedding, output
    head, norms), as one thing to step.

    What is not float32 learns through a float32 master copy: gradients are summed there, the update is made there, and
    the weight is its rounding. In bfloat16 itself, steps of less than 1/256 of a weight would be lost. `keep_weights`: what is
    trained is a float32 copy of weights that are not, and counts as the master in the state.
    """

    def __init__(self, model: nn.Module, config: OptimConfig, keep_weights: bool = False):
        self.config, self.keep_weights = config, keep_weights
        learnt = {p: name for name, p in model.named_parameters() if p.requires_grad}
        self.masters: dict[Tensor, Tensor] = {p: _master(p) for p in learnt if p.dtype != torch.float32}
        self.names: dict[Tensor, str] = {self.masters.get(p, p): name for p, name in learnt.items()}
        self.parameters = list(self.names)
        matrices = [self.masters.get(p, p) for p in _inner_matrices(model)] if config.name == "muon" else []
        chosen = {id(p) for p in matrices}
        rest = [p for p in self.parameters if id(p) not in chosen]
        self.parts: list[torch.optim.Optimizer] = [_plain(rest, config)] if rest else []
        if matrices:
            muon = {"momentum": config.momentum, "weight_decay": config.weight_decay, "adjust_lr_fn": "original"}
            self.parts.append(torch.optim.Muon(matrices, lr=config.muon_lr or 10 * config.lr, **muon))
        self.rates = [group["lr"] for part in self.parts for group in part.param_groups]

    def step(self, factor: float = 1.0) -> float:
        """One update at `factor` times the learning rate; returns the gradient's norm before clipping. Gradients that
        are not finite change nothing."""
        norm = plain(torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip or math.inf)).item()
        groups = [group for part in self.parts for group in part.param_groups]
        for group, rate in zip(groups, self.rates, strict=True):
            group["lr"] = rate * factor
        if math.isfinite(norm):
            for part in self.parts:
                part.step()
            self._round()
        self.zero_grad()
        return norm

    @torch.no_grad()
    def _round(self) -> None:
        for parameter, master in self.masters.items():
            parameter.copy_(master)

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """All moments, and the master copies, by the names of their parameters; fit for safetensors, if not sharded."""
        moments = {
            f"{self.names[parameter]}|{key}": to_save(torch.as_tensor(value))
            for part in self.parts
            for parameter, moments in part.state.items()
            for key, value in moments.items()
        }
        kept = self.parameters if self.keep_weights else self.masters.values()
        return moments | {f"{self.names[master]}|master": to_save(master) for master in kept}

    def room(self, name: str) -> Tensor:
        """Return an empty tensor for an entry of AdamW's state, sharded as its parameter is."""
        parameter, _, key = name.rpartition("|")
        if key == "step":
            return torch.zeros((), device=self._named(parameter).device)
        return torch.empty_like(self._named(parameter), requires_grad=False)

    def _named(self, name: str) -> Tensor:
        return next(p for p, known in self.names.items() if known == name)

    def load_state(self, state: dict[str, Tensor]) -> None:
        for part in self.parts:
            for parameter in (p for group in part.param_groups for p in group["params"]):
                prefix = self.names[parameter] + "|"
                moments = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
                if (master := moments.pop("master", None)) is not None:
                    parameter.data.copy_(shared_like(master, parameter.data))
                part.state[parameter] = {
                    key: self._step(value, parameter) if key == "step" else shared_like(value, parameter.data)
                    for key, value in moments.items()
                }

    def _step(self, value: Tensor, parameter: Tensor) -> Any:
        """The count of steps as the optimizer keeps it: a fused one reads it on the device of the parameter."""
        if self.config.name == "adamw_8bit":
            return int(value)
        return value.to(parameter.device, torch.float32, copy=True)


def _plain(parameters: list[Tensor], config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW or SGD."""
    if config.name == "sgd":
        momentum, decay = config.sgd_momentum, config.weight_decay
        return torch.optim.SGD(parameters, lr=config.lr, momentum=momentum, weight_decay=decay, fused=True)
    options = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
    if config.name != "adamw_8bit":
        return torch.optim.AdamW(parameters, fused=True, **options)
    require(config)
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(parameters, **options)  # pyright: ignore[reportPrivateImportUsage]


def bytes_of_moments(config: OptimConfig) -> int:
    """Return the bytes of moments for each parameter that learns: two moments, one, or none, in 8 bits or in float32."""
    match config.name:
        case "adamw_8bit":
            return 2
        case "sgd":
            return 4 if config.sgd_momentum else 0
        case _:
            return 8


def require(config: OptimConfig) -> None:
    """Raise ValueError with what to install, before any weights load."""
    if config.name == "adamw_8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            "optim.name: adamw_8bit needs the package bitsandbytes: pip install 'kibitz[bitsandbytes]', or write adamw"
        )


def _master(parameter: Tensor) -> Tensor:
    """A float32 copy that takes over the gradients as they come, so that micro-batches are summed in float32 too."""
    master = nn.Parameter(parameter.detach().float())

    def take_gradient(_: Tensor) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.float()
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        parameter.grad = None

    parameter.register_post_accumulate_grad_hook(take_gradient)
    return master


def _inner_matrices(model: nn.Module) -> list[Tensor]:
    """Return the parameters that Muon updates: the matrices of a language model but for its embedding and its output head."""
    outer = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    return [p for p in model.parameters() if p.requires_grad and p.ndim == 2 and id(p) not in outer]
