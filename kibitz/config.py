"""The recipe: one tree, checked before any weights load. It imports no torch, so that `kibitz --help` is quick.

    recipe = load("recipe.yaml", ["optim.lr=1e-4"])

Every field has a default, and its description says where the default comes from. An unknown key is an error that
names the nearest right one. Paths are relative to the current folder.
"""

import difflib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator


class RecipeError(ValueError):
    """What is wrong with a recipe, where, and what to write instead."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class ModelConfig(Section):
    """A Hugging Face causal language model with its tokenizer and chat template."""

    model: str = Field(description="Folder of a Hugging Face checkpoint (safetensors), or a name on the hub.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: float32 on a CPU (bf16 log-probs are off by 5e-3 there), bfloat16 on a GPU."
    )
    trust_remote_code: bool = Field(
        False, description="Run Python code that comes with the checkpoint. Off: it is a risk."
    )


class StudentConfig(ModelConfig):
    """The model that plays: it writes the rollouts and is trained."""


class TeacherConfig(ModelConfig):
    """The model that comments: it scores every token and is never changed."""


class Columns(Section):
    """Names of the columns in your file, where they differ from kibitz's."""

    prompt: str = "prompt"
    answer: str = "answer"
    response: str = "response"
    task: str = "task"


class DataConfig(Section):
    """Where the prompts come from: a file, a `datasets` name, or a toy world."""

    prompts: str | None = Field(None, description="JSONL, parquet, or a name for `datasets.load_dataset`.")
    world: str | None = Field(None, description="A toy world that a CPU can learn; see `kibitz worlds`.")
    split: str = Field("train", description="Split of the dataset or world.")
    columns: Columns = Columns()
    system: str | None = Field(None, description="System message put before every `prompt`.")
    template: dict[str, Any] = Field(
        default_factory=dict, description="Arguments of the chat template, such as {enable_thinking: false}."
    )
    grader: str = Field(
        "auto", description="exact, math, choice, or auto: the world's own, else math if rows have an answer."
    )
    limit: int | None = Field(
        None, ge=1, description="Use only the first rows; a world makes this many (default 20000)."
    )
    max_prompt_tokens: int = Field(
        1024, ge=1, description="A longer prompt is an error. 1024: Thinking Machines' cookbook."
    )
    shuffle: bool = Field(True, description="A new order each epoch, decided by the seed.")
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the world, such as {corrupted: 0.9}.")

    @model_validator(mode="after")
    def _one_source(self) -> "DataConfig":
        if (self.prompts is None) == (self.world is None):
            raise ValueError(
                "write either data.prompts (a file or dataset name) or data.world (a toy world), one of them"
            )
        return self


# ------------------------------------------------------------------ methods


class MethodConfig(Section):
    """What a method shares with every other one."""

    type: str

    def needs_teacher(self) -> bool:
        """Whether the recipe must name a teacher."""
        return False

    def needs_reward(self) -> bool:
        """Whether there must be a grader."""
        return False

    def scores_with_teacher(self) -> bool:
        """Whether the teacher reads each rollout: its cost then counts."""
        return False


DivergenceName = Literal[
    "reverse_kl", "forward_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation", "adaptive_kl"
]


