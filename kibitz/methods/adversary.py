"""The student's adversary: a module and its optimizer, to be stepped and stored together."""

from dataclasses import dataclass

from torch import Tensor, nn

from kibitz.config import OptimConfig
from kibitz.optim import Optimizer


@dataclass(frozen=True)
class Adversary:
    module: nn.Module
    optimizer: Optimizer

    def state(self) -> dict[str, Tensor]:
        weights = {f"weights|{name}": p.detach().cpu().clone() for name, p in self.module.named_parameters()}
        return weights | {f"moments|{name}": moment for name, moment in self.optimizer.state().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        for name, parameter in self.module.named_parameters():
            parameter.data.copy_(state[f"weights|{name}"])
        moments = {key.removeprefix("moments|"): value for key, value in state.items() if key.startswith("moments|")}
        self.optimizer.load_state(moments)

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.module.parameters())


def adversary(module: nn.Module, lr: float, like: OptimConfig) -> Adversary:
    """`module`, trained by AdamW at a rate of its own that stays as it is; the rest is the student's."""
    config = like.model_copy(update={"name": "adamw", "lr": lr})
    return Adversary(module, Optimizer(module, config))
