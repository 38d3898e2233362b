"""Find the bytes of the text that each token stands for.

Decoding one token after another loses what is needed here: half a character becomes `�`, and a leading-space marker
depends on its place. So the decoder of a Hugging Face tokenizer is read and followed step by step on whole sequences,
with every token kept apart. The result is compared with the tokenizer's own decoding; where they differ, or where there
is no decoder to read (tokenizers in Python), texts of growing prefixes are compared instead, which is slow.

Inside, bytes that are no character yet are lone surrogates U+DC80 to U+DCFF (PEP 383), so that all steps work on text.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

Step = Callable[[list[str]], list[str]]
"""One step of a decoder: the same number of strings out as in."""


class Pieces:
    """`pieces(ids)`: for each token its bytes, or None for a special token, which stands for no text."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.special_ids = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._steps = None if backend is None else _decoder(backend.decoder)

    def __call__(self, ids: Sequence[int]) -> list[bytes | None]:
        written = [i for i in ids if i not in self.special_ids]
        pieces = iter(self._of_text(written))
        return [None if i in self.special_ids else next(pieces) for i in ids]

    def in_the_middle(self, ids: Sequence[int]) -> list[bytes]:
        """The same for each token by itself, as it is behind other text; special ones have no place here."""
        if self._steps is None:
            return [self._by_prefixes([ids[0], i])[1] for i in ids]
        return self._followed([ids[0], *ids])[1:]

    def _of_text(self, ids: list[int]) -> list[bytes]:
        if not ids:
            return []
        if self._steps is not None:
            pieces = self._followed(ids)
            if _same_text(b"".join(pieces), self._decode(ids)):
                return pieces
        return self._by_prefixes(ids)

    def _followed(self, ids: Sequence[int]) -> list[bytes]:
        strings: list[str] = self.tokenizer.convert_ids_to_tokens(list(ids))
        for step in self._steps or []:
            strings = step(strings)
        return [string.encode("utf-8", "surrogateescape") for string in strings]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _by_prefixes(self, ids: list[int]) -> list[bytes]:
        """Return what each token adds to the text. A token that leaves a character open adds nothing; the one that closes it
        adds the whole, and if none does, the bytes are lost with the last token."""
        pieces, done = [], ""
        for end in range(1, len(ids) + 1):
            text = self._decode(ids[:end])
            grown = text.startswith(done) and (end == len(ids) or not text.endswith("�"))
            pieces.append(text[len(done) :].encode() if grown else b"")
            done = text if grown else done
        return pieces


def _same_text(data: bytes, text: str) -> bool:
    """Return whether the bytes decode to the text. Decoders write `�` for one or for all broken bytes, so that with any of
    them only the presence of `�` is compared."""
    try:
        return data.decode("utf-8") == text
    except UnicodeDecodeError:
        return "�" in text


# --------------------------------------------------------------------------------------------- steps of the decoders


def _decoder(decoder: Any) -> list[Step] | None:
    """The steps of a decoder of the library `tokenizers`; None if one is unknown."""
    if decoder is None:
        return [_join_with_spaces]
    spec = json.loads(decoder.__getstate__())
    parts = spec["decoders"] if spec["type"] == "Sequence" else [spec]
    names = [part["type"] for part in parts]
    if any(name not in STEPS for name in names):
        return None
    fused = names.index("Fuse") if "Fuse" in names else len(names)
    return [_strip_whole(part) if i > fused and part["type"] == "Strip" else STEPS[part["type"]](part)
            for i, part in enumerate(parts)]  # fmt: skip


def _join_with_spaces(tokens: list[str]) -> list[str]:
    return [token if i == 0 else f" {token}" for i, token in enumerate(tokens)]


def _each(change: Callable[[str], str]) -> Step:
    return lambda tokens: [change(token) for token in tokens]


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte: itself where it prints, else one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


BYTE_OF = byte_alphabet()


def _byte_level(spec: dict[str, Any]) -> Step:
    def change(token: str) -> str:
        if any(character not in BYTE_OF for character in token):
            return token  # an added token, written as plain text
        return bytes(BYTE_OF[character] for character in token).decode("utf-8", "surrogateescape")

    return _each(change)


def _byte_fallback(spec: dict[str, Any]) -> Step:
    def change(token: str) -> str:
        if not re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
            return token
        return bytes([int(token[3:5], 16)]).decode("utf-8", "surrogateescape")

    return _each(change)


def _replace(spec: dict[str, Any]) -> Step:
    (kind, pattern), content = next(iter(spec["pattern"].items())), spec["content"]
    expression = re.compile(re.escape(pattern) if kind == "String" else pattern)
    return _each(lambda token: expression.sub(lambda _: content, token))


def _metaspace(spec: dict[str, Any]) -> Step:
    mark, first = spec["replacement"], " " if spec["prepend_scheme"] == "never" else ""
    return lambda tokens: [token.replace(mark, " " if i else first) for i, token in enumerate(tokens)]


def _strip(spec: dict[str, Any]) -> Step:
    """Up to so many of a character at either end of each token."""
    content = spec["content"]

    def change(token: str) -> str:
        left = min(spec["start"], len(token) - len(token.lstrip(content)))
        token = token[left:]
        right = min(spec["stop"], len(token) - len(token.rstrip(content)))
        return token[: len(token) - right]

    return _each(change)


def _strip_whole(spec: dict[str, Any]) -> Step:
    """The same at the ends of the whole text, whose tokens stay apart."""

    def stripped(tokens: list[str], limit: int, at_end: bool) -> list[str]:
        kept = []
        for token in tokens[::-1] if at_end else tokens:
            shorter = token.rstrip(spec["content"]) if at_end else token.lstrip(spec["content"])
            num = min(limit, len(token) - len(shorter))
            limit = limit - num if num == len(token) else 0
            kept.append(token[: len(token) - num] if at_end else token[num:])
        return kept[::-1] if at_end else kept

    return lambda tokens: stripped(stripped(tokens, spec["start"], False), spec["stop"], True)


CLEANED = [(" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"),
           (" do not", " don't"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")]  # fmt: skip


def _word_piece(spec: dict[str, Any]) -> Step:
    prefix = spec["prefix"]

    def change(index: int, token: str) -> str:
        if index:
            token = token[len(prefix) :] if token.startswith(prefix) else f" {token}"
        for ugly, clean in CLEANED if spec["cleanup"] else []:
            token = token.replace(ugly, clean)
        return token

    return lambda tokens: [change(i, token) for i, token in enumerate(tokens)]


def _suffix(spec: dict[str, Any]) -> Step:
    suffix = spec["suffix"]
    return lambda tokens: [token.replace(suffix, " " if i < len(tokens) - 1 else "") for i, token in enumerate(tokens)]


STEPS: dict[str, Callable[[dict[str, Any]], Step]] = {
    "ByteLevel": _byte_level,
    "ByteFallback": _byte_fallback,
    "Replace": _replace,
    "Metaspace": _metaspace,
    "Strip": _strip,
    "Fuse": lambda spec: lambda tokens: tokens,
    "WordPiece": _word_piece,
    "BPEDecoder": _suffix,
}