class OPDConfig(MethodConfig):
    """On-policy distillation: the student writes, the teacher scores every token, the divergence is the loss."""

    type: Literal["opd"] = "opd"
    divergence: DivergenceName = Field("reverse_kl", description="reverse_kl: Thinking Machines 2025, MiniLLM.")
    support: Literal["full", "top_k", "sampled"] = Field(
        "full",
        description="full: the whole vocabulary, exact (its gradient has no sampling noise); top_k: K tokens, the written one "
        "and a tail bucket; sampled: the published policy gradient on the sampled token.",
    )
    beta: float = Field(0.5, gt=0, lt=1, description="Of jsd: near 0 forward KL, near 1 reverse KL (GKD, 2306.13649).")
    alpha: float = Field(0.1, gt=0, lt=1, description="Of the skewed divergences (DistiLLM, 2402.03898: 0.1).")
    top_k: int = Field(64, ge=1, description="K of support: top_k. Rethinking-OPD's 16 hold 97-99% of the mass.")
    top_k_of: Literal["student", "teacher", "union"] = Field(
        "student", description="Whose K. student: nearest to the full reverse KL."
    )
    temperature: float = Field(
        1.0, gt=0, description="Divides both models' logits in the loss; gradients are scaled by its square."
    )
    kl_coef: float = Field(1.0, gt=0, description="Of support: sampled; the cookbook's kl_penalty_coef.")
    discount: float = Field(
        0.0, ge=0, le=1, description="Of support: sampled; credit for later tokens. 0: published, >0 gained nothing."
    )
    clip_advantage: float | None = Field(
        None,
        gt=0,
        description="Of support: sampled; bounds the log-ratio, whose lower tail is heavy (REOPOLD). 3 saved toy runs.",
    )

    def needs_teacher(self) -> bool:
        return True

    def scores_with_teacher(self) -> bool:
        return True


class SFTConfig(MethodConfig):
    """Supervised fine-tuning: cross-entropy on demonstrations, or on what the teacher writes (off-policy distillation)."""

    type: Literal["sft"] = "sft"
    source: Literal["dataset", "teacher"] = Field("dataset", description="Who wrote the responses.")

    def needs_teacher(self) -> bool:
        return self.source == "teacher"


class GRPOConfig(MethodConfig):
    """RL with a reward per response: advantages centred in the group of a prompt's samples (GRPO, 2402.03300)."""

    type: Literal["grpo"] = "grpo"
    normalize_std: bool = Field(
        False, description="Divide by the group's deviation. Off: it favours extreme prompts (2503.20783)."
    )
    clip_ratio: float = Field(0.2, gt=0, description="PPO clip of the importance ratio (2402.03300).")

    def needs_reward(self) -> bool:
        return True


METHOD_CONFIGS: dict[str, type[MethodConfig]] = {"sft": SFTConfig, "opd": OPDConfig, "grpo": GRPOConfig}


def _method_type(value: Any) -> str | None:
    return value.get("type") if isinstance(value, dict) else getattr(value, "type", None)


AnyMethod = Annotated[
    Annotated[SFTConfig, Tag("sft")] | Annotated[OPDConfig, Tag("opd")] | Annotated[GRPOConfig, Tag("grpo")],
    Discriminator(_method_type),
]

# ------------------------------------------------------------------ the rest of the loop


class RolloutConfig(Section):
    """How responses are written. One step takes `prompts_per_step` x `samples_per_prompt` rollouts."""

    engine: Literal["torch"] = Field("torch", description="torch: the embedded engine, on the student's own weights.")
    prompts_per_step: int = Field(64, ge=1, description="64: Thinking Machines' default.")
    samples_per_prompt: int = Field(4, ge=1, description="4: Thinking Machines' default; grpo needs at least 2.")
    max_tokens: int = Field(1024, ge=1, description="A longer response is cut off, and gets no invented end.")
    temperature: float = Field(1.0, gt=0, description="1: rollouts are the student's own distribution.")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0: off.")
    stop: list[str] = Field(
        default_factory=list, description="Single tokens that end a response besides the model's EOS."
    )
    max_rows: int = Field(256, ge=1, description="Rows generated side by side; bounds the KV cache.")


