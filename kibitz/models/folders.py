"""Checks of a model's folder: that it holds safetensors alone, and that every tensor of the model came from it."""

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from kibitz.models import lora

FLOATS = {"F64", "F32", "F16", "BF16"}
CHECKED = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
INDEX = ".safetensors.index.json"
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
GENERATION = "generation_config.json"
HUB_SECONDS = 10.0
TOKENIZERS = ("tokenizer.json", "*.model", "vocab.*", "tekken.json", "*.tiktoken", "tokenizer*.py", "tokenization*.py")
"""The files that can hold the vocabulary of a tokenizer."""


def where(role: str) -> str:
    """What an error calls a model by: its key in the recipe, or, for one that a command names, `model`."""
    return role if role == "model" else f"{role}.model"


def check_folder(name: str, role: str) -> None:
    """Raise ValueError, before anything loads, if `name` is no folder of a model or of an adapter with a base, and no
    name on the hub."""
    path = Path(name)
    if not name.strip():
        raise ValueError(f"{where(role)}: the name is empty: write a folder, or a name on the hub")
    if broken_json(name, GENERATION):
        raise ValueError(
            f"{where(role)}: {path / GENERATION} is not JSON: it says where responses end, so mend it or take it away"
        )
    if lora.is_adapter(path):
        lora.require_peft()
        check_folder(lora.base_of(path), f"{where(role)}: {name} adapts another model; {role}")
        check_dtypes(path / lora.WEIGHTS, role)
    elif path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{where(role)}: {name} is not a model: it has no config.json")
        if not any(path.glob("*.safetensors")):
            raise ValueError(
                f"{where(role)}: {name} holds no *.safetensors; pickled weights are not loaded, convert them first"
            )
        for index in sorted(path.glob(f"*{INDEX}")):
            check_index(index, role)
        check_one_model(path, role)
    elif path.exists() or not _is_name_of_the_hub(name) or _is_a_place(path):
        raise ValueError(f"{where(role)}: there is no model folder at {name}")
    elif not _is_on_hub(name):
        raise ValueError(
            f"{where(role)}: {name} is neither a folder here nor a model on the hub, or the hub is out of reach"
        )


def _is_name_of_the_hub(name: str) -> bool:
    try:
        validate_repo_id(name)
    except ValueError:
        return False
    return True


def _is_a_place(path: Path) -> bool:
    """Whether a name such as runs/mine means a folder: its first part is one here, or kibitz writes there. A model of the hub
    that has been downloaded is one of the hub all the same."""
    first = path.parent.name
    return bool(first) and (first == "runs" or path.parent.is_dir()) and not _is_downloaded(str(path))


def _is_downloaded(name: str) -> bool:
    return any(isinstance(try_to_load_from_cache(name, file), str) for file in ("config.json", lora.CONFIG))


@cache
def _is_on_hub(name: str) -> bool:
    """Ask the hub once, where loading asks for each file, several times. An answer that says nothing of the model is left to
    loading."""
    if _is_downloaded(name):
        return True
    try:
        HfApi().model_info(name, timeout=HUB_SECONDS)
    except HfHubHTTPError as error:
        return not isinstance(error, RepositoryNotFoundError)
    except Exception:  # noqa: BLE001 - no connection, of which each version of the hub's client has its own kind
        return False
    return True


def lacks_tokenizer(name: str) -> bool:
    """Whether a folder has no file that could hold a vocabulary."""
    return Path(name).is_dir() and not any(True for pattern in TOKENIZERS for _ in Path(name).glob(pattern))


def broken_json(name: str, pattern: str = "*.json") -> str:
    """The first file of a folder that is called JSON and is none, or nothing: libraries say what is wrong with it and not which
    one it is."""
    for path in sorted(Path(name).glob(pattern)) if Path(name).is_dir() else ():
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return path.name
    return ""


def check_index(path: Path, role: str) -> None:
    """Raise ValueError if an index names anything but safetensors inside of its own folder."""
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
        named = {PurePosixPath(name): name for name in files}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{where(role)}: {path} is no index: its weight_map names the file of each tensor") from None
    for file, name in named.items():
        if file.suffix != ".safetensors":
            raise ValueError(f"{where(role)}: {path} names {name!r}; only *.safetensors are loaded, convert it first")
        if file.is_absolute() or ".." in file.parts:
            raise ValueError(f"{where(role)}: {path} names {name!r}, which is outside of the folder: move it inside")


