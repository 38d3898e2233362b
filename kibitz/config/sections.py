"""The sections of a recipe that every method reads: data, rollouts, optimizer, evaluation, checkpoints."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from kibitz.config.base import Section
from kibitz.config.servers import RolloutServerConfig, ServerURL


class Columns(Section):
    """Names of the columns in your file, where they differ from kibitz's. A dotted one, such as `reward_model.ground_truth`,
    names a part of an object."""

    prompt: str = "prompt"
    answer: str = "answer"
    response: str = "response"
    task: str = "task"
    route: str = "route"


class DataConfig(Section):
    """The source of the prompts: a file, a `datasets` name, a toy world, or a family of reasoning-gym's tasks."""

    prompts: str | None = Field(None, description="JSONL, parquet, or a name for `datasets.load_dataset`.")
    subset: str | None = Field(
        None, description="Configuration of a data set that has several, such as main of openai/gsm8k."
    )
    world: str | None = Field(None, description="A toy world that a CPU can learn; see `kibitz worlds`.")
    reasoning_gym: dict[str, Any] | None = Field(
        None,
        description="A family of the package reasoning-gym (kibitz[tasks]) by its name, with settings of its own, such as {name: "
        "chain_sum, max_terms: 3}: problems without end, and the family judges every answer.",
    )
    split: str = Field("train", description="Split of the dataset, world or family.")
    columns: Columns = Columns()
    system: str | None = Field(None, description="System message put before every `prompt`.")
    template: dict[str, Any] = Field(
        default_factory=dict, description="Arguments of the chat template, such as {enable_thinking: false}."
    )
    grader: str = Field(
        "auto",
        description="exact, math, choice, constraints, constraints_strict, ifeval or ifeval_strict (IFEval's own checkers, "
        "kibitz[evals]), code (unit tests in a confined process), or auto: the world's or family's own, else by what the answers "
        "are: choice for letters, math where each answer is right by itself, exact for others.",
    )
    limit: int | None = Field(
        None,
        ge=1,
        description="Use only so many rows; a world makes this many (default 20000), a family of tasks too (default 2000).",
    )
    pick: Literal["first", "random"] = Field(
        "first", description="Which rows `limit` leaves: random ones are the same for every seed of the run."
    )
    max_prompt_tokens: int = Field(
        1024, ge=1, description="Limit on the rendered prompt. 1024: Thinking Machines' cookbook."
    )
    too_long: Literal["error", "drop"] = Field(
        "error", description="The treatment of a longer prompt. drop: it is left out; `kibitz check` says how many are."
    )
    shuffle: bool = Field(True, description="A new order each epoch, decided by the seed.")
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the world, such as {corrupted: 0.9}.")

    @model_validator(mode="after")
    def _one_source(self) -> "DataConfig":
        given = [one for one in (self.prompts, self.world, self.reasoning_gym) if one is not None]
        if len(given) != 1:
            raise ValueError(
                "write either data.prompts (a file or dataset name), or data.world (a toy world), or data.reasoning_gym (a "
                "family of tasks), one of them"
            )
        if self.reasoning_gym is not None and not isinstance(self.reasoning_gym.get("name"), str):
            raise ValueError("reasoning_gym: it needs the name of a family: write reasoning_gym={name: chain_sum}")
        return self

    @property
    def source(self) -> str:
        """What the prompts come from, as an error calls it."""
        return self.prompts or self.world or str((self.reasoning_gym or {}).get("name"))