class OptimConfig(Section):
    """The optimizer and its schedule."""

    name: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: on the matrices, AdamW on the rest; for training from nothing."
    )
    lr: float = Field(5e-5, gt=0, description="5e-5: the cookbook's on-policy default for full fine-tuning.")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="linear to 0: toy runs lose 20-30 points without decay."
    )
    warmup_steps: int = Field(0, ge=0)
    clip: float | None = Field(1.0, gt=0, description="Largest gradient norm.")
    betas: tuple[float, float] = Field(
        (0.9, 0.95), description="0.95: short runs forget old gradients sooner (the cookbook's Adam)."
    )
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0, description="0: a student that equals its teacher stays where it is.")
    muon_lr: float | None = Field(None, gt=0, description="Rate of the matrices under muon; 10 x lr if not set.")
    momentum: float = Field(0.95, ge=0, lt=1, description="Of muon.")
    tokens_per_micro_batch: int = Field(16384, ge=1, description="Bounds activations. The loss does not depend on it.")
    chunk_tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens whose logits exist at one time; chosen by the vocabulary. The loss does not depend on it.",
    )


class EvalConfig(Section):
    """When and on what the student is measured: T=1, greedy, pass@k, reverse KL to the teacher."""

    every: int = Field(20, ge=0, description="In steps; 0: only before and after. 20: the cookbook.")
    prompts: str | None = Field(None, description="File or dataset; without it the world's dev split, or none.")
    split: str = Field("dev", description="Split of the world or dataset.")
    num_prompts: int = Field(256, ge=1)
    samples: int = Field(1, ge=1, description="Samples per prompt at temperature 1; more give pass@k.")
    seed: int = Field(1234, description="Of the evaluation's own sampling: the same for every run.")
    heatmaps: int = Field(12, ge=0, description="Rollouts written with both models' top-5 for the report.")


class SaveConfig(Section):
    """Checkpoints: Hugging Face folders plus what training needs to go on."""

    every: int = Field(50, ge=0, description="In steps; 0: only at the end.")
    keep: int = Field(2, ge=1, description="Older ones are deleted.")


GuardAction = Annotated[
    Literal["off", "warn", "stop"],
    BeforeValidator(lambda value: "off" if value is False else value),  # YAML reads off as false
]


