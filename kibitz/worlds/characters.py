"""Worlds of single characters share a tokenizer, and the place of their shipped models."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, ASSISTANT, UNKNOWN = "<pad>", "<bos>", "<eos>", "<assistant>", "<unk>"

_TEMPLATE = (
    "{{% for message in messages %}}"
    "{{% if message['role'] == 'user' %}}{{{{ bos_token + message['content'] }}}}"
    "{{% elif message['role'] == 'assistant' %}}{{{{ '{assistant}' + message['content'] + eos_token }}}}"
    "{{% else %}}{{{{ raise_exception('this world knows the roles user and assistant') }}}}{{% endif %}}"
    "{{% endfor %}}"
    "{{% if add_generation_prompt %}}{{{{ '{assistant}' }}}}{{% endif %}}"
)


def chat_template(assistant: str) -> str:
    """`<bos>` opens the user's turn, `assistant` is what the assistant's begins with, and `<eos>` closes it."""
    return _TEMPLATE.format(assistant=assistant)


def tokenizer(characters: str, assistant: str = ASSISTANT, room: int = 128) -> "PreTrainedTokenizerFast":
    """One token a character. Decoding gives back the exact text; a character outside the alphabet becomes `<unk>`."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate([PAD, BOS, EOS, ASSISTANT, UNKNOWN, *characters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    return of_a_world(backend, assistant, room)


def of_a_world(backend: "Tokenizer", assistant: str = ASSISTANT, room: int = 128) -> "PreTrainedTokenizerFast":
    """Any tokenizer that has the special tokens of these worlds, with their chat template; its tokens are put together as they
    are."""
    from tokenizers import decoders
    from transformers import PreTrainedTokenizerFast

    backend.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        additional_special_tokens=[ASSISTANT],
        clean_up_tokenization_spaces=False,
        model_max_length=room,
    )
    fast.chat_template = chat_template(assistant)
    return fast


def shipped(world: str, folder: str, name: str) -> Path:
    """The Hugging Face folder of a model that a world ships, such as `teacher` or `student`."""
    home = Path(__file__).parent / "checkpoints" / folder
    if not (home / name).is_dir():
        known = ", ".join(sorted(path.name for path in home.glob("*/"))) or "none"
        raise ValueError(f"the world {world!r} ships no model {name!r}; it ships: {known}")
    return home / name
