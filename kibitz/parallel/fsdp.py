"""Models sharded over several processes (FSDP2), where each forward pass is a collective of all processes.

A student is sharded in one of two ways. With a whole copy, each process holds the student and a shard of a second model, the
`learner`: only the learner trains, with sharded weights, gradients and moments; the copy generates and scores, with passes of
each process alone, and takes the learner's weights after each step. Without (`parallel.whole_copy: false`), the learner does
all of it, and no process ever holds more than its shard and the layers being computed, loading and saving included; passes
that one process alone needs are then joined by the others, see `kibitz.parallel.lockstep`.

Gradients are summed and never averaged: losses are already divided by the number of tokens of all processes.
"""

import copy
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from kibitz.config import ModelConfig, RecipeError, StudentConfig
from kibitz.models import LanguageModel, lora
from kibitz.models.folders import check_folder, check_stored, non_finite
from kibitz.models.head import body_of
from kibitz.models.load import load_tokenizer, pick_dtype
from kibitz.models.progress import no_progress_bars
from kibitz.parallel import sharded_files
from kibitz.parallel.lockstep import Lockstep
from kibitz.parallel.ranks import Ranks, plain
from kibitz.parallel.writing import ShardedWriter


def learner_of(student: LanguageModel, ranks: Ranks) -> LanguageModel:
    """The model to train: the student itself if it is sharded or the process is the only one, else a sharded float32 copy
    that computes in the student's dtype. The copy is sharded while it has no weights, so that no process ever holds more than
    its own part of it; each takes that from the student that it has."""
    if ranks.size == 1 or isinstance(student, FSDPModule):
        return student
    learner = LanguageModel(_without_weights(student.model), student.tokenizer, student.name, packed=student.packed)
    dtype = student.model.dtype
    _shard(learner, ranks, MixedPrecisionPolicy(None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32))
    learner.materialize(partial(_take_part, whole=student.model), student.device)
    learner.reshard()  # what the check of the head has gathered
    return learner


def _without_weights(model: Any) -> Any:
    """A copy in float32 whose parameters are on the meta device."""

    def on_meta(parameter: Tensor) -> nn.Parameter:
        dtype = torch.float32 if parameter.is_floating_point() else parameter.dtype
        return nn.Parameter(torch.empty_like(parameter, dtype=dtype, device="meta"), parameter.requires_grad)

    return copy.deepcopy(model, {id(parameter): on_meta(parameter) for parameter in model.parameters()}).float()


@torch.no_grad()
def _take_part(bare: nn.Module, whole: nn.Module) -> None:
    """Copy this process's shard of each parameter from a whole model."""
    for new, old in zip(bare.parameters(), whole.parameters(), strict=True):
        if not isinstance(new, DTensor):
            new.copy_(old)
        elif (part := sharded_files.own_part(new)) is not None:
            new.to_local().copy_(old[part])


def _shard(model: LanguageModel, ranks: Ranks, policy: MixedPrecisionPolicy, reshard: bool | None = None) -> None:
    """Shard each layer, and what stands around the layers as one group. Gradients are summed, not averaged."""
    for module in [*layers_of(model.model), model]:
        fully_shard(module, mesh=ranks.mesh, mp_policy=policy, reshard_after_forward=reshard)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The decoder layers: the modules that transformers names in `_no_split_modules`."""
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in kinds]


def reduce_gradients(learner: LanguageModel, now: bool) -> None:
    """Reduce gradients over the processes in the backward pass that comes, or `now` is False: then each process accumulates
    unsharded gradients, as large as the model in float32. The last pass of a step reduces in any case."""
    if isinstance(learner, FSDPModule):
        learner.set_requires_gradient_sync(now)
        learner.set_is_last_backward(now)


@torch.no_grad()
def copy_weights(learner: LanguageModel, student: LanguageModel) -> None:
    """Copy the learner's trained weights into the whole copy of the student."""
    if learner is student:
        return
    for new, old in zip(learner.model.parameters(), student.model.parameters(), strict=True):
        if new.requires_grad:
            old.copy_(plain(new))


