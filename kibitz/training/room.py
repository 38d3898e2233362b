"""What a recipe leaves open is chosen by what is free of a GPU's memory: the tokens of a micro-batch, those whose logits exist
together, and whether activations are recomputed. No loss depends on it. On a CPU the defaults hold, so that bits do not depend
on what else the machine does.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM

from kibitz.config import Recipe
from kibitz.models import LanguageModel
from kibitz.models.compiled import compile_if_same
from kibitz.models.kept import PROBED_TOKENS, kept_bytes_per_token, kept_on_meta, squares_on_meta
from kibitz.optim import bytes_of_moments
from kibitz.parallel.ranks import Ranks
from kibitz.types import free_bytes

log = logging.getLogger(__name__)

SHARE = 0.8
"""Of the free memory; the rest is for what the allocator loses between blocks, and for the kernels' own."""
LOSS_TENSORS = 10
"""Float32 tensors [chunk, V] of an exact divergence with its metrics and its gradient; see `kibitz.losses.chunked`."""
SHARE_OF_LOGITS = 0.25
MOST_IN_CHUNK = 2048
"""Tokens in a chunk beyond which a GPU is no faster."""
SHARE_OF_GRADIENTS = 0.25
"""Whole gradients that would take more are reduced after each micro-batch."""
ON_A_CPU = 224 * 2**20
"""Bytes of activations of a micro-batch on a CPU. They do not follow from what is free: that changes with what else the machine
does, and the order of sums with it."""
ENOUGH = 4096
"""Tokens of a micro-batch that keep a GPU busy: activations are recomputed where fewer would fit."""

WORTH_COMPILING = 50_000_000
"""Parameters of the largest model. A smaller one has taken its steps before a compiler is done."""