class RolloutConfig(Section):
    """The sampling of responses. One step takes `prompts_per_step` x `samples_per_prompt` rollouts."""

    engine: Literal["torch", "vllm"] = Field(
        "torch",
        description="torch: the embedded engine, on the student's own weights; vllm: the servers at urls, or servers "
        "that the run starts and ends.",
    )
    urls: list[ServerURL] = Field(
        default_factory=list,
        description="For engine: vllm: addresses of the student's servers, asked in turn. None: the run starts its own.",
    )
    server: RolloutServerConfig = RolloutServerConfig()
    max_staleness: int = Field(
        0,
        ge=0,
        le=1,
        description="By how many steps the weights that wrote a rollout may be older than the student that learns from it. 1: "
        "servers write the next rollouts while this step trains, for several processes each its share (AsyncOPD, 2606.24143); "
        "the embedded engine writes the same text before it, which saves no time and shows what staleness does. 0: on-policy.",
    )
    prompts_per_step: int = Field(64, ge=1, description="64: Thinking Machines' default.")
    samples_per_prompt: int = Field(4, ge=1, description="4: Thinking Machines' default; grpo needs at least 2.")
    max_tokens: int = Field(1024, ge=1, description="A longer response is cut off, and gets no invented end.")
    temperature: float = Field(1.0, gt=0, description="1: rollouts are the student's own distribution.")
    top_p: float = Field(1.0, gt=0, le=1, description="1: off, so that log-probabilities are the student's own.")
    top_k: int = Field(0, ge=0, description="0: off.")
    epsilon: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the student's tokens drawn uniformly from the vocabulary, its end included: exploration. 0: "
        "off, published runs explore by temperature.",
    )
    stop: list[str] = Field(
        default_factory=list, description="Single tokens that end a response besides the model's EOS."
    )
    store: bool = Field(
        False, description="Keep every rollout in stored.jsonl of the run, for method.rollouts of another (2604.13010)."
    )
    max_rows: int = Field(
        256, ge=1, description="Rows generated side by side; bounds the KV cache. On a GPU no more than fit."
    )
    dtype: Literal["same", "bfloat16"] = Field(
        "same",
        description="same: the student's. bfloat16: the embedded engine's matrix products on a CPU that is faster in it (kibitz "
        "check measures it). A rounded student then writes, and its log-probabilities are kept.",
    )

    @model_validator(mode="after")
    def _engine_and_urls(self) -> "RolloutConfig":
        if self.engine != "vllm" and self.urls:
            raise ValueError("urls belong to engine: vllm: write rollout.engine=vllm, or drop rollout.urls")
        if self.max_staleness and self.server.sleep is True:
            raise ValueError("max_staleness: 1 keeps servers busy while the student learns: drop rollout.server.sleep")
        if self.engine == "vllm" and self.dtype != "same":
            raise ValueError(
                "rollout.dtype is the embedded engine's, and servers write in the dtype that they are started with: drop it"
            )
        if self.engine == "vllm" and self.epsilon:
            raise ValueError("vLLM draws no tokens uniformly: write rollout.engine=torch, or drop rollout.epsilon")
        if self.engine == "vllm" and self.temperature > 2:
            raise ValueError(
                "vLLM takes temperatures up to 2: lower rollout.temperature, or write rollout.engine=torch"
            )
        return self

    @property
    def truncated(self) -> bool:
        """True if `top_p` or `top_k` cuts tokens from the distribution that is sampled."""
        return self.top_p < 1 or self.top_k > 0


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value  # YAML has lists only


class OptimConfig(Section):
    """The optimizer and its schedule."""

    name: Literal["adamw", "adamw_8bit", "muon", "sgd"] = Field(
        "adamw",
        description="adamw_8bit: moments of 8 bits, 2 bytes a parameter instead of 8 (2110.02861), by bitsandbytes; muon: on the "
        "matrices, AdamW on the rest; for training from scratch. sgd: the gradient itself, at rates some 100 times as high.",
    )
    lr: float = Field(
        5e-5,
        gt=0,
        description="5e-5: the cookbook's on-policy default for full fine-tuning. Its LoRA runs take 1e-4; LoRA Without "
        "Regret finds the best LoRA rate at 10 x that of full fine-tuning.",
    )
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="linear to 0: toy runs lose 20-30 points without decay."
    )
    warmup_steps: int = Field(
        0, ge=0, description="Steps of linear warm-up. 0: the cookbook; toy runs from AdamW's first step want 10."
    )
    clip: float | None = Field(1.0, gt=0, description="Largest gradient norm.")
    betas: Annotated[tuple[float, float], BeforeValidator(_pair)] = Field(
        (0.9, 0.95), description="0.95: short runs forget old gradients sooner (the cookbook's Adam)."
    )
    eps: float = Field(1e-8, gt=0, description="Epsilon of AdamW. 1e-8: PyTorch's default.")
    weight_decay: float = Field(0.0, ge=0, description="0: a student that equals its teacher stays where it is.")
    muon_lr: float | None = Field(None, gt=0, description="Rate of the matrices under muon; 10 x lr if not set.")
    momentum: float = Field(0.95, ge=0, lt=1, description="Momentum of muon.")
    sgd_momentum: float = Field(0.0, ge=0, lt=1, description="Momentum of sgd. 0: off, PyTorch's default.")
    tokens_per_micro_batch: int = Field(
        16384,
        ge=1,
        description="Bounds activations. The loss does not depend on it. Not set: up to the default, as many as fit on a GPU, "
        "or as keep 224 MiB of activations on a CPU.",
    )
    packing: bool | Literal["auto"] = Field(
        "auto",
        description="Concatenate the rows of a micro-batch instead of padding them. auto: where attention has a kernel for "
        "unequal rows (flash, flex); other kernels pay the square of tokens_per_micro_batch. The loss does not depend on it.",
    )
    hidden_states: Literal["auto", "device", "cpu"] = Field(
        "auto",
        description="Place of the teacher's hidden states until the loss needs them. cpu: page-locked memory, from where each "
        "chunk of the loss takes its own. auto: cpu if models are on a GPU and a step keeps more than 1 GiB, which takes longer "
        "to compute than to carry. The loss does not depend on it; signal_bytes in metrics.jsonl says how large they are.",
    )
    checkpointing: bool = Field(
        False,
        description="Keep each layer's input only and recompute the rest in the backward pass: less memory, a third more "
        "time. The loss does not depend on it. Not set, on a GPU: true where the longest rollout or 4,096 tokens would not fit.",
    )
    chunk_tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens whose logits exist at one time. null: chosen by the vocabulary, on a GPU by its free memory. The "
        "loss does not depend on it.",
    )


