"""Weights of 8 and of 4 bits, by bitsandbytes: which are possible, how they load, and how an adapter names its base.

int8 is LLM.int8 (2208.07339), for models that are only read. nf4 is that of QLoRA (2305.14314): each 64 numbers of a matrix
become the nearest of 16 quantiles of a normal distribution, times a scale, which is rounded to 8 bits itself. Gradients pass
through such a matrix to an adapter on it. Embedding, norms and output head stay as they are.

An adapter that was trained on a rounded base belongs to that base, not to the model that the base was rounded from. So its
folder holds `base_quantization.json`, the settings in transformers' words, and where it is merged, it is merged into the
rounded numbers.
"""

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoConfig, BitsAndBytesConfig

from kibitz.config import RecipeError, StudentConfig
from kibitz.models import lora

Format = Literal["int8", "nf4"]
RECORD = "base_quantization.json"
BYTES: dict[Format, float] = {"int8": 1.0, "nf4": 0.5 + 1 / 64 + 4 / (64 * 256)}
"""Bytes of a number in a matrix. nf4: 4 bits, for each 64 numbers a scale of 8 bits, for each 256 scales one of 32 bits."""

# As it is imported, by peft too, it says on processors with AVX512-BF16 that an optional kernel is missing.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def require(quantize: Format | None, model: str, role: str, trust_remote_code: bool = False) -> None:
    """Raise ValueError, before any weights load, if a model cannot be quantized here."""
    if quantize is None:
        return
    if missing := [name for name in ("bitsandbytes", "accelerate") if importlib.util.find_spec(name) is None]:
        raise ValueError(
            f"{role}.quantize: {quantize} needs {' and '.join(missing)}: pip install 'kibitz[bitsandbytes]', or leave it out"
        )
    if lora.is_adapter(model):
        raise ValueError(
            f"{role}.quantize: {model} is an adapter, and a quantized base takes no update: write a whole folder by "
            "`kibitz export FOLDER --merge --output NEW` and name that"
        )
    settings = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    if getattr(settings, "quantization_config", None) is not None:
        raise ValueError(f"{role}.quantize: {model} is quantized already: leave it out")


def refuse_several(config: StudentConfig) -> None:
    """Raise RecipeError for a student whose base is quantized, where several processes would split it."""
    if config.quantize is not None:
        raise RecipeError(
            "student.quantize: several processes hold parts of the student, and matrices of 4 bits are not split: leave it out, "
            "or start one process"
        )


def loading(quantize: Format | None, dtype: torch.dtype, storage: torch.device) -> dict[str, Any]:
    """The options with which `from_pretrained` quantizes the weights and puts them on `storage`. `dtype` is the one that products
    are computed in."""
    if quantize is None:
        return {}
    if quantize == "int8":
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # a line for each product
        return _on(BitsAndBytesConfig(load_in_8bit=True), storage)
    return _on(_nf4(str(dtype).removeprefix("torch.")), storage)


def _nf4(dtype: str) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def _on(settings: BitsAndBytesConfig, storage: torch.device) -> dict[str, Any]:
    return {"quantization_config": settings, "device_map": {"": storage}}


def finish(model: Any) -> Any:
    """`model`, as the same numbers on every CPU, and no longer mapped from its file. Where a CPU has bfloat16 products,
    bitsandbytes would round the scales once more, while it samples and not while it learns."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.device.type == "cpu" and tensor.is_floating_point():
                tensor.set_(tensor.clone())
    return model


def whole(model: Any) -> Any:
    """`model` with plain matrices in the place of quantized ones: the rounded numbers, in its dtype."""
    logger = logging.getLogger("transformers.integrations.bitsandbytes")
    before = logger.level
    logger.setLevel(logging.ERROR)  # it says which dtype it chose
    try:
        return model.dequantize()
    finally:
        logger.setLevel(before)


def num_numbers(parameter: Tensor) -> int:
    """The numbers of a parameter, of which bitsandbytes packs two into a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(state.shape.numel())


# ------------------------------------------------------------------ what an adapter says of its base


def record(model: Any, folder: Path) -> None:
    """Write into an adapter's folder how its base was quantized, unless the base is stored so."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.pre_quantized:
        text = json.dumps(quantizer.quantization_config.to_dict(), indent=2)
        (folder / RECORD).write_text(text + "\n", encoding="utf-8")


def recorded(folder: str, role: str) -> torch.dtype | None:
    """The dtype in which the base of an adapter was quantized to nf4; None if it was not. Raise ValueError for another
    quantization, or where it cannot be repeated here."""
    path = Path(folder) / RECORD
    if not path.is_file():
        return None
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        dtype = getattr(torch, settings["bnb_4bit_compute_dtype"])
        known = BitsAndBytesConfig(**settings).to_dict() == _nf4(settings["bnb_4bit_compute_dtype"]).to_dict()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} does not say how the adapter's base was quantized: {error}") from None
    if not known:
        raise ValueError(
            f"{path} asks for a quantization that kibitz does not make: it makes {_nf4('bfloat16').to_dict()}"
        )
    require("nf4", lora.base_of(folder), role)
    return dtype
