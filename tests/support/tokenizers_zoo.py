"""Small tokenizers of the kinds that language models have, trained here on a few lines of many scripts."""

import json
from functools import cache
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "the student writes and the teacher reads what it wrote, word by word",
    "The quick brown fox didn't jump over 12 lazy dogs; it cost $3.50 (about 345,678 yen).",
    "def f(x):\n    return x + 1  # a comment\n\n\tif x: pass\r\n",
    "Größe, naïve café, déjà vu, señor, Ünïcödé",
    "学生写字，老师读它。日本語のテキスト、ひらがなとカタカナ。한국어 문장",
    "Привет, мир! γειά σου Κόσμε שלום עולם مرحبا بالعالم नमस्ते दुनिया",
    "😀 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 e\u0301 n\u0303 … ‘quotes’ — dash",
    "5+(2*3)-4 5+6-4=1-4=7 <think> </think> <|im_end|>",
] * 3
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def byte_level(pattern: str | None, normalizer: Any, size: int, special: list[str]) -> Tokenizer:
    """BPE of bytes; without a pattern by GPT-2's own rule."""
    backend = Tokenizer(models.BPE())
    if normalizer is not None:
        backend.normalizer = normalizer
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), behavior="isolated")]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def unigram(special: list[str]) -> Tokenizer:
    """SentencePiece's: `▁` for spaces and one before the text; bytes for what the pieces do not hold."""
    draft = Tokenizer(models.Unigram())
    draft.pre_tokenizer = pre_tokenizers.Metaspace()
    draft.train_from_iterator(CORPUS, trainers.UnigramTrainer(vocab_size=250, unk_token="<unk>", show_progress=False,
                                                              special_tokens=["<unk>"]))  # fmt: skip
    pieces = [(token, 0.0) for token in special] + [(token, -20.0) for token in BYTES]
    held = {token for token, _ in pieces}
    rows = [(draft.id_to_token(i), -5.0 - i / 100) for i in range(draft.get_vocab_size())]
    backend = Tokenizer(
        models.Unigram(
            pieces + [row for row in rows if row[0] not in held], unk_id=special.index("<unk>"), byte_fallback=True
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                         decoders.Strip(" ", 1, 0)])  # fmt: skip
    return backend


def llama2(special: list[str]) -> Tokenizer:
    """BPE with byte fallback, and the spaces written by a normalizer."""
    draft = Tokenizer(models.BPE())
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    draft.normalizer = normalizer
    draft.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=220, special_tokens=special + BYTES, show_progress=False,
                                                          limit_alphabet=80))  # fmt: skip
    model = json.loads(draft.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    backend = Tokenizer(models.BPE(model["vocab"], merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizer
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                         decoders.Strip(" ", 1, 0)])  # fmt: skip
    return backend


def word_piece(special: list[str]) -> Tokenizer:
    """BERT's, lower case and without accents."""
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    backend.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=350, special_tokens=special, show_progress=False)
    )
    return backend


def characters(special: list[str]) -> Tokenizer:
    """One token a character of the corpus; the others are unknown."""
    known = sorted(set("".join(CORPUS)))
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate([*special, *known])}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return backend


@cache
def zoo() -> dict[str, PreTrainedTokenizerFast]:
    plain = ["<pad>", "<bos>", "</s>", "<unk>"]
    llama = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    qwen = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    made = {
        "byte-level": (byte_level(None, None, 380, ["<|endoftext|>"]), "<|endoftext|>", None),
        "llama-3": (byte_level(LLAMA3, None, 420, llama), "<|eot_id|>", None),
        "qwen": (byte_level(QWEN, normalizers.NFC(), 400, qwen), "<|im_end|>", None),
        "unigram": (unigram(plain), "</s>", "<unk>"),
        "llama-2": (llama2(plain), "</s>", "<unk>"),
        "word-piece": (word_piece(plain), "</s>", "<unk>"),
        "characters": (characters(plain), "</s>", "<unk>"),
    }
    found = {}
    for name, (backend, eos, unknown) in made.items():
        found[name] = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            eos_token=eos,
            unk_token=unknown,
            additional_special_tokens=[t for t in ("<|im_start|>", "<|eot_id|>") if backend.token_to_id(t) is not None],
            clean_up_tokenization_spaces=False,
        )
    found["qwen"].add_tokens(["<think>", "</think>"])
    return found


CHATML = (
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n"
    "{%- if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and the special tokens that Qwen's models have."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({sign: i for i, sign in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer
