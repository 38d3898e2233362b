"""The recipe as one tree, and what its sections must agree on."""

from pydantic import Field, model_validator
from pydantic.fields import FieldInfo

from kibitz.config.base import Section
from kibitz.config.guards import GuardConfig
from kibitz.config.methods import METHOD_CONFIGS, method_union
from kibitz.config.methods.base import MethodConfig
from kibitz.config.methods.opd import OPDConfig
from kibitz.config.models import ModelConfig, StudentConfig
from kibitz.config.sections import (
    DataConfig,
    EvalConfig,
    OptimConfig,
    ParallelConfig,
    RolloutConfig,
    SaveConfig,
    TrackConfig,
)
from kibitz.config.teachers import TeacherConfig, teacher_union


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
    seed: int = Field(0, description="Seed of the order of prompts and of all sampling.")
    device: str = Field("auto", description="auto: cuda if there is one.")
    threads: int | None = Field(None, ge=1, description="torch threads; 1 makes runs repeat bit for bit.")
    output: str = Field("runs/run", description="Folder of the run.")

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        needs = self.method.needs()
        if needs.teacher and self.teacher is None:
            raise ValueError(f"method {self.method.type} needs a teacher: write teacher: {{model: folder-or-name}}")
        for teacher in self.teachers:
            self.method.check_teacher(teacher)
            teacher.check(self.student)
        given = [set(teacher.answers()) for teacher in self.teachers]
        if given and needs.signals and not set(needs.signals).intersection(*given):
            raise ValueError(
                f"teacher: method {self.method.type} asks for {' or '.join(needs.signals)} signals, and there are none "
                "that all teachers give: leave one out, or choose another method.support"
            )
        names = [teacher.name for teacher in self.teachers if teacher.name is not None]
        if len(set(names)) < len(names):
            raise ValueError(f"teacher: two have the same name ({', '.join(names)}): rename one")
        self.method.check_extras()
        self.method.check(self.rollout)
        if self.rollout.max_staleness and not self.method.can_be_ahead():
            raise ValueError(
                "rollout.max_staleness: 1 is for methods whose step is written by the student alone (opd without "
                "seed_tokens or rollouts, kdrl, grpo; all without replay): write rollout.max_staleness=0"
            )
        return self

    @property
    def teachers(self) -> tuple[TeacherConfig, ...]:
        """All teachers: none, one, or those of the list."""
        if self.teacher is None:
            return ()
        return tuple(self.teacher) if isinstance(self.teacher, list) else (self.teacher,)

    def scores_late(self) -> bool:
        """Return True if each micro-batch is scored just before its loss, so that a step's signals never exist together."""
        return self.method.needs().scores_late and [one.scores_late() for one in self.teachers] == [True]

    def wants_demonstrations(self) -> bool:
        """Return True if the rows of the data must have responses, for the method or for a teacher's context."""
        return self.method.needs().responses or self.method.replay > 0 or self.teachers_need_responses()

    def may_have_gaps(self) -> bool:
        """Return True if some of these rows may lack a response."""
        return self.method.needs().fills_gaps and not self.teachers_need_responses()

    def other_models(self) -> dict[str, ModelConfig]:
        """Return the sections of the models that the method loads besides student and teacher, by key. A model without a section
        of its own is loaded like the student."""
        found: dict[str, ModelConfig] = {}
        if self.method.needs_reference():
            found["reference"] = self.method.reference or self.student
        for key, name in self.method.needs().models.items():
            found[key] = self.student if name is None else self.student.model_copy(update={"model": name})
        return found

    def teachers_need_responses(self) -> bool:
        contexts = [teacher.context for teacher in self.teachers if teacher.context is not None]
        return any("response" in context.names() for context in contexts)


def register_method(name: str, section: type[MethodConfig]) -> None:
    """Let recipes say `method: {type: name, ...}`, with the fields of `section`."""
    METHOD_CONFIGS[name] = section
    Recipe.__pydantic_fields__["method"] = FieldInfo.from_annotated_attribute(method_union(), OPDConfig())
    Recipe.model_rebuild(force=True)
