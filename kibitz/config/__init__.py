"""The recipe: one tree, checked before any weights load. It imports no torch, so that `kibitz --help` is quick.

    recipe = load("recipe.yaml", ["optim.lr=1e-4"])

Every field has a default, and its description says where the default comes from. An unknown key is an error that
names the nearest right one. Paths are relative to the current folder.
"""

from kibitz.config.adversarial import AMMDConfig, DiscriminatorConfig, GADConfig
from kibitz.config.base import RecipeError, Section
from kibitz.config.guards import GuardConfig
from kibitz.config.methods import (
    DistillationConfig,
    DivergenceName,
    GKDConfig,
    MethodConfig,
    OPDConfig,
    PolicyGradientConfig,
    SKDConfig,
)
from kibitz.config.policy import DistiLLM2Config, GroupConfig, GRPOConfig, KDRLConfig, MiniLLMConfig
from kibitz.config.reading import dump, json_schema, load
from kibitz.config.recipe import Recipe, register_method
from kibitz.config.sections import (
    Columns,
    DataConfig,
    EvalConfig,
    FrozenConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RolloutConfig,
    SaveConfig,
    StudentConfig,
    TrackConfig,
)
from kibitz.config.sft import SFTConfig
from kibitz.config.table import METHOD_CONFIGS
from kibitz.config.teachers import (
    TEACHER_CONFIGS,
    ContextConfig,
    LocalTeacherConfig,
    SignalKind,
    StoredTeacherConfig,
    StudentTeacherConfig,
    TeacherConfig,
)

__all__ = [
    "METHOD_CONFIGS", "TEACHER_CONFIGS", "AMMDConfig", "Columns", "ContextConfig", "DataConfig",
    "DiscriminatorConfig", "DistiLLM2Config", "DistillationConfig", "DivergenceName", "EvalConfig", "FrozenConfig", "GADConfig",
    "GKDConfig", "GRPOConfig", "GroupConfig", "GuardConfig", "KDRLConfig", "LocalTeacherConfig", "LoraConfig",
    "MethodConfig", "MiniLLMConfig", "ModelConfig", "OPDConfig", "OptimConfig", "ParallelConfig",
    "PolicyGradientConfig", "Recipe", "RecipeError", "RolloutConfig", "SFTConfig", "SKDConfig", "SaveConfig",
    "Section", "SignalKind", "StoredTeacherConfig", "StudentConfig", "StudentTeacherConfig", "TeacherConfig",
    "TrackConfig", "dump", "json_schema", "load", "register_method",
]  # fmt: skip
