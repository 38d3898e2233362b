"""A model's body, compiled where that is shown to change nothing but rounding."""

import logging

import torch
from torch import Tensor

from kibitz.models.language_model import LanguageModel

log = logging.getLogger(__name__)

PROBED = (2, 33)
"""Rows and positions of the pass that is compared; not a multiple of eight, and not of one row."""


def compile_if_same(model: LanguageModel) -> bool:
    """Compile the body from here on, and return True, if on a few tokens its hidden states and their gradients are those of the
    plain one up to rounding, and its hidden states to the bit the same with and without gradients: a teacher that equals its
    student must read exactly 0. Where a compiler fails, or its result differs, the log says so and the model stays as it is."""
    plain = model._compiled
    size = PROBED[0] * PROBED[1]
    ids_BL = torch.arange(size, device=model.device).remainder(model.vocab_size).view(PROBED)
    try:
        before = _read(model, ids_BL)
        model._compiled = (torch.compile(model._body(), dynamic=True),)
        after = _read(model, ids_BL)
        with torch.no_grad():
            same = torch.equal(after[0], model.hidden(ids_BL))
        far = max(_distance(one, other) for one, other in zip(before, after, strict=True))
    except Exception as error:  # noqa: BLE001 - whatever a compiler raises, the model is as good without it
        model._compiled = plain
        log.warning("the %s is not compiled: %s", model.name, " ".join(str(error).split())[:200])
        return False
    most = max(1e-4, 4 * torch.finfo(model.model.dtype).eps)
    if same and far <= most:
        return True
    model._compiled = plain
    why = f"differs by {far:.1e}" if far > most else "depends on whether there are gradients"
    log.warning("the %s is not compiled: what it computes then %s", model.name, why)
    return False


def _read(model: LanguageModel, ids_BL: Tensor) -> list[Tensor]:
    """Hidden states, and the gradients of a sum of them with respect to the parameters that learn."""
    learnt = [parameter for parameter in model._body().parameters() if parameter.requires_grad]
    hidden_BLD = model.hidden(ids_BL)
    if not learnt:
        return [hidden_BLD.detach()]
    weight_D = torch.linspace(-1, 1, hidden_BLD.shape[-1], device=hidden_BLD.device, dtype=hidden_BLD.dtype)
    gradients = torch.autograd.grad((hidden_BLD * weight_D).sum(), learnt, allow_unused=True)
    return [hidden_BLD.detach(), *(gradient for gradient in gradients if gradient is not None)]


def _distance(one: Tensor, other: Tensor) -> float:
    """By how much two tensors differ, as a share of the first."""
    one, other = one.float(), other.float()
    return ((one - other).norm() / one.norm().clamp(min=1e-20)).item()