class EvalConfig(Section):
    """The evaluation of the student: accuracy at T=1 and greedy, pass@k, and reverse KL to the teacher."""

    every: int = Field(
        20, ge=0, description="Steps between evaluations; 0: only before and after the run. 20: the cookbook."
    )
    prompts: str | None = Field(
        None,
        description="File or dataset. Without it the world's dev split; without a world the first `heatmaps` of training, "
        "and the report says so.",
    )
    split: str = Field("dev", description="Split of the world or dataset.")
    num_prompts: int = Field(
        256, ge=1, description="Number of prompts. 256 give an interval of about 12 points at 50%."
    )
    samples: int = Field(1, ge=1, description="Samples per prompt at temperature 1; more give pass@k.")
    seed: int = Field(1234, description="Seed of the evaluation's sampling, the same for every run.")
    heatmaps: int = Field(
        12, ge=0, description="Number of rollouts annotated with both models' top 5 tokens for the report."
    )


class ParallelConfig(Section):
    """The division of one student over the processes that torchrun started (FSDP2); see docs/machines.md."""

    shard: int | None = Field(
        None, ge=1, description="Processes that hold one copy of the weights and moments between them; all, if not set."
    )
    replicate: int = Field(
        1, ge=1, description="Such copies (HSDP): above 1, whole weights travel inside a machine only."
    )
    whole_copy: bool = Field(
        True,
        description="Each process holds, beside its part of the student, a whole one that writes and reads fast. false: none "
        "ever does, for students larger than a device; every pass is then one of all processes.",
    )
    reduce_gradients: Literal["auto", "step", "micro_batch"] = Field(
        "auto",
        description="With whole_copy, when gradients are summed over the processes. step: once, after each has accumulated whole "
        "ones, 4 bytes a parameter; micro_batch: each time, so that each keeps its part. auto: micro_batch where whole ones "
        "would take a quarter of what is free of a GPU. The sum is the same.",
    )
    shard_teacher: bool = Field(
        False,
        description="Split the layers of a teacher in this process as well: less memory, more communication. Off: each process "
        "holds it whole.",
    )


class SaveConfig(Section):
    """Checkpoints: Hugging Face folders plus what training needs to go on."""

    every: int = Field(50, ge=0, description="Steps between checkpoints; 0: only at the end.")
    keep: int = Field(2, ge=1, description="Number of checkpoints to keep; older ones are deleted.")
    background: bool | None = Field(
        None,
        description="Go on training while a checkpoint is written, but for the last one; a run that is killed meanwhile goes on "
        "from the one before. Several processes wait for it all the same. null: on a GPU.",
    )


class TrackConfig(Section):
    """A tracker that also gets the metrics. Its keys stand in the environment (WANDB_API_KEY), never in a recipe."""

    to: Literal["tensorboard", "wandb", "trackio"] = Field(
        description="tensorboard: files in the folder of the run; wandb; trackio: a local database. Extras of the same names."
    )
    project: str = Field("kibitz", pattern=r"^[\w.-]+$", description="Project, for wandb and trackio.")
    name: str | None = Field(None, pattern=r"^[\w. -]+$", description="Name of the run. null: the name of its folder.")
