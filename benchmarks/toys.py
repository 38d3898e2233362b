"""Models with random weights and prompts of made-up words, for benchmarks: nothing is downloaded.

Responses never end by themselves: one channel of the hidden states is large and positive, and that of the end's embedding large
and negative, so that every side writes as many tokens.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
END, PAD = 0, 1
ENDLESS = -20.0
"""Logarithm of the odds of an end, about: some 15 nats below the other tokens of the vocabulary."""


@dataclass(frozen=True)
class Size:
    vocab: int
    hidden: int
    layers: int
    inner: int = 0
    """Width of the feed-forward layers; 0: three times `hidden`."""

    @property
    def wide(self) -> int:
        return self.inner or 3 * self.hidden


SIZES = {
    "0.03M": Size(128, 32, 2),
    "0.5M": Size(512, 96, 4),
    "5M": Size(512, 256, 6),
    "25M": Size(512, 512, 8),
}


def words(vocab: int) -> list[str]:
    return ["<end>", "<pad>", *(f"w{i}" for i in range(vocab - 2))]


def build(size: Size, seed: int = 0, end_odds: float = ENDLESS) -> Any:
    """A Qwen3 with random weights; a response ends with odds of about exp(`end_odds`) to the other words together."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(seed)
    head_dim = 32 if size.hidden <= 512 else 64
    config = Qwen3Config(
        vocab_size=size.vocab, hidden_size=size.hidden, intermediate_size=size.wide, num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // head_dim, num_key_value_heads=max(1, size.hidden // head_dim // 2),
        head_dim=head_dim, max_position_embeddings=8192, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=END, pad_token_id=PAD,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        rows = model.get_input_embeddings().weight
        rows.normal_(0.0, 0.1)
        rows[:, 0] = 0.3  # as large as three others; the final norm makes about 2.8 of it
        rows[END, 1:] = 0.0
        rows[END, 0] = 0.3 + (end_odds - 0.0) / 2.8
        if end_odds > -10:
            _calibrate(model, end_odds)
    return model


def _calibrate(model: Any, end_odds: float) -> None:
    """Move the end's embedding until its mean odds on random text are as wanted."""
    import torch

    ids = torch.randint(2, model.config.vocab_size, (8, 64), generator=torch.Generator().manual_seed(1))
    rows = model.get_input_embeddings().weight
    for _ in range(8):
        hidden = model.base_model(input_ids=ids).last_hidden_state
        logits = model.get_output_embeddings()(hidden)
        rest = torch.cat([logits[..., :END], logits[..., END + 1 :]], -1).logsumexp(-1)
        gap = end_odds - (logits[..., END] - rest).mean()
        rows[END, 0] += gap / hidden[..., 0].mean()


def save(model: Any, folder: Path) -> Path:
    """A folder as Hugging Face has it, with a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words(model.config.vocab_size))}, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    quiet()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def quiet() -> None:
    """No progress bars of transformers."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def prompts(vocab: int, number: int, length: int) -> list[str]:
    """Different prompts of `length` words."""
    draw = random.Random(0)
    return [" ".join(draw.choices(words(vocab)[2:], k=length)) for _ in range(number)]


def write_prompts(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), encoding="utf-8")
    return path
