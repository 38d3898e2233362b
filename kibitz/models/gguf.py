"""GGUF files, as llama.cpp and Ollama keep models, read into plain Hugging Face ones. transformers does the reading.

What it leaves out is put right here: every token that ends a turn, digits that SmolLM's tokenizer takes one by one, and
what would keep the model from being saved.
"""

import importlib.util
import io
import math
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from kibitz.config import ModelConfig
from kibitz.models.folders import check_finite, check_loaded, listed
from kibitz.models.load import end_ids, load_tokenizer, load_weights
from kibitz.models.progress import no_progress_bars

DType = Literal["auto", "float32", "bfloat16", "float16"]
MAGIC = b"GGUF"
ENDS = ("eos", "eot", "eom")
"""Keys `tokenizer.ggml.NAME_token_id` of tokens that end a response: of the text, of a turn, of a message to a tool."""
DIGITS_ALONE = ("smollm", "refact", "codeshell", "exaone")
"""Values of `tokenizer.ggml.pre` of tokenizers that split as GPT-2's does, but first take every digit alone."""
AS_GPT2 = ("default", "gpt-2", "mpt", "olmo", "jais", "phi-2", "trillion")
SAID = "The capital of France is Paris. 12 + 345 = 357"
"""A text that a tokenizer must read and write again unchanged."""
QUESTION = "What is the capital of France?"
NUM_TOKENS = 24  # of the sentence that is written to see that the model works


@dataclass(frozen=True)
class FromGGUF:
    """A model as a GGUF file holds it. `notes` are sentences about what differs from llama.cpp's reading of the file."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    notes: tuple[str, ...] = ()

    def save(self, folder: Path) -> None:
        """Write the folder that `student.model` and `teacher.model` take."""
        with no_progress_bars():
            self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @torch.no_grad()
    def sentence(self, text: str = QUESTION) -> str:
        """The model's greedy answer, of a few tokens. Raise ValueError if its logits are not finite."""
        ids_1L = _asked(self.tokenizer, text)
        logits_V = self.model(ids_1L).logits[0, -1]
        if not logits_V.isfinite().all():
            raise ValueError("the model's logits are NaN or infinite: the file is damaged, or transformers misreads it")
        mask_1L = torch.ones_like(ids_1L)
        out_1L = self.model.generate(ids_1L, attention_mask=mask_1L, max_new_tokens=NUM_TOKENS, do_sample=False)
        return self.tokenizer.decode(out_1L[0, ids_1L.shape[1] :], skip_special_tokens=True).strip()


def require_gguf() -> None:
    """Raise ValueError where the packages that read and write GGUF are not installed."""
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"GGUF files need {' and '.join(missing)}: pip install 'kibitz[gguf]'")


@no_progress_bars()
def read_gguf(path: Path, dtype: DType = "auto") -> FromGGUF:
    """Read a model and its tokenizer from a GGUF file. `dtype` of the weights: auto is the file's own float type, or bfloat16
    if the file is quantized. Raise ValueError if the file is none that transformers can read whole."""
    _check_file(path)
    require_gguf()
    settings, elements, floats = _header(path)
    kind = floats or "bfloat16" if dtype == "auto" else dtype
    try:
        # transformers warns of what is asked for here, and draws a bar that nobody can switch off
        with redirect_stderr(io.StringIO()):
            model, info, tokenizer = _by_transformers(path, getattr(torch, kind))
    except Exception as error:  # whatever an unknown or broken file makes transformers raise
        raise ValueError(_unreadable(path, settings, error)) from error
    check_loaded(model, info, str(path), "import")
    check_finite(model, str(path), "import")
    _plain(model, str(settings.get("general.name") or path.stem))
    notes = [*_split_digits(tokenizer, settings), *_left_out(model, elements)]
    _set_ends(model, tokenizer, settings)
    if tokenizer.decode(tokenizer(SAID, add_special_tokens=False)["input_ids"]).strip() != SAID:
        notes.append(f"its tokenizer does not write {SAID!r} as it reads it")
    return FromGGUF(model.eval(), tokenizer, tuple(notes))


def _by_transformers(path: Path, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """The model, the loading info, and the tokenizer."""
    folder, name = str(path.parent), path.name
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=name,
        dtype=dtype,
        output_loading_info=True,
        quantization_config=GgufConfig(dequantize=True),
    )
    return *loaded, _as_it_stands(tokenizer)


def _as_it_stands(tokenizer: Any) -> PreTrainedTokenizerFast:
    """The same in a class that reads its folder as it was written: that of a family puts the family's splitting of a text
    in the place of the file's."""
    special = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        chat_template=tokenizer.chat_template,
        clean_up_tokenization_spaces=False,
        **{name: token for name, token in special.items() if token is not None},
    )


