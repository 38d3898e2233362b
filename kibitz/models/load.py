"""Loading of Hugging Face models and tokenizers: folders are checked first, adapters are merged, stop tokens collected."""

import importlib.util
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME
from transformers.utils.hub import cached_file

from kibitz.config import ModelConfig, StudentConfig
from kibitz.data import check_template, turn_end
from kibitz.models import lora, quantized
from kibitz.models.folders import (
    broken_json,
    check_finite,
    check_folder,
    check_index,
    check_loaded,
    lacks_tokenizer,
    where,
)
from kibitz.models.language_model import LanguageModel
from kibitz.models.progress import no_progress_bars
from kibitz.types import is_gpu

SMALLEST = 256
"""The fewest tokens of a tokenizer that needs no file: one for each byte."""


def pick_device(name: str = "auto") -> torch.device:
    """The device of that name; `auto` is a GPU if there is one. Raise ValueError for one that this machine lacks."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(
            f"device: there is no kind of device named {name!r}: write auto, cpu, cuda or cuda:0"
        ) from None
    if device.type == "cuda":  # counted, because a tensor would take memory for a context
        there = (device.index or 0) < torch.cuda.device_count()
    else:
        there = device.type != "meta" and _holds_tensors(device)
    if not there:
        raise ValueError(f"device: this machine has no {name!r} that torch can use: write auto or cpu")
    return device


def _holds_tensors(device: torch.device) -> bool:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        return False
    return True


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return getattr(torch, name)


@no_progress_bars()
def load_tokenizer(config: ModelConfig, role: str) -> PreTrainedTokenizerBase:
    check_folder(config.model, role)
    try:
        AutoConfig.from_pretrained(lora.base_or_self(config.model), trust_remote_code=config.trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(config.model, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # whatever a broken folder makes transformers raise
        if lacks_tokenizer(config.model):
            raise ValueError(_no_tokenizer(config.model, role)) from None
        raise ValueError(_unreadable(config.model, role, error)) from error
    if len(tokenizer) < SMALLEST and lacks_tokenizer(
        config.model
    ):  # transformers makes an empty one of the model's type
        raise ValueError(_no_tokenizer(config.model, role))
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{where(role)}: the tokenizer of {config.model} has no EOS token, so no response could ever end"
        )
    try:
        check_template(tokenizer)
    except ValueError as error:
        raise ValueError(f"{where(role)}: {config.model}: {error}") from None
    return tokenizer


def position_limit(config: ModelConfig) -> int | None:
    """The longest sequence, in tokens, that a model's configuration allows, without its weights; None where it sets none, or
    where there is none, which loading the model refuses."""
    with suppress(OSError, ValueError):
        settings = AutoConfig.from_pretrained(
            lora.base_or_self(config.model), trust_remote_code=config.trust_remote_code
        )
        return getattr(settings.get_text_config(), "max_position_embeddings", None)
    return None


def without_weights(model: str, dtype: torch.dtype | None = None, trust_remote_code: bool = False) -> Any:
    """The transformers model of that folder or name on torch's `meta` device, built from its config.json alone: sizes without
    memory."""
    settings = AutoConfig.from_pretrained(lora.base_or_self(model), trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(settings, dtype=dtype, trust_remote_code=trust_remote_code)


def load_model(
    config: ModelConfig, role: str, device: torch.device, tokenizer: PreTrainedTokenizerBase | None = None
) -> LanguageModel:
    """The model of a recipe's `student` or `teacher` section, on `device`; an adapter is merged into its base."""
    tokenizer = tokenizer or load_tokenizer(config, role)
    model = load_weights(config, role, device, **straight_to(device))
    return LanguageModel(model.to(device), tokenizer, role, compiled=config.compile)


def straight_to(device: torch.device) -> dict[str, Any]:
    """The options that load weights onto a GPU without a copy in host memory, of which each of several processes would hold
    one."""
    if not is_gpu(device) or importlib.util.find_spec("accelerate") is None:
        return {}
    index = torch.get_device_module(device).current_device() if device.index is None else device.index
    return {"device_map": {"": torch.device(device.type, index)}}


def load_student(
    config: StudentConfig,
    device: torch.device,
    tokenizer: PreTrainedTokenizerBase,
    seed: int = 0,
    resumed_from: Path | None = None,
) -> LanguageModel:
    """The model to train, from the recipe's `student` section or from the checkpoint `resumed_from`. `seed` initializes
    a new adapter."""
    if config.lora is None:
        source = config if resumed_from is None else config.model_copy(update={"model": str(resumed_from)})
        return load_model(source, "student", device, tokenizer)
    if lora.is_adapter(config.model):
        raise ValueError(
            f"student.model: {config.model} is an adapter itself: write a whole folder of it by "
            "`kibitz export FOLDER --merge --output NEW`, and student.model=NEW"
        )
    quantized.require(config.quantize, config.model, "student", config.trust_remote_code)
    options = quantized.loading(config.quantize, pick_dtype(config.dtype, device), device)
    model = load_weights(config, "student", device, **(options or straight_to(device)))
    if options:
        quantized.finish(model)
    adapter = lora.attach(model, config.lora, seed) if resumed_from is None else lora.load(model, resumed_from)
    if resumed_from is not None:
        check_finite(model, str(resumed_from), "student")
    return LanguageModel(model if options else model.to(device), tokenizer, "student", adapter, compiled=config.compile)