class GuardConfig(Section):
    """Collapse guards. Each compares the last steps with the run's first or best ones and speaks once per problem.

    A field that bears a guard's name is its action: off, warn, or stop (after the step, with a checkpoint)."""

    early: int = Field(
        20,
        ge=4,
        description="Steps that say how the run was at first; no alarm before they are over, but for NaN. "
        "20: Adam's oversized first steps (reverse KL x10 at step 2, gone by step 8 in toy runs) stay a minority.",
    )
    window: int = Field(
        20,
        ge=2,
        description="Steps whose median counts as now; at most `early`. 20: half of it is a delay of 10 steps, and "
        "the abrupt collapse of StableOPD (2604.08527) takes 30.",
    )
    sigmas: float = Field(
        5.0,
        gt=0,
        description="A change must also be this many deviations of a window's median. 5: of flat toy rewards (0.1, 64 "
        "rollouts a step) 4 called 5 of 80 runs falling, 5 none.",
    )
    length_inflation: GuardAction = Field("warn", description="Responses grow, and nothing gets better.")
    length_ratio: float = Field(
        1.2, gt=1, description="Growth of responses without gain. 1.2: a toy collapse went from 5.5 to 7.2."
    )
    cut_off: GuardAction = Field("warn", description="More responses reach the token limit.")
    cut_off_rise: float = Field(
        0.1, gt=0, lt=1, description="Rise of the cut-off share. 0.1: 0 to 0.17 when raw OPD burst."
    )
    cut_off_share: float = Field(
        0.6, gt=0, le=1, description="Share that is too high from the start. StableOPD's stable phases: to 0.5."
    )
    repetition: GuardAction = Field("warn", description="Responses repeat themselves.")
    repetition_ngram: int = Field(
        8, ge=2, description="Tokens of a repeated n-gram. 8: healthy mathematics repeats 18% of its 4-grams."
    )
    repetition_rise: float = Field(
        0.1, gt=0, lt=1, description="0.1: StableOPD saw 0 before its collapse and 0.25-0.35 after."
    )
    entropy_collapse: GuardAction = Field("warn", description="The student becomes certain of everything.")
    entropy_share: float = Field(
        0.33,
        gt=0,
        lt=1,
        description="Of the first or the teacher's entropy, whichever is less. 0.33: RL has spent 73% of its entropy "
        "and 76% of its gain at 200 of 2400 steps (2505.22617).",
    )
    overlap_falling: GuardAction = Field("warn", description="Student and teacher have fewer likely tokens in common.")
    overlap_drop: float = Field(
        0.05, gt=0, lt=1, description="Below the best window. Rethinking-OPD: it grows, 0.72 to 0.91."
    )
    kl_rising: GuardAction = Field("warn", description="The student moves away from the teacher, and gains no reward.")
    kl_ratio: float = Field(
        1.5, gt=1, description="Above the lowest window, without more reward. 1.5: healthy toy windows vary by 1.3."
    )
    reward_falling: GuardAction = Field("warn", description="The reward falls from its best and stays there.")
    reward_drop: float = Field(
        0.25,
        gt=0,
        description="Relative, below the best window. 0.25: toy runs recovered from dips of 18%, not from 28%.",
    )
    student_stuck: GuardAction = Field(
        "warn", description="No gradient, or groups of equal rewards, and nothing moves."
    )
    stuck_grad_norm: float = Field(1e-4, gt=0, description="A gradient that is none. Published runs have 0.4 to 20.")
    stuck_equal_groups: float = Field(
        0.9, gt=0, le=1, description="Prompts whose samples all got one reward: GRPO learns nothing there."
    )
    style_overfit: GuardAction = Field("warn", description="The teacher's style is learnt and its skill is not.")
    style_drop: float = Field(
        0.05, gt=0, lt=1, description="Fall of pass@k at two evaluations running, while the reverse KL falls."
    )
    not_finite: GuardAction = Field(
        "warn", description="The loss or the gradient is NaN or infinite; the step is skipped."
    )
    mask_cut_off: bool = Field(
        False,
        description="Learn nothing from rollouts that were cut off (DAPO's overlong filter, 2503.14476). Off: each token's "
        "signal is sound; turn it on when cut-off rollouts take over (StableOPD).",
    )

    @model_validator(mode="after")
    def _windows(self) -> "GuardConfig":
        if self.window > self.early:
            raise ValueError(
                f"window is {self.window} and early is {self.early}: write a window of at most early steps"
            )
        return self


class Recipe(Section):
    """A whole run. `student`, `teacher` (where the method has one) and `data` have no default."""

    student: StudentConfig
    teacher: TeacherConfig | None = None
    data: DataConfig
    method: AnyMethod = OPDConfig()
    rollout: RolloutConfig = RolloutConfig()
    optim: OptimConfig = OptimConfig()
    steps: int = Field(150, ge=1, description="150: Thinking Machines' reasoning run.")
    eval: EvalConfig = EvalConfig()
    save: SaveConfig = SaveConfig()
    guards: GuardConfig = GuardConfig()
    seed: int = 0
    device: str = Field("auto", description="auto: cuda if there is one.")
    threads: int | None = Field(None, ge=1, description="torch threads; 1 makes runs repeat bit for bit.")
    output: str = "runs/run"

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if self.method.needs_teacher() and self.teacher is None:
            raise ValueError(
                f"method {_method_type(self.method)} needs a teacher: write teacher: {{model: folder-or-name}}"
            )
        if isinstance(self.method, GRPOConfig) and self.rollout.samples_per_prompt < 2:
            raise ValueError("grpo compares the samples of a prompt: write rollout.samples_per_prompt of 2 or more")
        truncated = self.rollout.top_p < 1 or self.rollout.top_k > 0
        if isinstance(self.method, GRPOConfig) and truncated:
            raise ValueError("grpo's importance ratio needs untruncated rollouts: drop rollout.top_p and rollout.top_k")
        if isinstance(self.method, OPDConfig) and self.method.support == "sampled":
            if truncated or self.rollout.temperature != 1:
                raise ValueError(
                    "support: sampled needs rollouts from the student's own distribution: "
                    "write rollout.temperature=1 without top_p and top_k, or method.support=full"
                )
            if self.method.divergence != "reverse_kl":
                raise ValueError(
                    "support: sampled estimates reverse_kl only: write method.support=full for another divergence"
                )
        return self