def reread(folder: Path, notes: tuple[str, ...] = ()) -> FromGGUF:
    """The model of a folder that was written, as a recipe would load it."""
    config = ModelConfig(model=str(folder))
    return FromGGUF(load_weights(config, "import", torch.device("cpu")).eval(), load_tokenizer(config, "import"), notes)


def _check_file(path: Path) -> None:
    if path.is_dir():
        files = sorted(one.name for one in path.glob("*.gguf"))
        raise ValueError(f"{path} is a folder: name the GGUF file in it" + (f", such as {files[0]}" if files else ""))
    if not path.is_file():
        raise ValueError(f"there is no file {path} to import")
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"{path} is no GGUF file: it does not begin with the letters GGUF")


def _header(path: Path) -> tuple[dict[str, Any], dict[str, int], str | None]:
    """What the file says of itself without its vocabulary; the number of elements of each tensor; and the type of its floats,
    None if it is quantized."""
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field for name, field in reader.fields.items() if not _is_long(field)}
        settings = {name: field.contents() for name, field in fields.items()}
    except Exception as error:  # a file that is cut off makes numpy and struct raise what they like
        raise ValueError(f"{path} is damaged or cut off: {' '.join(str(error).split())[:200]}") from error
    if (parts := settings.get("split.count", 1)) > 1:
        raise ValueError(
            f"{path} is one of {parts} parts: join them first, by llama.cpp's `llama-gguf-split --merge FIRST WHOLE`"
        )
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    types = {tensor.tensor_type.name for tensor in reader.tensors}
    floats = None if types - names.keys() else names[next(kind for kind in ("BF16", "F16", "F32") if kind in types)]
    return settings, {tensor.name: math.prod(map(int, tensor.shape)) for tensor in reader.tensors}, floats


def _is_long(field: Any) -> bool:
    return len(field.data) > 1000  # tokens, scores and merges


def _unreadable(path: Path, settings: Mapping[str, Any], error: Exception) -> str:
    kind, said = settings.get("general.architecture"), " ".join(str(error).split())[:300]
    if "not supported" in said or "Unknown gguf" in said or kind is None:
        return (
            f"{path} holds a model of the architecture {kind}, which transformers does not read from GGUF: take its Hugging "
            "Face folder instead"
        )
    return f"{path} is no model that transformers can read ({kind}): {said}"


def _plain(model: Any, name: str) -> None:
    """Take from a model what says that it came out of a quantized file: its weights are floats now."""
    for holder, attribute in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(holder, attribute):
            delattr(holder, attribute)
    model.is_quantized = False
    model.config._name_or_path = name


def _split_digits(tokenizer: Any, settings: Mapping[str, Any]) -> Iterator[str]:
    """Let a tokenizer take every digit alone where the file says so, which transformers passes over."""
    kind = settings.get("tokenizer.ggml.pre")
    if settings.get("tokenizer.ggml.model") != "gpt2" or kind is None:
        return
    if kind in DIGITS_ALONE:
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif kind not in AS_GPT2 and isinstance(tokenizer.backend_tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel):
        yield f"transformers does not know how the tokenizer {kind!r} splits a text, and splits as GPT-2 does: tokens may differ"


def _left_out(model: Any, elements: Mapping[str, int]) -> Iterator[str]:
    """Name what the file holds and the model does not."""
    tensors = {id(p): p for p in model.parameters()}
    if "rope_freqs.weight" in elements:
        yield "transformers leaves out rope_freqs.weight, the file's stretch of long positions: compare with its config.json"
    more = sum(elements.values()) - elements.get("rope_freqs.weight", 0) - sum(p.numel() for p in tensors.values())
    if more:
        yield f"the file holds {abs(more):,} numbers {'more' if more > 0 else 'fewer'} than the model: {listed(elements)}"


def _set_ends(model: Any, tokenizer: Any, settings: Mapping[str, Any]) -> None:
    """Let the folder say which tokens end a response: those that the file names, and the end of a turn in its chat template."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the file names no token that ends a text (tokenizer.ggml.eos_token_id): no response could ever end"
        )
    named = [settings.get(f"tokenizer.ggml.{end}_token_id") for end in ENDS]
    size = model.get_input_embeddings().num_embeddings
    model.generation_config.eos_token_id = [int(i) for i in named if i is not None and int(i) < size]
    ids = list(end_ids(tokenizer, model.generation_config, []))
    model.generation_config.eos_token_id = ids if len(ids) > 1 else ids[0]
    model.config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = (
        tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    )


def _asked(tokenizer: Any, text: str) -> torch.Tensor:
    """The ids of a question, `[1, L]`, by the chat template where there is one."""
    if tokenizer.chat_template is None:
        return tokenizer(text, return_tensors="pt")["input_ids"]
    talk = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt", return_dict=False)
