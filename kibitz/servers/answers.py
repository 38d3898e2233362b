"""What a server answered, taken apart: every number is looked at before anything is learnt from it.

An answer that cannot be right raises ServerError with the server's address: other lengths than were asked for, ids outside
the vocabulary, numbers that are no log-probabilities. vLLM writes -9999 for the logarithm of 0; here that is NOTHING.
"""

import base64
import binascii
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy
import torch
from torch import Tensor

from kibitz.logprobs import NOTHING
from kibitz.servers import ServerError

ABOVE_ONE = 0.01  # nats: room for rounding in bfloat16
OVER_FULL = 0.05  # nats: the same for a sum of many


@dataclass(frozen=True)
class Written:
    """One response of a server: its tokens and their log-probabilities when they were sampled."""

    ids: list[int]
    logp_T: Tensor


@dataclass(frozen=True)
class Said:
    """What a teacher said of some tokens: of each one's K likeliest, and of the one that stands there. A place without a
    token repeats the first of its row, whose probability then counts once."""

    ids_TK: Tensor
    logp_TK: Tensor
    logp_T: Tensor


def written(name: str, answer: Any, model: str, num: int, vocab_size: int, max_tokens: int) -> list[Written]:
    """The `num` responses in an answer of `/v1/completions` with `logprobs` and `return_token_ids`, by their index."""
    tree = _object(name, answer, model)
    choices = _list(name, tree.get("choices"), "choices", num)
    responses: dict[int, Written] = {}
    for choice in choices:
        choice = _dict(name, choice, "a choice")
        index = choice.get("index")
        if not _is_int(index) or not 0 <= index < num or index in responses:
            raise ServerError(f"{name} numbered a response {index!r:.40} of {num}")
        ids = choice.get("token_ids")
        if ids is None:
            raise ServerError(f"{name} sent text without token ids: kibitz needs vLLM 0.10.2 or newer")
        ids = _ids(name, ids, vocab_size)
        if not 1 <= len(ids) <= max_tokens:
            raise ServerError(f"{name} wrote {len(ids)} tokens where 1 to {max_tokens} were asked for")
        logprobs = _dict(name, choice.get("logprobs"), "logprobs").get("token_logprobs")
        logps = [_logp(name, value) for value in _list(name, logprobs, "log-probabilities", len(ids))]
        responses[index] = Written(ids, torch.tensor(logps))
    return [responses[index] for index in range(num)]


def said(name: str, answer: Any, model: str, ids: Sequence[int], start: int, top_k: int, vocab_size: int) -> Said:
    """What `prompt_logprobs` says of the tokens `ids[start:]`; `answer` is that of either endpoint. `top_k` 0: the tokens
    themselves only."""
    tree = _object(name, answer, model)
    if "prompt_logprobs" not in tree:
        tree = _dict(name, _list(name, tree.get("choices"), "choices", 1)[0], "a choice")
    rows = _list(name, tree.get("prompt_logprobs"), "entries of prompt_logprobs", len(ids))
    wanted = min(top_k, vocab_size)
    parts = [_row(name, row, token, wanted, vocab_size) for row, token in zip(rows[start:], ids[start:], strict=True)]
    logp_T = torch.tensor([own for _, own in parts])
    width = max(1, wanted)
    ids_TK = torch.tensor([[i for i, _ in pairs[:width]] for pairs, _ in parts], dtype=torch.long)
    logp_TK = torch.tensor([[logp for _, logp in pairs[:width]] for pairs, _ in parts])
    _refuse_uniform(name, logp_TK if wanted > 1 else logp_T[:, None])
    return Said(ids_TK, logp_TK, logp_T)


def named(name: str, answer: Any, model: str, ids_TK: Tensor) -> Tensor:
    """The log-probabilities `[T, K]` of the tokens that were asked about: `prompt_token_id_logprobs`, an .npy in base64."""
    packed = _object(name, answer, model).get("prompt_token_id_logprobs")
    if not isinstance(packed, str):
        raise ServerError(f"{name} sent no prompt_token_id_logprobs")
    try:
        scores = numpy.load(io.BytesIO(base64.b64decode(packed, validate=True)), allow_pickle=False)
    except (binascii.Error, ValueError, EOFError, OSError, SyntaxError, MemoryError):
        raise ServerError(f"{name} sent prompt_token_id_logprobs that are no .npy array in base64") from None
    if not isinstance(scores, numpy.ndarray) or scores.dtype.kind != "f" or scores.shape != tuple(ids_TK.shape):
        what = f"{getattr(scores, 'shape', '?')} of {getattr(scores, 'dtype', '?')}"
        raise ServerError(f"{name} scored {what} where {tuple(ids_TK.shape)} of float32 were asked for")
    logp_TK = torch.from_numpy(scores.astype(numpy.float32))
    _refuse_impossible(name, logp_TK)
    logp_TK = logp_TK.clamp(min=NOTHING, max=0.0)
    _refuse_over_full(name, logp_TK.double().exp().sum(-1).max().item())
    _refuse_uniform(name, logp_TK)
    return logp_TK


