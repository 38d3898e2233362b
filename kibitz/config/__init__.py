"""The recipe: one tree, checked before any weights load. It imports no torch, so that `kibitz --help` is quick.

    recipe = load("recipe.yaml", ["optim.lr=1e-4"])

Every field has a default, and its description says where the default comes from. An unknown key is an error that
names the nearest right one. Paths are relative to the current folder.
"""

from kibitz.config.base import RecipeError, Section
from kibitz.config.guards import GuardConfig
from kibitz.config.methods import METHOD_CONFIGS
from kibitz.config.methods.ammd import AMMDConfig
from kibitz.config.methods.base import MethodConfig, Needs
from kibitz.config.methods.distillation import DIVERGENCE_TITLES, DistillationConfig, DivergenceName
from kibitz.config.methods.distillm2 import DistiLLM2Config
from kibitz.config.methods.gad import DiscriminatorConfig, GADConfig
from kibitz.config.methods.gkd import GKDConfig
from kibitz.config.methods.grpo import GroupConfig, GRPOConfig
from kibitz.config.methods.kdrl import KDRLConfig
from kibitz.config.methods.minillm import MiniLLMConfig
from kibitz.config.methods.opd import OPDConfig
from kibitz.config.methods.opd_policy import PolicyConfig
from kibitz.config.methods.policy_gradient import PolicyGradientConfig
from kibitz.config.methods.sft import SFTConfig
from kibitz.config.methods.skd import SKDConfig
from kibitz.config.models import FrozenConfig, LoraConfig, ModelConfig, StudentConfig
from kibitz.config.reading import dump, json_schema, load, load_as, read_tree
from kibitz.config.recipe import Recipe, register_method
from kibitz.config.sections import (
    Columns,
    DataConfig,
    EvalConfig,
    OptimConfig,
    ParallelConfig,
    RolloutConfig,
    SaveConfig,
    TrackConfig,
)
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
    "DIVERGENCE_TITLES", "METHOD_CONFIGS", "TEACHER_CONFIGS", "AMMDConfig", "Columns", "ContextConfig", "DataConfig",
    "DiscriminatorConfig", "DistiLLM2Config", "DistillationConfig", "DivergenceName", "EvalConfig", "FrozenConfig", "GADConfig",
    "GKDConfig", "GRPOConfig", "GroupConfig", "GuardConfig", "KDRLConfig", "LocalTeacherConfig", "LoraConfig",
    "MethodConfig", "MiniLLMConfig", "ModelConfig", "Needs", "OPDConfig", "OptimConfig", "ParallelConfig",
    "PolicyConfig", "PolicyGradientConfig", "Recipe", "RecipeError", "RolloutConfig", "SFTConfig", "SKDConfig", "SaveConfig",
    "Section", "SignalKind", "StoredTeacherConfig", "StudentConfig", "StudentTeacherConfig", "TeacherConfig",
    "TrackConfig", "dump", "json_schema", "load", "load_as", "read_tree", "register_method",
]  # fmt: skip
