"""The recipe as one tree, and what its sections must agree on."""

from pydantic import Field, model_validator
from pydantic.fields import FieldInfo

from kibitz.config.base import Section
from kibitz.config.guards import GuardConfig
from kibitz.config.methods import MethodConfig, OPDConfig
from kibitz.config.sections import (
    DataConfig,
    EvalConfig,
    OptimConfig,
    ParallelConfig,
    RolloutConfig,
    SaveConfig,
    StudentConfig,
    TrackConfig,
)
from kibitz.config.table import METHOD_CONFIGS, method_union
from kibitz.config.teachers import teacher_union


class Recipe(Section):
    """A whole run. `student`, `teacher` (where the method has one) and `data` have no default."""

    student: StudentConfig
    teacher: teacher_union() | None = None  # pyright: ignore[reportInvalidTypeForm]
    data: DataConfig
    method: method_union() = OPDConfig()  # pyright: ignore[reportInvalidTypeForm]  # grows by `register_method`
    rollout: RolloutConfig = RolloutConfig()
    optim: OptimConfig = OptimConfig()
    steps: int = Field(150, ge=1, description="150: Thinking Machines' reasoning run.")
    eval: EvalConfig = EvalConfig()
    save: SaveConfig = SaveConfig()
    parallel: ParallelConfig = ParallelConfig()
    guards: GuardConfig = GuardConfig()
    track: TrackConfig | None = None
    seed: int = Field(0, description="Of the order of prompts and of all sampling.")
    device: str = Field("auto", description="auto: cuda if there is one.")
    threads: int | None = Field(None, ge=1, description="torch threads; 1 makes runs repeat bit for bit.")
    output: str = Field("runs/run", description="Folder of the run.")

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if self.method.needs_teacher() and self.teacher is None:
            raise ValueError(f"method {self.method.type} needs a teacher: write teacher: {{model: folder-or-name}}")
        if self.teacher is not None:
            self.method.check_teacher(self.teacher)
        self.method.check_extras()
        self.method.check(self.rollout)
        return self


def register_method(name: str, section: type[MethodConfig]) -> None:
    """Let recipes say `method: {type: name, ...}`, with the fields of `section`."""
    METHOD_CONFIGS[name] = section
    Recipe.__pydantic_fields__["method"] = FieldInfo.from_annotated_attribute(method_union(), OPDConfig())
    Recipe.model_rebuild(force=True)