# ------------------------------------------------------------------ one thing after another


def _object(name: str, answer: Any, model: str) -> dict[str, Any]:
    tree = _dict(name, answer, "an answer")
    if tree.get("model") != model:
        raise ServerError(f"{name} answered as {tree.get('model')!r:.80}, and {model!r} was asked")
    return tree


def _dict(name: str, value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ServerError(f"{name} sent {_shape(value)} where {what} should be an object")
    return value


def _list(name: str, value: Any, what: str, num: int) -> list[Any]:
    if not isinstance(value, list) or len(value) != num:
        raise ServerError(f"{name} sent {_shape(value)} where {num} {what} should be")
    return value


def _shape(value: Any) -> str:
    return f"{len(value)} of them" if isinstance(value, list) else "nothing" if value is None else type(value).__name__


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _ids(name: str, value: Any, vocab_size: int) -> list[int]:
    if not isinstance(value, list) or not all(_is_int(i) for i in value):
        raise ServerError(f"{name} sent {_shape(value)} where token ids should be")
    wrong = [i for i in value if not 0 <= i < vocab_size]
    if wrong:
        raise ServerError(
            f"{name} speaks of the token {str(wrong[0])[:20]} and the tokenizer has {vocab_size}: it serves another model"
        )
    return value


def _logp(name: str, value: Any) -> float:
    """A log-probability: finite, NOTHING at the least, at most 0 but for rounding."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise ServerError(f"{name} sent {value!r:.40} where a log-probability should be")
    if value > ABOVE_ONE:
        raise ServerError(
            f"{name} sent the log-probability {value!r:.20}, which is above 0: start it with --logprobs-mode raw_logprobs"
        )
    return min(0.0, max(NOTHING, float(max(value, -1e4))))


def _row(name: str, row: Any, token: int, wanted: int, vocab_size: int) -> tuple[list[tuple[int, float]], float]:
    """Of one position: the likeliest tokens with their log-probabilities, first the likeliest, and the token's own."""
    logps: dict[int, float] = {}
    outside = 0.0
    for key, value in _dict(name, row, "a position's prompt_logprobs").items():
        if not isinstance(key, str) or not key.isdecimal() or len(key) > 9:
            raise ServerError(f"{name} sent {key!r:.40} where a token id should be")
        logp = _logp(name, _dict(name, value, "a log-probability").get("logprob"))
        if int(key) < vocab_size:
            logps[int(key)] = logp
        else:
            outside += math.exp(logp)
    if outside > 0.01:  # rows that only pad the vocabulary are next to impossible
        raise ServerError(f"{name} finds tokens likely that the tokenizer does not have: it serves another model")
    if token not in logps:
        raise ServerError(f"{name} said nothing of the token {token} that stands there: was the text another?")
    if len(row) < wanted:
        raise ServerError(
            f"{name} sent {len(row)} tokens where {wanted} were asked for: start it with --max-logprobs {wanted}"
        )
    _refuse_over_full(name, outside + sum(math.exp(logp) for logp in logps.values()))
    best = sorted(logps.items(), key=lambda pair: -pair[1])
    if wanted > 1:
        _refuse_left_out(name, [math.exp(logp) for _, logp in best[:wanted]], vocab_size)
    return best + best[:1] * (wanted - len(best)), logps[token]


def _refuse_over_full(name: str, total: float) -> None:
    if total > math.exp(OVER_FULL):
        raise ServerError(
            f"{name} sent probabilities that add up to {total:.3g}: they must be natural log-probabilities over the whole "
            "vocabulary; start it with --logprobs-mode raw_logprobs"
        )


def _refuse_left_out(name: str, likeliest: Sequence[float], vocab_size: int) -> None:
    """No token of the rest is likelier than the least of the likeliest, so the rest cannot hold more than so much."""
    most = 2 * vocab_size * likeliest[-1]  # twice: the server's vocabulary may be padded
    if 1 - sum(likeliest) > OVER_FULL + most:
        raise ServerError(
            f"{name} left out tokens that are likelier than those it sent: its numbers do not fit together"
        )


def _refuse_impossible(name: str, logp_TK: Tensor) -> None:
    if logp_TK.isnan().any():
        raise ServerError(f"{name} sent NaN where log-probabilities should be")
    if (logp_TK > ABOVE_ONE).any():
        raise ServerError(f"{name} sent log-probabilities above 0: start it with --logprobs-mode raw_logprobs")


def _refuse_uniform(name: str, logp_TK: Tensor) -> None:
    """A model whose weights never arrived finds all tokens alike, and would teach that."""
    if logp_TK.numel() >= 8 and logp_TK.max() - logp_TK.min() < 1e-6 and logp_TK.max() < -0.1:
        raise ServerError(f"{name} finds all tokens equally likely: its weights are not loaded")
