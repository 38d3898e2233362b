"""LoRA: the student learns a low-rank update of its linear layers, W' = W + s B A, and its base stays as it is.

peft does the arithmetic, with A and B in float32 whatever the base's dtype. The adapter is put into the model's own
modules, so bodies, heads and engines see the model that they know. A folder with an adapter names its base; wherever a
model is only read, that folder stands for the base with the adapter merged into it.
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kibitz.config import LoraConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Adapter:
    """What peft keeps about the adapter inside a model. Not a module, so that no parameter is found twice."""

    peft: Any

    @contextmanager
    def off(self) -> Iterator[None]:
        """The same weights without the update."""
        with self.peft.disable_adapter():
            yield

    def save(self, folder: Path, weights: dict[str, Any] | None = None) -> None:
        """In peft's own format; `weights` by their names in peft, if those in the model are not whole."""
        self.peft.save_pretrained(folder, save_embedding_layers=False, state_dict=weights)


def require_peft() -> None:
    """Raise ValueError with what to install, before anything loads."""
    _peft()


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ValueError("LoRA needs the package peft: pip install 'kibitz[lora]'") from None
    return peft


@contextmanager
def _quietly() -> Iterator[None]:
    """peft asks transformers by an old name whether it checkpoints activations."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield


def is_adapter(name: str | Path) -> bool:
    return (Path(name) / CONFIG).is_file()


def base_of(folder: str | Path) -> str:
    """The model that an adapter was trained on: a folder or a name on the hub."""
    try:
        config = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
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
    """Where the architecture of a model is written: in its base, of an adapter."""
    return base_of(name) if is_adapter(name) else name


def attach(model: Any, config: LoraConfig, seed: int) -> Adapter:
    """Put a new adapter into `model`, in place; what is not adapter is frozen. The same seed gives the same A."""
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
    """Put a saved adapter into `model`, in place."""
    with _quietly():
        return Adapter(_peft().PeftModel.from_pretrained(model, str(folder), is_trainable=trainable))


def merged(model: Any, folder: Path) -> Any:
    """`model` with the update added to its weights; nothing of the adapter is left."""
    return load(model, folder, trainable=False).peft.merge_and_unload(safe_merge=True)


def _refuse_tied_head(model: Any, targets: str | list[str]) -> None:
    """An update of a shared matrix would change the head and not the embedding, and no merged model could hold that."""
    outer = (model.get_input_embeddings(), model.get_output_embeddings())
    if isinstance(targets, str) or outer[0].weight is not outer[1].weight:
        return
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if module in outer}
    if shared := sorted(names & {target.rpartition(".")[2] for target in targets}):
        raise ValueError(
            f"student.lora.targets: {shared[0]} shares its matrix (tied embeddings) and cannot be adapted alone: leave it out"
        )
