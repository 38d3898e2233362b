"""A model that several processes hold in parts (FSDP2), so that each pass through it is a pass of all.

Of a student there are two ways. With a whole copy it is there twice: the `learner`, whose weights, gradients and moments are
split, does nothing but learn; the copy writes and reads, which takes as many forward passes as it takes, in any process, and
after each step takes the learner's new weights. Without (`parallel.whole_copy: false`), the learner does all of it, and no
process ever holds more than its part and the layer that it computes, while it loads and saves neither:
see `kibitz.parallel.lockstep`.

Gradients are summed and never averaged: losses are divided by the number of tokens of all processes before.
"""

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from kibitz.config import ModelConfig, RecipeError, StudentConfig
from kibitz.models import LanguageModel, lora
from kibitz.models.head import build_head
from kibitz.models.load import load_tokenizer, pick_dtype
from kibitz.parallel import sharded_files
from kibitz.parallel.lockstep import Lockstep
from kibitz.parallel.ranks import Ranks, plain


def learner_of(student: LanguageModel, ranks: Ranks) -> LanguageModel:
    """The student itself; beside one that is whole in several processes its sharded copy: float32, computing in the
    student's own dtype."""
    if ranks.size == 1 or isinstance(student, FSDPModule):
        return student
    learner = LanguageModel(copy.deepcopy(student.model).float(), student.tokenizer, student.name)
    learner.packs = student.packs
    dtype = student.model.dtype
    _split(learner, ranks, MixedPrecisionPolicy(None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32))
    return learner


def _split(model: LanguageModel, ranks: Ranks, policy: MixedPrecisionPolicy, reshard: bool | None = None) -> None:
    for module in [*layers_of(model.model), model]:
        fully_shard(module, mesh=ranks.mesh, mp_policy=policy, reshard_after_forward=reshard)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The parts that transformers names as not to be split."""
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in kinds]


def reduce_gradients(learner: LanguageModel, last: bool) -> None:
    """Whether the next backward pass is the last of a step, at which gradients are summed over the processes. Those
    before add to this process's own, which are whole; where nothing may be whole, all passes are as the last."""
    if isinstance(learner, FSDPModule):
        learner.set_requires_gradient_sync(last)
        learner.set_is_last_backward(last)


@torch.no_grad()
def copy_weights(learner: LanguageModel, student: LanguageModel) -> None:
    """What was learnt, into the whole copy."""
    if learner is student:
        return
    for new, old in zip(learner.model.parameters(), student.model.parameters(), strict=True):
        if new.requires_grad:
            old.copy_(plain(new))


class _Passes:
    """From here on each pass of a model is one of all processes: those that need none make one for the others. Passes with
    gradients are not announced: the processes make equally many of them by themselves (`Ranks.in_step`)."""

    def __init__(self, model: LanguageModel, lockstep: Lockstep):
        self.model, self.inside, self.helping = model, False, False
        self.announce = lockstep.register(self._help)
        model.register_forward_pre_hook(self._begin, prepend=True)
        model.register_forward_hook(self._end, always_call=True)
        alone: Callable[..., Any] = model.model.forward

        @wraps(alone)
        def forward(*args: Any, **kwargs: Any) -> Any:
            """Engines call the bare model."""
            if self.inside:
                return alone(*args, **kwargs)
            return model.within(lambda: alone(*args, **kwargs))

        model.model.forward = forward

    @torch.no_grad()
    def _help(self) -> None:
        ids_BL = torch.zeros(1, 1, dtype=torch.long, device=self.model.device)
        self.helping = True
        try:
            self.model.within(lambda: self.model.hidden(ids_BL))
        finally:
            self.helping = False

    def _begin(self, *_: Any) -> None:
        if not self.helping and not torch.is_grad_enabled():
            self.announce()
        self.inside = True

    def _end(self, *_: Any) -> None:
        self.inside = False


# ------------------------------------------------------------------ never whole