# ------------------------------------------------------------------ reading


def load(source: "str | Path | dict | Recipe", overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """A checked recipe from a YAML file, a dict or a recipe, with `a.b=value` overrides (values are YAML)."""
    if isinstance(source, Recipe):
        tree = source.model_dump(mode="json", exclude_unset=True)
    elif isinstance(source, dict):
        tree = json.loads(json.dumps(source))
    else:
        tree = _read(Path(source))
    for override in overrides:
        _assign(tree, override)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(_explain(error, tree)) from None


def _read(path: Path) -> dict:
    if not path.is_file():
        raise RecipeError(f"there is no recipe at {path}")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{path} holds no recipe: it must start with keys such as student: and data:")
    return tree


def _assign(tree: dict, override: str) -> None:
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise RecipeError(f"cannot read the override {override!r}: write a.b=value, such as optim.lr=1e-4")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    *parents, last = path.strip().split(".")
    node = tree
    for name in parents:
        if not isinstance(node.get(name), dict):
            node[name] = {}
        node = node[name]
    node[last] = value


def _explain(error: ValidationError, tree: dict) -> str:
    lines = []
    for problem in error.errors():
        place = ".".join(str(part) for part in _without_tags(problem["loc"]))
        match problem["type"]:
            case "extra_forbidden":
                lines.append(f"unknown key {place}{_nearest(problem['loc'])}")
            case "missing":
                lines.append(f"{place} is missing")
            case "union_tag_invalid" | "union_tag_not_found":
                given = _method_type(problem.get("input"))
                near = difflib.get_close_matches(str(given), METHOD_CONFIGS, 1)
                hint = f"; did you mean {near[0]}?" if near else ""
                lines.append(f"unknown method {given!r}: method.type is one of {', '.join(METHOD_CONFIGS)}{hint}")
            case "value_error":
                lines.append((f"{place}: " if place else "") + problem["msg"].removeprefix("Value error, "))
            case _:
                lines.append(f"{place}: {problem['msg'][0].lower()}{problem['msg'][1:]}, got {problem['input']!r}")
    return "; ".join(lines)


def _without_tags(location: tuple) -> list:
    """pydantic puts the tag of a union (`opd`) into the path; people did not write it."""
    parts = list(location)
    if len(parts) > 1 and parts[0] == "method" and parts[1] in METHOD_CONFIGS:
        del parts[1]
    return parts


def _nearest(location: tuple) -> str:
    section: Any = Recipe
    for part in location[:-1]:
        if section is Recipe and part == "method":
            continue
        if part in METHOD_CONFIGS:
            section = METHOD_CONFIGS[part]
            continue
        section = _section_of(section.model_fields[part].annotation)
    names = list(section.model_fields)
    near = difflib.get_close_matches(str(location[-1]), names, 1, cutoff=0.5)
    return f": did you mean {near[0]}?" if near else f": it has {', '.join(names)}"


def _section_of(annotation: Any) -> type[Section]:
    options = getattr(annotation, "__args__", (annotation,))
    return next(option for option in options if isinstance(option, type) and issubclass(option, Section))


def dump(recipe: Recipe) -> str:
    """The whole recipe as YAML, defaults included, so that a run folder says all that was used."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def json_schema() -> dict:
    """For editors: put `# yaml-language-server: $schema=recipe.schema.json` at the head of a recipe."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}