@dataclass(frozen=True)
class Room:
    """The bytes that are left for a micro-batch, and what one takes: of activations for each token, with gradients or while it is
    read, and of one token's logits."""

    free: float
    per_token: float
    recomputed_per_token: float
    per_logits: float
    read_per_token: float = 0.0

    def choose(self, most: int, longest: int, given: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of the optimizer that are not `given`. A micro-batch has at most `most` tokens; activations are recomputed
        where `longest`, the tokens of the longest rollout, would not fit."""
        left = SHARE * max(0.0, self.free)
        chunk = given.get("chunk_tokens")
        if chunk is None:
            chunk = max(16, min(MOST_IN_CHUNK, int(SHARE_OF_LOGITS * left / self.per_logits)))
        left = max(0.0, left - chunk * self.per_logits)
        recomputed = given.get("checkpointing", left / self.per_token < min(most, max(longest, ENOUGH)))
        per_token = self.recomputed_per_token if recomputed else self.per_token
        per_token = max(per_token, self.read_per_token)
        tokens = given.get("tokens_per_micro_batch", max(1, min(most, int(left / per_token))))
        return {"tokens_per_micro_batch": tokens, "chunk_tokens": chunk, "checkpointing": recomputed}


def fitted(recipe: Recipe, models: Sequence[LanguageModel], longest: int, ranks: Ranks) -> Recipe:
    """The recipe with what it leaves open, chosen for the student's device when all models are there, for all processes
    alike. The student, which is the first, recomputes its activations from here on, if that is chosen; and the models are
    compiled, if nobody said whether they are to be."""
    student = models[0]
    if (free := free_bytes(student.device)) is not None:
        recipe = _chosen(recipe, models, longest, min(ranks.gather(free)), ranks.size)
    elif student.device.type == "cpu":
        config = student.model.config.get_text_config()
        layers, width, itemsize = config.num_hidden_layers, config.hidden_size, student.model.dtype.itemsize
        recipe = with_choice_of_cpu(recipe, layers, width, itemsize, lambda: _kept(student, longest))
    if recipe.optim.checkpointing:
        student.recompute_activations()
    if student.device.type == "cuda" and ranks.size == 1 and _leaves_open_compiling(recipe):
        worth = max(model.num_parameters for model in models) >= WORTH_COMPILING
        for model in models if worth else ():
            compile_if_same(model)
    return recipe


def _leaves_open_compiling(recipe: Recipe) -> bool:
    """Whether no section says anything, and none has weights that are not simply there."""
    sections = [recipe.student, *recipe.teachers, *recipe.other_models().values()]
    moved = any(getattr(one, "quantize", None) or getattr(one, "offload", None) for one in sections)
    return not moved and not any("compile" in one.model_fields_set for one in sections)


@dataclass(frozen=True)
class Sizes:
    """What decides how much room a student's training leaves: numbers of parameters, bytes of one, layers and their width, rows
    of the head, bytes of activations that a token keeps, and of those that it needs while the largest of all models reads it.
    `in_parts`: no process holds the student whole."""

    trained: int
    parameters: int
    itemsize: int
    num_layers: int
    width: int
    vocab: int
    kept: float
    read: float
    in_parts: bool = False


def _chosen(recipe: Recipe, models: Sequence[LanguageModel], longest: int, free: int, processes: int) -> Recipe:
    student, others = models[0], models[1:]
    config = student.model.config.get_text_config()
    layers, width, itemsize = config.num_hidden_layers, config.hidden_size, student.model.dtype.itemsize
    numbers = (student.num_trainable, student.num_parameters, itemsize, layers, width, student.vocab_size)
    kept = _kept(student, longest)
    read = max([read_bytes(layers, kept), *(_read(other, longest) for other in others)])
    sizes = Sizes(*numbers, kept, read, isinstance(student, FSDPModule))
    chosen = with_choices(recipe, sizes, longest, free, processes)
    told = ", ".join(f"{key}={value}" for key, value in choices(chosen).items())
    log.info("for %.1f GiB beside the models: %s", free / 2**30, told)
    return chosen


def with_choices(recipe: Recipe, sizes: Sizes, longest: int, free: float, processes: int) -> Recipe:
    """The recipe with what it leaves open, where `free` bytes of each GPU are left when all models are there. `kibitz check` asks
    the same."""
    optim, parallel = recipe.optim, recipe.parallel
    if parallel.reduce_gradients == "auto":
        each = 4.0 * sizes.trained > SHARE_OF_GRADIENTS * free
        parallel = parallel.model_copy(update={"reduce_gradients": "micro_batch" if each else "step"})
        recipe = recipe.model_copy(update={"parallel": parallel})
    recomputed = recomputed_bytes(sizes.num_layers, sizes.width, sizes.itemsize, sizes.kept)
    left = free - bytes_to_come(recipe, sizes, processes)
    room = Room(left, sizes.kept, recomputed, LOSS_TENSORS * 4.0 * sizes.vocab, sizes.read)
    given = optim.model_dump(include=optim.model_fields_set)
    chosen = room.choose(optim.tokens_per_micro_batch, longest, given)
    return recipe.model_copy(update={"optim": optim.model_copy(update=chosen)})


def with_choice_of_cpu(recipe: Recipe, num_layers: int, width: int, itemsize: int, kept: Callable[[], float]) -> Recipe:
    """The recipe with the tokens of a micro-batch on a CPU, if it leaves them open: no more than the default, and no more than
    keep `ON_A_CPU` bytes, of which `kept` tells those of a token. `kibitz check` asks the same."""
    optim = recipe.optim
    if "tokens_per_micro_batch" in optim.model_fields_set:
        return recipe
    per_token = recomputed_bytes(num_layers, width, itemsize, kept()) if optim.checkpointing else kept()
    tokens = max(1, min(optim.tokens_per_micro_batch, int(ON_A_CPU / per_token)))
    return recipe.model_copy(update={"optim": optim.model_copy(update={"tokens_per_micro_batch": tokens})})


def choices(recipe: Recipe) -> dict[str, Any]:
    """The settings that `with_choices` decides, by their names in the recipe."""
    names = ("tokens_per_micro_batch", "chunk_tokens", "checkpointing")
    return {f"optim.{name}": getattr(recipe.optim, name) for name in names}


def bytes_to_come(recipe: Recipe, sizes: Sizes, processes: int) -> float:
    """What training will hold beside a student that has just been loaded: float32 gradients, moments and masters; in several
    processes the shard that learns, and until a step's last micro-batch whole gradients. An opponent counts as one more student
    that learns."""
    trained, itemsize = sizes.trained, sizes.itemsize
    moments = bytes_of_moments(recipe.optim)
    masters = 4 if itemsize < 4 else 0
    shards = max(1, processes // recipe.parallel.replicate)
    if processes == 1:
        total = (4.0 + moments + masters) * trained
        return total + (12.0 + masters + itemsize) * sizes.parameters * recipe.method.needs().adversary
    if sizes.in_parts:
        return (4.0 + moments + masters) * trained / shards
    gradients = 4.0 * trained / (shards if recipe.parallel.reduce_gradients == "micro_batch" else 1)
    return gradients + (4.0 * sizes.parameters + moments * trained) / shards


def _kept(student: LanguageModel, longest: int) -> float:
    """For each token, in texts as long as the longest. Of a student in parts, whose passes are collectives, by its shapes; so are
    the scores of attention that keeps the square of a length."""
    config, in_parts = student.model.config, isinstance(student, FSDPModule)
    kept = 0.0 if in_parts else kept_bytes_per_token(student.model, student.hidden, student.device)
    if not in_parts and config.get_text_config()._attn_implementation != "eager":
        return kept
    by_shapes, squares = _kept_by_shapes(student)
    return (by_shapes if in_parts else kept) + longest * squares


def _kept_by_shapes(model: LanguageModel) -> tuple[float, float]:
    """For each token, and for each pair of tokens in a text."""
    with torch.device("meta"):
        bare = AutoModelForCausalLM.from_config(model.model.config, dtype=model.model.dtype)
    squares = squares_on_meta(bare)
    return kept_on_meta(bare) - PROBED_TOKENS * squares, squares


def _read(model: LanguageModel, longest: int) -> float:
    """What a token needs while a frozen model reads it; 0 of one whose code is its own, which is not built without weights."""
    if not type(model.model).__module__.startswith("transformers."):
        return 0.0
    kept, squares = _kept_by_shapes(model)
    return read_bytes(model.model.config.get_text_config().num_hidden_layers, kept + longest * squares)


def read_bytes(num_layers: int, kept: float) -> float:
    """What a token needs while it is read without gradients: the insides of two layers, of all that `kept` stands for."""
    return 2 * kept / num_layers


def recomputed_bytes(num_layers: int, width: int, itemsize: int, kept: float) -> float:
    """What is kept for each token where activations are recomputed: each layer's input, and the inside of one layer. Without that
    it is `kept`."""
    return num_layers * width * itemsize + kept / num_layers
