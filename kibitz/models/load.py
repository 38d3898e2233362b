"""Hugging Face models as students and teachers: one body, one output head, one vocabulary.

The body gives hidden states, the head turns some of them into logits; the loss multiplies the head chunk by chunk.
Logits are cut to the tokenizer's size, because models of one family pad their vocabularies differently.
"""

import os
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from kibitz.config import ModelConfig, StudentConfig
from kibitz.models import lora
from kibitz.models.language_model import LanguageModel

transformers_logging.disable_progress_bar()  # kibitz draws its own


# ------------------------------------------------------------------ loading


def pick_device(name: str = "auto") -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return getattr(torch, name)


def check_folder(name: str, role: str) -> None:
    """That `name` can be a model, or an adapter whose base can be one, before anything is loaded from it."""
    path = Path(name)
    if lora.is_adapter(path):
        lora.require_peft()
        check_folder(lora.base_of(path), f"{role}.model: {name} adapts another model; {role}")
    elif path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{role}.model: {name} is not a model: it has no config.json")
        if not any(path.glob("*.safetensors")):
            raise ValueError(
                f"{role}.model: {name} holds no *.safetensors; pickled weights are not loaded, convert them first"
            )
    elif path.exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise ValueError(f"{role}.model: there is no model folder at {name}")


def load_tokenizer(config: ModelConfig, role: str) -> PreTrainedTokenizerBase:
    check_folder(config.model, role)
    try:
        AutoConfig.from_pretrained(lora.base_or_self(config.model), trust_remote_code=config.trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(config.model, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # whatever a broken folder makes transformers raise
        raise ValueError(_unreadable(config.model, role, error)) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{role}.model: the tokenizer of {config.model} has no EOS token, so no response could ever end"
        )
    return tokenizer


def load_model(
    config: ModelConfig, role: str, device: torch.device, tokenizer: PreTrainedTokenizerBase | None = None
) -> LanguageModel:
    """The model of a recipe's `student` or `teacher` section, on a device; of an adapter's folder, base and adapter as one."""
    tokenizer = tokenizer or load_tokenizer(config, role)
    return _compiled(config, LanguageModel(load_weights(config, role, device).to(device), tokenizer, name=role))


def load_student(
    config: StudentConfig,
    device: torch.device,
    tokenizer: PreTrainedTokenizerBase,
    seed: int = 0,
    resumed_from: Path | None = None,
) -> LanguageModel:
    """The model to train, as the recipe's `student` begins or as a checkpoint left it. `seed` draws a new adapter."""
    if config.lora is None:
        began = config if resumed_from is None else config.model_copy(update={"model": str(resumed_from)})
        return load_model(began, "student", device, tokenizer)
    if lora.is_adapter(config.model):
        raise ValueError(
            f"student.model: {config.model} is an adapter itself: write a whole folder of it by "
            "`kibitz export FOLDER --merge --output NEW`, and student.model=NEW"
        )
    model = load_weights(config, "student", device)
    adapter = lora.attach(model, config.lora, seed) if resumed_from is None else lora.load(model, resumed_from)
    return _compiled(config, LanguageModel(model.to(device), tokenizer, "student", adapter))


def _compiled(config: ModelConfig, model: LanguageModel) -> LanguageModel:
    if config.compile:
        model.compile_body()
    return model


def load_weights(config: ModelConfig, role: str, device: torch.device, **options: Any) -> Any:
    """The bare model, still on the CPU, in the dtype that `device` wants. `options` are transformers' own."""
    is_adapter = lora.is_adapter(config.model)
    attention = {} if config.attention == "auto" else {"attn_implementation": config.attention}
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            lora.base_of(config.model) if is_adapter else config.model,
            dtype=pick_dtype(config.dtype, device),
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
            **attention,
            **options,
        )
        return lora.merged(model, Path(config.model)) if is_adapter else model
    except Exception as error:
        raise ValueError(_unreadable(config.model, role, error)) from error


def _unreadable(name: str, role: str, error: Exception) -> str:
    if not os.path.isdir(name):
        return f"{role}.model: {name} is neither a folder here nor a model on the hub"
    return f"{role}.model: {name} is not a model that transformers can load: {' '.join(str(error).split())[:300]}"


def check_same_tokenizer(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, other: str = "teacher"
) -> None:
    """The teacher (or the `other` model) reads the student's token ids, so both must mean the same text by them."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return
    token = min(
        ours.keys() ^ theirs.keys() or {t for t in ours if ours[t] != theirs[t]},
        key=lambda t: ours.get(t, theirs.get(t, 0)),
    )
    raise ValueError(
        f"student and {other} have different tokenizers ({len(ours)} and {len(theirs)} tokens; {token!r} is "
        f"{ours.get(token, 'missing')} for the student and {theirs.get(token, 'missing')} for the {other}): "
        f"choose a {other} of the student's family"
        + (
            ", or align their text: write teacher.tokenizer=own and method.support=sampled"
            if other == "teacher"
            else ""
        )
    )


def stop_ids(model: LanguageModel, stop: list[str]) -> tuple[int, ...]:
    return end_ids(model.tokenizer, model.model.generation_config, stop)


def end_ids(tokenizer: Any, settings: Any, stop: list[str]) -> tuple[int, ...]:
    """All tokens that end a response: the tokenizer's EOS, those of the generation settings, and the recipe's."""
    ids: set[Any] = {tokenizer.eos_token_id}
    configured = getattr(settings, "eos_token_id", None)
    ids.update(configured if isinstance(configured, list) else [] if configured is None else [configured])
    ids.update(single_tokens(tokenizer, stop, "rollout.stop"))
    return tuple(sorted(ids))


def single_tokens(tokenizer: Any, texts: list[str], where: str) -> tuple[int, ...]:
    """The token that each text is; refused where it is several, none or unknown. `where` is the recipe's key."""
    ids: list[int] = []
    for text in texts:
        encoded = tokenizer.encode(text, add_special_tokens=False)
        if len(encoded) != 1:
            raise ValueError(f"{where}: {text!r} is {len(encoded)} tokens for this tokenizer; write a single token")
        if encoded == [tokenizer.unk_token_id] and text != tokenizer.unk_token:
            raise ValueError(f"{where}: {text!r} is unknown to this tokenizer; write a token of its vocabulary")
        ids += encoded
    return tuple(ids)
