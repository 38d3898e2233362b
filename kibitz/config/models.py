"""The sections of a recipe that name a model: how it is loaded, frozen or trained."""

from typing import Literal

from pydantic import Field, model_validator

from kibitz.config.base import Section


class ModelConfig(Section):
    """A Hugging Face causal language model with its tokenizer and chat template."""

    model: str = Field(description="Folder of a Hugging Face checkpoint (safetensors), or a name on the hub.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="auto: float32 on a CPU (bf16 log-probs are off by 5e-3 there), bfloat16 on a GPU. What learns in bfloat16 "
        "has a float32 master copy in the optimizer.",
    )
    attention: Literal["auto", "sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3"] = Field(
        "auto", description="Kernel of the attention, by transformers' names. auto: its choice, mostly sdpa."
    )
    compile: bool = Field(
        False,
        description="Compile each layer's forward and backward pass (torch.compile). That takes half a minute, and later steps "
        "less time; numbers differ by rounding from those of a model that is not compiled. Set in no section, on CUDA: "
        "models of 50 million parameters and more, where a check at the start finds nothing but rounding.",
    )
    trust_remote_code: bool = Field(
        False, description="Run Python code that comes with the checkpoint. Off: it is a risk."
    )


class FrozenConfig(ModelConfig):
    """A frozen model, with settings that reduce its memory."""

    quantize: Literal["int8", "nf4"] | None = Field(
        None,
        description="int8: the matrices of its layers in 8 bits, and what they are multiplied with, but for outliers (LLM.int8, "
        "2208.07339), by bitsandbytes; nf4: the matrices in 4 bits (QLoRA, 2305.14314). Embedding and output head stay as dtype "
        "says. Half and a quarter of bfloat16's memory; docs/teachers.md says how far the log-probabilities move. It then "
        "scores and does not write.",
    )
    offload: Literal["body", "layers"] | None = Field(
        None,
        description="Keep the weights in the CPU's memory while they are not needed. body: all come to the GPU while it scores; "
        "layers: one after another for each micro-batch, for a model that is larger than the GPU. The output head, which the "
        "loss needs, stays there. No number changes. It then scores and does not write. On a CPU there is nothing to move.",
    )

    @model_validator(mode="after")
    def _not_compiled(self) -> "FrozenConfig":
        if self.compile and (self.quantize or self.offload):
            raise ValueError("a model with quantize or offload cannot be compiled: leave out compile")
        return self


class LoraConfig(Section):
    """Low-rank adapters: W' = W + s B A with W frozen (2106.09685). Sources: LoRA Without Regret, Thinking Machines 2025."""

    rank: int = Field(
        32, ge=1, description="Rank of A and B. 32: their library's default; long reasoning runs took 128."
    )
    alpha: float = Field(32.0, gt=0, description="s = alpha / rank. 32: their alpha, at every rank.")
    rslora: bool = Field(
        False, description="s = alpha / sqrt(rank) (2312.03732), so that high ranks learn as fast as low ones."
    )
    targets: Literal["all-linear"] | list[str] = Field(
        "all-linear",
        description="all-linear: attention and MLP, not the output head; attention alone learns less at equal size. Or a "
        "list of module names, such as [q_proj, v_proj].",
    )
    init: Literal["kaiming", "gaussian"] = Field(
        "kaiming",
        description="Initialization of A; B starts at 0, so the student starts as its base. kaiming: peft's default.",
    )
    dropout: float = Field(0.0, ge=0, description="Must be 0: the student would disagree with its own rollouts.")

    @model_validator(mode="after")
    def _possible(self) -> "LoraConfig":
        if self.dropout:
            raise ValueError(
                "dropout would make the student disagree with the log-probabilities that it sampled with: leave it out"
            )
        if not self.targets:
            raise ValueError("targets is empty and nothing would learn: write all-linear, or names such as [q_proj]")
        return self


class StudentConfig(ModelConfig):
    """The model that writes the rollouts and is trained."""

    lora: LoraConfig | None = Field(
        None, description="Train adapters only, such as {rank: 32}. Without it every weight learns."
    )
    quantize: Literal["nf4"] | None = Field(
        None,
        description="nf4: the base under the adapters in 4 bits (QLoRA, 2305.14314), by bitsandbytes; a quarter of bfloat16's "
        "memory. It writes, scores and learns as rounded; `kibitz export --merge` adds what was learnt to the rounded numbers.",
    )

    @model_validator(mode="after")
    def _only_a_base(self) -> "StudentConfig":
        if self.quantize is not None and self.lora is None:
            raise ValueError(
                "quantize: weights of 4 bits cannot learn, an adapter on them can: write lora={rank: 32}, or leave out quantize"
            )
        if self.quantize is not None and self.compile:
            raise ValueError("a model with quantize cannot be compiled: leave out compile")
        return self