def _join_passes(model: LanguageModel, lockstep: Lockstep) -> None:
    """Make each pass of `model` a collective: a process that starts one without gradients has the others join it with a
    pass of their own on one token. Passes with gradients need no call: all processes make equally many
    (`Ranks.in_step`)."""
    joining = False

    @torch.no_grad()
    def join() -> None:
        nonlocal joining
        ids_BL = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        joining = True
        try:
            model.within(lambda: model.hidden(ids_BL))
        finally:
            joining = False

    call = lockstep.register(join)

    def before() -> None:
        if not joining and not torch.is_grad_enabled():
            call()

    model.enclose_passes(before)


# ------------------------------------------------------------------ without a whole copy


WHOLE_STUDENT, WHOLE_TEACHER = "parallel.whole_copy=true", "parallel.shard_teacher=false"
"""The settings that an error suggests for a model that cannot be loaded sharded."""


def check_shardable(config: ModelConfig, role: str, instead: str = WHOLE_STUDENT) -> None:
    """Raise RecipeError, before any weights load, for a model that cannot be loaded sharded."""
    if config.trust_remote_code:
        raise RecipeError(
            f"{role}.trust_remote_code: models with code of their own are not loaded sharded: write {instead}"
        )
    if config.compile:
        raise RecipeError(f"{role}.compile: sharded layers are not compiled: write {role}.compile=false")
    if lora.is_adapter(config.model):
        raise RecipeError(
            f"{role}.model: {config.model} is an adapter, which is merged into a whole base: write a folder of it by "
            f"`kibitz export FOLDER --merge --output NEW`, and {role}.model=NEW"
        )
    if getattr(AutoConfig.from_pretrained(config.model), "quantization_config", None) is not None:
        raise RecipeError(f"{role}.model: {config.model} is quantized, and not loaded sharded: write {instead}")


def load_sharded(
    config: StudentConfig,
    device: torch.device,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    resumed_from: Path | None,
    ranks: Ranks,
) -> LanguageModel:
    """The model of `models.load_student`, of which each process reads its shard alone. It keeps the student's dtype; in
    a lower precision than float32 the optimizer keeps float32 masters, sharded as well."""
    source = config.model if config.lora is not None or resumed_from is None else str(resumed_from)
    bare, adapter = _on_meta(config, pick_dtype(config.dtype, device)), None
    stored = _stored(bare, source, ranks, WHOLE_STUDENT, "student")
    if config.lora is not None:
        with _zero_stride_weights(bare):
            adapter = lora.attach(bare, config.lora, seed) if resumed_from is None else lora.load(bare, resumed_from)
    writer = ShardedWriter(bare, adapter)
    student = LanguageModel(bare, tokenizer, "student", adapter, writer=writer)
    _shard(student, ranks, MixedPrecisionPolicy(reduce_dtype=torch.float32), reshard=True)
    student.materialize(partial(_fill_all, stored=stored, source=source, role="student", ranks=ranks), device)
    _join_passes(student, ranks.lockstep)
    writer.register(ranks.lockstep)
    return student


def load_frozen(config: ModelConfig, role: str, device: torch.device, ranks: Ranks, instead: str) -> LanguageModel:
    """The model of `models.load_model`, frozen and sharded but for the parameters around its layers, because its head is
    called outside of its passes, too."""
    tokenizer = load_tokenizer(config, role)
    bare = _on_meta(config, pick_dtype(config.dtype, device)).requires_grad_(False)
    stored = _stored(bare, config.model, ranks, instead, role)
    model = LanguageModel(bare, tokenizer, role)
    layers = layers_of(bare)
    for layer in layers:
        fully_shard(layer, mesh=ranks.mesh)
    inside = {parameter for layer in layers for parameter in layer.parameters()}
    around = {parameter for parameter in bare.parameters() if parameter not in inside}
    fully_shard(
        body_of(bare), mesh=ranks.mesh, ignored_params=around
    )  # one root, so that a layer's successor is gathered early
    model.materialize(partial(_fill_all, stored=stored, source=config.model, role=role, ranks=ranks), device)
    _join_passes(model, ranks.lockstep)
    return model


def _stored(bare: Any, source: str, ranks: Ranks, instead: str, role: str) -> dict[str, Path]:
    """The file of each stored parameter, by the parameter's name. Raise ValueError, in all processes, for files of another
    model."""
    if not layers_of(bare):
        raise ValueError(
            f"transformers does not name the layers by which a {type(bare).__name__} is to be sharded: write {instead}"
        )
    files = ranks.first(lambda: _weight_files(source, role))
    stored = _match(bare, files, source, instead)
    check_stored(bare, files, source, role)
    return stored