@no_progress_bars()
def load_weights(config: ModelConfig, role: str, device: torch.device, **options: Any) -> Any:
    """The bare transformers model, on the CPU unless `options` place it, in the dtype of the section, whose default
    depends on `device`. `options` go to `from_pretrained`."""
    check_folder(config.model, role)
    is_adapter = lora.is_adapter(config.model)
    base = lora.base_or_self(config.model)
    dtype = pick_dtype(config.dtype, device)
    rounded = quantized.recorded(config.model, role) if is_adapter else None
    if rounded is not None:
        options = quantized.loading("nf4", rounded, torch.device("cpu"))
    attention = {} if config.attention == "auto" else {"attn_implementation": config.attention}
    if (index := _index_on_hub(base)) is not None:
        check_index(index, role)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            base,
            dtype=rounded or dtype,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **attention,
            **options,
        )
    except Exception as error:
        raise ValueError(_unreadable(config.model, role, error)) from error
    model, info = loaded
    check_loaded(model, info, base, role)
    check_finite(model, base, role)
    try:
        if rounded is not None:
            model = quantized.whole(model).to(dtype)
        if is_adapter:
            model = lora.merged(model, Path(config.model))
            if (settings := lora.settings_of(config.model)) == config.model:
                model.generation_config = GenerationConfig.from_pretrained(settings)
        return model
    except Exception as error:
        raise ValueError(_unreadable(config.model, role, error)) from error


def _index_on_hub(name: str) -> Path | None:
    """The index of a model on the hub, if it has one; a folder's is checked before."""
    if Path(name).is_dir():
        return None
    try:
        found = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):  # no hub or no such model, of which loading says more
        return None
    return None if found is None else Path(found)


def _no_tokenizer(name: str, role: str) -> str:
    return f"{where(role)}: {name} holds no tokenizer: save the model's own there, such as tokenizer.json"


def _unreadable(name: str, role: str, error: Exception) -> str:
    broken = broken_json(name)
    why = f"{broken} is not JSON" if broken else str(error) or type(error).__name__
    return f"{where(role)}: {name} is not a model that transformers can load: {shorten(why, 300, placeholder=' ...')}"


def check_same_tokenizer(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, other: str = "teacher"
) -> None:
    """Raise ValueError unless both tokenizers have the same vocabulary: the teacher (or the `other` model) reads the
    student's token ids."""
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
    """The ids of all tokens that end a response of `model`; `stop` are those of the recipe."""
    ids = end_ids(model.tokenizer, model.model.generation_config, stop)
    if not any(i < model.vocab_size for i in ids):
        raise ValueError(
            f"the {model.name} can write {model.vocab_size} tokens and none of those that end a response ({ids}): its matrix is "
            "of another tokenizer, choose a model that has their rows"
        )
    return ids


def end_ids(tokenizer: Any, settings: Any, stop: list[str]) -> tuple[int, ...]:
    """The ids of all tokens that end a response: the tokenizer's EOS, the end of a turn in its chat template, those of the
    generation config, and `stop`."""
    configured = getattr(settings, "eos_token_id", None)
    listed = list(configured) if isinstance(configured, list | tuple) else [] if configured is None else [configured]
    for one in listed:
        if type(one) is not int or not 0 <= one < 2**31:
            raise ValueError(
                f"generation_config.json or config.json of a model says eos_token_id: {configured!r}, and {one!r} is no token: "
                "write an id or a list of ids"
            )
    ids: set[Any] = {tokenizer.eos_token_id, turn_end(tokenizer), *listed}
    ids.update(single_tokens(tokenizer, stop, "rollout.stop"))
    return tuple(sorted(ids))


def save_ends(model: LanguageModel, ids: tuple[int, ...]) -> None:
    """Let the folders that `model` is saved in say that responses end at `ids`, to whoever generates with them."""
    settings = model.model.generation_config
    if settings is not None:
        ends = list(ids)
        settings.eos_token_id = ends if len(ends) > 1 else ends[0]


def single_tokens(tokenizer: Any, texts: list[str], where: str) -> tuple[int, ...]:
    """The id of each text's token. Raise ValueError if a text is several tokens, none or unknown; `where` is the
    recipe's key."""
    ids: list[int] = []
    for text in texts:
        encoded = tokenizer.encode(text, add_special_tokens=False)
        if len(encoded) != 1:
            raise ValueError(f"{where}: {text!r} is {len(encoded)} tokens for this tokenizer; write a single token")
        if encoded == [tokenizer.unk_token_id] and text != tokenizer.unk_token:
            raise ValueError(f"{where}: {text!r} is unknown to this tokenizer; write a token of its vocabulary")
        ids += encoded
    return tuple(ids)


def share_vocabulary(models: Sequence[LanguageModel]) -> None:
    """Cut models of one tokenizer to the tokens that all of them have rows for: the last rows of a family's larger models may
    belong to tokens that nobody writes. The first model is the student; those of other tokenizers stay as they are."""
    if len({model.vocab_size for model in models}) <= 1:
        return
    words = models[0].tokenizer.get_vocab()
    of_one = [model for model in models if model.tokenizer.get_vocab() == words]
    size = min(model.vocab_size for model in of_one)
    for model in of_one:
        model.cut_vocabulary(size)
