"""The `method` section of a recipe: one class per method, chosen by `type`."""

from typing import Annotated, Any, Union

from pydantic import Discriminator, Tag

from kibitz.config.methods.ammd import AMMDConfig
from kibitz.config.methods.base import MethodConfig
from kibitz.config.methods.distillm2 import DistiLLM2Config
from kibitz.config.methods.gad import GADConfig
from kibitz.config.methods.gkd import GKDConfig
from kibitz.config.methods.grpo import GRPOConfig
from kibitz.config.methods.kdrl import KDRLConfig
from kibitz.config.methods.minillm import MiniLLMConfig
from kibitz.config.methods.opd import OPDConfig
from kibitz.config.methods.sft import SFTConfig
from kibitz.config.methods.skd import SKDConfig

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
