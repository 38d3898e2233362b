"""The `method` section of a recipe: one class per method, chosen by `type`."""

from typing import Annotated, Any, Union

from pydantic import Discriminator, Tag

from kibitz.config.adversarial import AMMDConfig, GADConfig
from kibitz.config.methods import GKDConfig, MethodConfig, OPDConfig, SKDConfig
from kibitz.config.policy import DistiLLM2Config, GRPOConfig, KDRLConfig, MiniLLMConfig
from kibitz.config.sft import SFTConfig

METHOD_CONFIGS: dict[str, type[MethodConfig]] = {
    "sft": SFTConfig,
    "opd": OPDConfig,
    "gkd": GKDConfig,
    "skd": SKDConfig,
    "minillm": MiniLLMConfig,
    "distillm2": DistiLLM2Config,
    "grpo": GRPOConfig,
    "kdrl": KDRLConfig,
    "ammd": AMMDConfig,
    "gad": GADConfig,
}


def method_type(value: Any) -> str | None:
    """The `type` of a method's section, read or not."""
    return value.get("type") if isinstance(value, dict) else getattr(value, "type", None)


def method_union() -> Any:
    """All sections of `METHOD_CONFIGS` as one type that pydantic tells apart by `type`."""
    members = tuple(Annotated[section, Tag(name)] for name, section in METHOD_CONFIGS.items())
    return Annotated[Union[members], Discriminator(method_type)]  # noqa: UP007  # of a tuple made at run time