def check_one_model(folder: Path, role: str) -> None:
    """Raise ValueError if a folder holds weights twice, of which loaders take one or the other: a whole file beside an index or
    beside shards, shards that no index names, a tensor in two shards."""
    index, whole = folder / f"model{INDEX}", folder / "model.safetensors"
    named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) if index.is_file() else set()
    loaded = {str(PurePosixPath(name)) for name in named} or {whole.name}
    left = sorted(path.name for path in folder.glob("*.safetensors") if SHARD.fullmatch(path.name))
    left = [name for name in left if name not in loaded]
    if whole.is_file() and whole.name not in loaded:
        left.append(whole.name)
    if left:
        raise ValueError(
            f"{where(role)}: {folder} holds {listed(left)} beside {listed(loaded)}, which are weights of one model or of two: "
            "leave those of one there, with an index that names all their files"
        )
    seen: dict[str, str] = {}
    for name in sorted(loaded) if len(loaded) > 1 else ():
        with suppress(SafetensorError, OSError), safe_open(folder / name, framework="pt") as file:  # loading says more
            for key in file.keys():  # noqa: SIM118 - not a dict
                if seen.setdefault(key, name) != name:
                    raise ValueError(f"{where(role)}: {folder} holds {key} in {seen[key]} and in {name}: leave one out")


def check_dtypes(path: Path, role: str, harmless: Iterable[str] = ()) -> None:
    """Raise ValueError if a file stores a tensor, other than the `harmless` ones, as something else than floats of 16 bits
    or more: without a quantization's scales such numbers mean nothing."""
    pattern = re.compile("|".join(f"({one})" for one in harmless)) if harmless else None
    try:
        with safe_open(path, framework="pt") as file:
            stored = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{where(role)}: {path} is no readable safetensors file: {error}") from None
    for name, dtype in stored.items():
        if dtype not in FLOATS and not (pattern and pattern.search(name)):
            raise ValueError(
                f"{where(role)}: {path} stores {name} as {dtype} and its config.json names no quantization that is loaded: a "
                "weight is a float of 16 bits or more"
            )


def check_loaded(model: Any, info: Mapping[str, Any], name: str, role: str) -> None:
    """Raise ValueError unless each tensor of `model` is in its files and each tensor of the files is in `model`. `info` is
    the loading info of `from_pretrained`, without what is tied or what the architecture names as harmless."""
    faults = {
        "lacks": info["missing_keys"],
        "holds what the model has not:": info["unexpected_keys"],
        "holds in another shape": {key for key, *_ in info["mismatched_keys"]},
    }
    for verb, keys in faults.items():
        if keys:
            raise ValueError(
                f"{where(role)}: {name} {verb} {listed(keys)}: a {type(model).__name__} would begin with random numbers "
                "there, or leave stored ones out; is config.json of these weights?"
            )
    if (
        getattr(model, "hf_quantizer", None) is None and Path(name).is_dir()
    ):  # one that config.json names may be unknown
        for path in sorted(Path(name).glob("*.safetensors")):
            check_dtypes(path, role, harmless_keys(model))


def check_stored(model: Any, files: Iterable[Path], name: str, role: str) -> None:
    """Raise ValueError unless each tensor of the files is in `model`, in its shape: what `check_loaded` asks of a model that
    transformers loads, of one that is read tensor by tensor. That each tensor of the model is in the files is not checked."""
    shapes = {key: tuple(parameter.shape) for key, parameter in model.named_parameters(remove_duplicate=False)}
    harmless = re.compile("|".join(f"({one})" for one in harmless_keys(model)) or "$^")
    unknown, reshaped = [], []
    for path in files:
        check_dtypes(path, role, harmless_keys(model))
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                if key not in shapes and not harmless.search(key):
                    unknown.append(key)
                elif key in shapes and tuple(file.get_slice(key).get_shape()) != shapes[key]:
                    reshaped.append(key)
    for verb, keys in {"holds what the model has not:": unknown, "holds in another shape": reshaped}.items():
        if keys:
            raise ValueError(f"{where(role)}: {name} {verb} {listed(keys)}; is config.json of these weights?")


def harmless_keys(model: Any) -> list[str]:
    """Patterns of what files may hold beside a model's parameters: its buffers, and what the architecture names."""
    buffers = [rf"(^|\.){re.escape(key.rpartition('.')[2])}$" for key, _ in model.named_buffers()]
    return [*(model._keys_to_ignore_on_load_unexpected or ()), *buffers]


def check_finite(model: nn.Module, name: str, role: str) -> None:
    """Raise ValueError if a weight is NaN or infinite."""
    if (key := non_finite(model.named_parameters())) is not None:
        raise ValueError(f"{where(role)}: {name} holds NaN or infinity in {key}: the file is damaged")


def non_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor that holds NaN or infinity, if there is one."""
    for key, tensor in tensors:
        if tensor.dtype in CHECKED and tensor.device.type != "meta" and tensor.numel():
            low, high = tensor.detach().aminmax()
            if not (low.isfinite() and high.isfinite()):
                return key
    return None


def listed(keys: Iterable[str], most: int = 3) -> str:
    """The first few names, and how many more there are."""
    names = sorted(keys)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more tensors" if len(names) > most else "")
