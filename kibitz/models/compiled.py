"""A model's layers, compiled where that is shown to change nothing but rounding."""

import copy
import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from kibitz.models.language_model import LanguageModel
from kibitz.models.layers import compile_layers, leave_plain, recomputable

log = logging.getLogger(__name__)

PROBED = (2, 33)
"""Rows and positions of the pass that is compared; not a multiple of eight, and not of one row."""
WORSE = 2.0
"""A compiled layer may be so many times as far from what it should compute as the plain one."""
Given = tuple[tuple[Any, ...], dict[str, Any]]


def compile_if_same(model: LanguageModel) -> bool:
    """Compile the layers from here on, and return True, if on a few tokens each is as close to the same layer in a higher
    precision as the plain one, in its output and in its gradients, and if hidden states are to the bit the same with and
    without gradients: a teacher that equals its student must read exactly 0. Where a compiler fails, or a result differs, the
    log says so and the model stays as it is."""
    size = PROBED[0] * PROBED[1]
    ids_BL = torch.arange(size, device=model.device).remainder(model.vocab_size).view(PROBED)
    try:
        given = _given(model, ids_BL)
        compile_layers(model.model)
        why = next((why for layer, inputs in given.items() if (why := _worse(layer, *inputs)) is not None), None)
        if why is None and not _same_bits(model, ids_BL):
            why = "depends on whether there are gradients"
    except Exception as error:  # noqa: BLE001 - whatever a compiler raises, the model is as good without it
        leave_plain(model.model)
        log.warning("the %s is not compiled: %s", model.name, " ".join(str(error).split())[:200])
        return False
    if why is None:
        return True
    leave_plain(model.model)
    log.warning("the %s is not compiled: what it computes then %s", model.name, why)
    return False


@torch.no_grad()
def _given(model: LanguageModel, ids_BL: Tensor) -> dict[nn.Module, Given]:
    """What each layer is called with, in a pass over these tokens."""
    given: dict[nn.Module, Given] = {}

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.setdefault(layer, (args, kwargs))

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in recomputable(model.model)]
    model.hidden(ids_BL)
    for hook in hooks:
        hook.remove()
    return given


def _worse(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """By how much a compiled layer is farther off than the plain one, in words; None if it is not."""
    dtype = torch.float64 if args[0].dtype == torch.float32 else torch.float32
    exact = copy.deepcopy(layer).to(dtype)
    for module in exact.modules():
        if hasattr(config := getattr(module, "config", None), "_attn_implementation"):
            config._attn_implementation = "sdpa"  # which all precisions have

    def precise(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    truth = _read(exact, exact._call_impl, *tree_map(precise, (args, kwargs)))
    plain, compiled = (_read(layer, call, args, kwargs) for call in (layer._call_impl, layer._compiled_call_impl))
    least = torch.finfo(args[0].dtype).eps / 4
    for name, true, one, other in zip(("output", "gradients"), truth, plain, compiled, strict=True):
        before, after = _distance(true, one), _distance(true, other)
        if not after <= WORSE * max(before, least):
            return f"is off by {after:.1e} in its {name}, and {before:.1e} otherwise"
    return None


def _read(
    layer: nn.Module, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Tensor], list[Tensor]]:
    """The output of a layer, and the gradients of a sum of it with respect to its input and the parameters that learn."""
    input_BLD = args[0].detach().requires_grad_()
    learnt = [input_BLD, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    with torch.enable_grad():
        output = call(input_BLD, *args[1:], **kwargs)
        output_BLD = output[0] if isinstance(output, tuple) else output
        weight_D = torch.linspace(-1, 1, output_BLD.shape[-1], device=output_BLD.device, dtype=output_BLD.dtype)
        gradients = torch.autograd.grad((output_BLD * weight_D).sum(), learnt, allow_unused=True)
    return [output_BLD.detach()], [gradient for gradient in gradients if gradient is not None]


def _distance(truth: list[Tensor], found: list[Tensor]) -> float:
    """By how much tensors differ from true ones, as a share of these."""
    off = sum(float((one.to(true.dtype) - true).square().sum()) for true, one in zip(truth, found, strict=True))
    size = sum(float(true.square().sum()) for true in truth)
    return (off / max(size, 1e-40)) ** 0.5


def _same_bits(model: LanguageModel, ids_BL: Tensor) -> bool:
    with torch.no_grad():
        without = model.hidden(ids_BL)
    return torch.equal(model.hidden(ids_BL), without)