WHOLE_STUDENT, WHOLE_TEACHER = "parallel.whole_copy=true", "parallel.shard_teacher=false"
"""What to write where a model cannot be loaded in parts."""


def check_parts(config: ModelConfig, role: str, instead: str = WHOLE_STUDENT) -> None:
    """Refuse, before any weights load, a model that cannot be loaded without being whole."""
    if config.trust_remote_code:
        raise RecipeError(f"{role}.trust_remote_code: such code is not loaded in parts: write {instead}")
    if config.compile:
        raise RecipeError(f"{role}.compile: sharded layers are not compiled: write {role}.compile=false")
    if lora.is_adapter(config.model):
        raise RecipeError(
            f"{role}.model: {config.model} is an adapter, which is merged into a whole base: write a folder of it by "
            f"`kibitz export FOLDER --merge --output NEW`, and {role}.model=NEW"
        )
    if getattr(AutoConfig.from_pretrained(config.model), "quantization_config", None) is not None:
        raise RecipeError(f"{role}.model: {config.model} is quantized, and not loaded in parts: write {instead}")


def load_in_parts(
    config: StudentConfig,
    device: torch.device,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    resumed_from: Path | None,
    ranks: Ranks,
) -> LanguageModel:
    """As `models.load_student`, and no process reads more of the files than its part. It keeps the student's dtype; what is
    not float32 has float32 masters in the optimizer, sharded as well."""
    source = config.model if config.lora is not None or resumed_from is None else str(resumed_from)
    bare, adapter = _without_weights(config, pick_dtype(config.dtype, device)), None
    stored = _stored(bare, source, ranks, WHOLE_STUDENT)
    if config.lora is not None:
        with _weights_of_no_size(bare):
            adapter = lora.attach(bare, config.lora, seed) if resumed_from is None else lora.load(bare, resumed_from)
    student = LanguageModel(bare, tokenizer, "student", adapter)
    _split(student, ranks, MixedPrecisionPolicy(reduce_dtype=torch.float32), reshard=True)
    _furnish(student, stored, device, ranks)
    student.write = partial(_write, student, _gathers(bare, ranks.lockstep))
    return student


def load_frozen(config: ModelConfig, role: str, device: torch.device, ranks: Ranks, instead: str) -> LanguageModel:
    """As `models.load_model`, for a model that learns nothing: split over the processes but for what stands around its
    layers, since its head is used outside of its passes, too."""
    tokenizer = load_tokenizer(config, role)
    bare = _without_weights(config, pick_dtype(config.dtype, device)).requires_grad_(False)
    stored = _stored(bare, config.model, ranks, instead)
    model = LanguageModel(bare, tokenizer, role)
    for layer in layers_of(bare):
        fully_shard(layer, mesh=ranks.mesh)
    _furnish(model, stored, device, ranks)
    return model


def _furnish(model: LanguageModel, stored: dict[str, Path], device: torch.device, ranks: Ranks) -> None:
    """Weights for a model that is split and has none yet."""
    model._apply(lambda t: torch.empty_like(t, device=device) if t.device.type == "meta" else t.to(device))
    _fill(model.model, stored)
    _Passes(model, ranks.lockstep)
    with torch.no_grad():
        head = partial(build_head, model.model, model.vocab_size, model.name)
        model.head, model.head_stands_alone = model.within(head)


def _stored(bare: Any, source: str, ranks: Ranks, instead: str) -> dict[str, Path]:
    """In which file each parameter is."""
    if not layers_of(bare):
        raise ValueError(
            f"transformers does not say which layers a {type(bare).__name__} is to be split by: write {instead}"
        )
    return _match(bare, ranks.first(lambda: _weight_files(source)), source, instead)


