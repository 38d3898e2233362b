"""LoRA: training changes a low-rank update of the linear layers, W' = W + s B A, and the base W stays frozen.

peft does the arithmetic, with A and B in float32 whatever the base's dtype. The adapter is injected into the model's own
modules, so that the class of the model stays the same. A folder with an adapter names its base; where a model is only
read, such a folder is loaded as the base with the adapter merged into it.
"""

import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kibitz.config import LoraConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Adapter:
    """peft's handle on the adapter inside a model. It is no module, so that no parameter is registered twice."""

    peft: Any

    @contextmanager
    def off(self) -> Iterator[None]:
        """A context inside which the model computes with the base weights alone."""
        with self.peft.disable_adapter():
            yield

    def save(self, folder: Path, weights: dict[str, Any] | None = None) -> None:
        """Write the adapter in peft's format. `weights`, by their names in peft, replace those of a sharded model."""
        self.peft.save_pretrained(folder, save_embedding_layers=False, state_dict=weights)


def allow_tf32(adapter: Adapter | None, dtypes: Iterable[torch.dtype]) -> Callable[[], None]:
    """Let a GPU multiply by A and B, which are float32, in TF32: in an eighth of the time. torch has one setting for the whole
    process, so that is done only where every model of a run, of `dtypes`, is less precise anyway. Return what puts it back."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    if adapter is not None and torch.float32 not in dtypes:
        matmul.allow_tf32 = True
    return partial(setattr, matmul, "allow_tf32", before)


def require_peft() -> None:
    """Raise ValueError, with the package to install, if peft is missing."""
    _peft()


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ValueError("LoRA needs the package peft: pip install 'kibitz[lora]'") from None
    return peft


@contextmanager
def _quietly() -> Iterator[None]:
    """Hide a warning that is not the user's: peft reads an attribute of transformers by its deprecated name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield


def is_adapter(name: str | Path) -> bool:
    return (Path(name) / CONFIG).is_file()


def base_of(folder: str | Path) -> str:
    """The base model of an adapter's folder: another folder, or a name on the hub."""
    try:
        config = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder}/{CONFIG} is not JSON: {error}") from None
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not isinstance(base, str) or not base:
        raise ValueError(f"{folder}/{CONFIG} does not say which model it adapts: write its base_model_name_or_path")
    if is_adapter(base):
        raise ValueError(
            f"{folder} adapts {base}, which is an adapter itself: merge that one by `kibitz export --merge`"
        )
    if not (Path(folder) / WEIGHTS).is_file():
        raise ValueError(f"{folder} holds no {WEIGHTS}; pickled adapters are not loaded")
    return base


def base_or_self(name: str) -> str:
    """The folder or name whose config.json gives the architecture: of an adapter its base, else `name` itself."""
    return base_of(name) if is_adapter(name) else name


def settings_of(name: str) -> str:
    """The folder or name whose generation_config.json holds: an adapter's own, where it has one."""
    return name if (Path(name) / "generation_config.json").is_file() else base_or_self(name)


def attach(model: Any, config: LoraConfig, seed: int) -> Adapter:
    """Inject a new adapter into `model`, in place, and freeze the rest. The same seed gives the same A."""
    _refuse_tied_head(model, config.targets)
    peft = _peft()
    options = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]  # peft only divides it
        use_rslora=config.rslora,
        target_modules=config.targets,
        init_lora_weights=True if config.init == "kaiming" else "gaussian",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            with _quietly():
                adapted = peft.get_peft_model(model, options)
        except ValueError as error:  # peft names the modules that it did not find
            raise ValueError(f"student.lora.targets: {' '.join(str(error).split())[:300]}") from None
    base = Path(model.name_or_path)
    options = adapted.peft_config["default"]
    options.base_model_name_or_path = str(base.resolve()) if base.is_dir() else model.name_or_path
    return Adapter(adapted)


def load(model: Any, folder: Path, trainable: bool = True) -> Adapter:
    """Inject a saved adapter into `model`, in place. Raise ValueError unless the folder has each of its tensors, in its
    shape, and no other."""
    try:
        with _quietly():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # refused below
            peft = _peft().PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
            found = peft.load_adapter(str(folder), "default", is_trainable=trainable)  # says what it did not find
    except (RuntimeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} is not an adapter of {model.name_or_path}: {' '.join(str(error).split())[:300]}"
        ) from None
    for verb, keys in {"lacks": found.missing_keys, "holds what its model has not:": found.unexpected_keys}.items():
        if keys:
            more = f" and {len(keys) - 1} more tensors" if len(keys) > 1 else ""
            raise ValueError(f"{folder} {verb} {sorted(keys)[0]}{more}: it is not the adapter that {CONFIG} describes")
    return Adapter(peft)


def merged(model: Any, folder: Path) -> Any:
    """`model` with the update of a saved adapter added to its weights."""
    return load(model, folder, trainable=False).peft.merge_and_unload(safe_merge=True)


def _refuse_tied_head(model: Any, targets: str | list[str]) -> None:
    """Raise ValueError if `targets` name the head and it is tied to the embedding: the update would change the head
    alone, and no merged model could hold that."""
    outer = (model.get_input_embeddings(), model.get_output_embeddings())
    if isinstance(targets, str) or outer[0].weight is not outer[1].weight:
        return
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if module in outer}
    if shared := sorted(names & {target.rpartition(".")[2] for target in targets}):
        raise ValueError(
            f"student.lora.targets: {shared[0]} shares its matrix (tied embeddings) and cannot be adapted alone: leave it out"
        )