@no_progress_bars()
def _weight_files(source: str, role: str = "student") -> list[Path]:
    """The safetensors files of a folder, or of a model on the hub, which is downloaded."""
    folder = Path(source)
    if not folder.is_dir():
        folder = Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))
    check_folder(str(folder), role)
    if (folder / sharded_files.INDEX).is_file():
        named = json.loads((folder / sharded_files.INDEX).read_text(encoding="utf-8"))["weight_map"]
        return [folder / name for name in sorted(set(named.values()))]
    return [folder / "model.safetensors"]


@no_progress_bars()
def _on_meta(config: ModelConfig, dtype: torch.dtype) -> Any:
    """The bare model with its parameters on the meta device and its buffers (rotary frequencies, for example) computed."""
    attention = {} if config.attention == "auto" else {"attn_implementation": config.attention}
    with _parameters_on_meta():
        bare = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config.model), dtype=dtype, **attention)
    bare.tie_weights()
    with suppress(OSError):  # it need not have any
        bare.generation_config = GenerationConfig.from_pretrained(config.model)
    return bare


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """A context inside which each parameter that this thread registers moves to the meta device, so that memory is needed
    for one at a time. Modules of other threads are left alone. `torch.device("meta")` would take the buffers as well,
    which files do not store."""
    thread = threading.get_ident()

    def to_meta(_: nn.Module, __: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if threading.get_ident() != thread or parameter is None or parameter.device.type == "meta":
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)  # pyright: ignore[reportArgumentType]  # hooks may return
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _zero_stride_weights(bare: nn.Module) -> Iterator[None]:
    """A context inside which the meta parameters are zeros of stride 0, one number each: peft wants a base on a real
    device, and does not change it."""
    substitutes: dict[Tensor, nn.Parameter] = {}
    for parameter in bare.parameters():
        zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
        substitutes[parameter] = nn.Parameter(zeros, requires_grad=parameter.requires_grad)
    _exchange(bare, substitutes)
    yield
    back = {zeros: nn.Parameter(real, requires_grad=zeros.requires_grad) for real, zeros in substitutes.items()}
    _exchange(bare, back)


def _exchange(bare: nn.Module, new: dict[Any, nn.Parameter]) -> None:
    for module in bare.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter in new:
                setattr(module, name, new[parameter])


def _match(bare: Any, files: list[Path], source: str, instead: str = WHOLE_STUDENT) -> dict[str, Path]:
    """The file of each stored parameter, by its name in the model. Raise ValueError if a parameter is in no file by that
    name, as in files whose names transformers converts while it loads."""
    stored: dict[str, Path] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            stored |= dict.fromkeys(file.keys(), path)
    names: dict[Tensor, list[str]] = {}
    for name, parameter in bare.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    buffers = bare.state_dict().keys() - {name for some in names.values() for name in some}
    missing = [some[0] for some in names.values() if not any(name in stored for name in some)]
    if missing or buffers:
        raise ValueError(
            f"{source} does not store {[*missing, *sorted(buffers)][0]} by that name, so that it cannot be loaded sharded: "
            f"write {instead}"
        )
    return {name: stored[name] for some in names.values() for name in some if name in stored}


def _fill(bare: nn.Module, stored: dict[str, Path]) -> None:
    """Read the stored parameters into the model, of a sharded one this process's shard."""
    targets = {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in bare.named_parameters(remove_duplicate=False)
    }
    for path in sorted(set(stored.values())):
        with safe_open(path, framework="pt") as file:
            for name in (name for name, where in stored.items() if where == path):
                sharded_files.fill(targets[name], file.get_slice(name))


def _fill_all(bare: nn.Module, stored: dict[str, Path], source: str, role: str, ranks: Ranks) -> None:
    """`_fill`, after which all processes raise ValueError if one has read NaN or infinity into its shard."""
    _fill(bare, stored)
    own = ((name, p.to_local() if isinstance(p, DTensor) else p) for name, p in bare.named_parameters())
    damaged = [name for name in ranks.gather(non_finite(own)) if name is not None]
    if damaged:
        raise ValueError(f"{role}.model: {source} holds NaN or infinity in {damaged[0]}: the file is damaged")