def _weight_files(source: str) -> list[Path]:
    folder = Path(source)
    if not folder.is_dir():
        folder = Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))
    if (folder / sharded_files.INDEX).is_file():
        named = json.loads((folder / sharded_files.INDEX).read_text(encoding="utf-8"))["weight_map"]
        return [folder / name for name in sorted(set(named.values()))]
    return [folder / "model.safetensors"]


def _without_weights(config: ModelConfig, dtype: torch.dtype) -> Any:
    """The model with parameters on `meta`; its buffers (angles of rotation, say) are real."""
    attention = {} if config.attention == "auto" else {"attn_implementation": config.attention}
    with _parameters_on_meta():
        bare = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config.model), dtype=dtype, **attention)
    bare.tie_weights()
    with suppress(OSError):  # it need not have any
        bare.generation_config = GenerationConfig.from_pretrained(config.model)
    return bare


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Each parameter of a module goes as it comes, so that there is room for one at a time; nothing is written into it."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


@contextmanager
def _weights_of_no_size(bare: nn.Module) -> Iterator[None]:
    """peft wants a base on a real device, which it then leaves alone: zeros that all lie in one place."""
    pretended: dict[Tensor, nn.Parameter] = {}
    for parameter in bare.parameters():
        zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
        pretended[parameter] = nn.Parameter(zeros, requires_grad=parameter.requires_grad)
    _exchange(bare, pretended)
    yield
    back = {zeros: nn.Parameter(real, requires_grad=zeros.requires_grad) for real, zeros in pretended.items()}
    _exchange(bare, back)


def _exchange(bare: nn.Module, new: dict[Any, nn.Parameter]) -> None:
    for module in bare.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter in new:
                setattr(module, name, new[parameter])


def _match(bare: Any, files: list[Path], source: str, instead: str = WHOLE_STUDENT) -> dict[str, Path]:
    """Refused where the files have other names than the model, as those that
    transformers converts while it loads."""
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
            f"{source} does not store {[*missing, *sorted(buffers)][0]} by that name, so that it cannot be loaded in parts: "
            f"write {instead}"
        )
    return {name: stored[name] for some in names.values() for name in some if name in stored}


def _fill(bare: nn.Module, stored: dict[str, Path]) -> None:
    targets = {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in bare.named_parameters(remove_duplicate=False)
    }
    for path in sorted(set(stored.values())):
        with safe_open(path, framework="pt") as file:
            for name in (name for name, where in stored.items() if where == path):
                sharded_files.fill(targets[name], file.get_slice(name))


def _gathers(bare: nn.Module, lockstep: Lockstep) -> dict[str, Callable[[], Tensor]]:
    """By name, how to have a parameter whole: one at a time, and in the company of all."""

    def gather(announce: Callable[[], None], whole: Callable[[], Tensor]) -> Tensor:
        announce()
        return whole()

    def entry(parameter: Tensor) -> Callable[[], Tensor]:
        assert isinstance(parameter, DTensor)
        whole = partial(_whole, parameter)
        return partial(gather, lockstep.register(whole), whole)

    return {name: entry(parameter) for name, parameter in bare.named_parameters()}


@torch.no_grad()
def _whole(parameter: DTensor) -> Tensor:
    return parameter.full_tensor()


def _write(student: LanguageModel, gathers: dict[str, Callable[[], Tensor]], folder: Path) -> None:
    """The folder that `save_pretrained` would write, for which no more than a file is whole, and in this process only."""
    bare = student.model
    if student.adapter is not None:
        learnt = [name for name, parameter in bare.named_parameters() if parameter.requires_grad]
        weights = {f"base_model.model.{name}": gathers[name]().cpu() for name in learnt}
        student.adapter.save(folder, weights)
        return
    bare.config.dtype, bare.config.architectures = str(bare.dtype).removeprefix("torch."), [type(bare).__name__]
    bare.config.save_pretrained(folder)
    if bare.generation_config is not None:
        bare.generation_config.save_pretrained(folder)
    sharded_files.write_whole(((name, gather()) for name, gather in gathers.items()), folder)
