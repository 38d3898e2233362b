"""Parse a server's answers: every number is checked before anything is learnt from it.

An answer that cannot be right raises ServerError with the server's address: other lengths than were asked for, ids outside
the vocabulary, numbers that are no log-probabilities, or that do not fit their ranks or one another. vLLM writes -9999 for the
logarithm of 0; here that is NOTHING. What is quoted of an answer holds no part of a key.
"""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy
import torch
from numpy.lib import format as npy
from torch import Tensor

from kibitz.logprobs import NOTHING
from kibitz.servers import ServerError
from kibitz.servers.keys import shown

ABOVE_ONE = 0.01  # nats: room for rounding in bfloat16
OVER_FULL = 0.05  # nats: the same for a sum of many
SEVERAL = 8  # tokens from which on a likeness of all of them is no accident


@dataclass(frozen=True)
class Written:
    """One response of a server: its tokens and their log-probabilities when they were sampled."""

    ids: list[int]
    logp_T: Tensor


@dataclass(frozen=True)
class Said:
    """A teacher's log-probabilities at some positions: of the K likeliest tokens, and of the written one. A place without a
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
            raise ServerError(f"{name} numbered a response {_quoted(index)} of {num}")
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
    """Read the log-probabilities of the tokens `ids[start:]` from `prompt_logprobs`; `answer` is that of either endpoint. With
    `top_k` 0 they are of the written tokens only."""
    tree = _object(name, answer, model)
    if "prompt_logprobs" not in tree:
        tree = _dict(name, _list(name, tree.get("choices"), "choices", 1)[0], "a choice")
    rows = _list(name, tree.get("prompt_logprobs"), "entries of prompt_logprobs", len(ids))
    wanted = min(top_k, vocab_size)
    parts = [_row(name, row, token, wanted, vocab_size) for row, token in zip(rows[start:], ids[start:], strict=True)]
    logp_T = torch.tensor([own for _, own in parts])
    ids_TK = torch.tensor([[i for i, _ in pairs] for pairs, _ in parts], dtype=torch.long)
    logp_TK = torch.tensor([[logp for _, logp in pairs] for pairs, _ in parts])
    _refuse_uniform(name, logp_TK if wanted > 1 else logp_T[:, None])
    if wanted <= 1 and logp_T.eq(0).all():
        _refuse_certain(name, rows, ids, start)
    return Said(ids_TK, logp_TK, logp_T)


def named(name: str, answer: Any, model: str, ids_TK: Tensor) -> Tensor:
    """The log-probabilities `[T, K]` of the tokens that were asked about: `prompt_token_id_logprobs`, an .npy in base64."""
    packed = _object(name, answer, model).get("prompt_token_id_logprobs")
    if not isinstance(packed, str):
        raise ServerError(f"{name} sent no prompt_token_id_logprobs")
    logp_TK = torch.from_numpy(_npy(name, packed, tuple(ids_TK.shape)))
    _refuse_impossible(name, logp_TK)
    logp_TK = logp_TK.clamp(min=NOTHING, max=0.0)
    _refuse_over_full(name, _once_each(name, ids_TK, logp_TK).double().exp().sum(-1).max().item())
    _refuse_uniform(name, logp_TK)
    if len(logp_TK) >= SEVERAL and logp_TK.eq(0).all():
        raise _certain(name)
    return logp_TK


# ------------------------------------------------------------------ one thing after another


def _object(name: str, answer: Any, model: str) -> dict[str, Any]:
    tree = _dict(name, answer, "an answer")
    if tree.get("model") != model:
        raise ServerError(f"{name} answered as {_quoted(tree.get('model'))}, and {model!r} was asked")
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


def _quoted(value: Any) -> str:
    """A stranger's value, in a sentence."""
    return _shape(value) if isinstance(value, list | dict) else shown(repr(value), 80)


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
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or value == -math.inf:
        raise ServerError(f"{name} sent {_quoted(value)} where a log-probability should be")
    if value > ABOVE_ONE:
        raise ServerError(
            f"{name} sent the log-probability {_quoted(value)}, which is above 0: start it with --logprobs-mode raw_logprobs"
        )
    return min(0.0, max(NOTHING, float(max(value, -1e4))))


def _entries(name: str, row: Any, wanted: int) -> dict[int, tuple[float, int | None]]:
    """The tokens of one position with their log-probabilities and their ranks, if the server tells those."""
    entries: dict[int, tuple[float, int | None]] = {}
    for key, value in _dict(name, row, "a position's prompt_logprobs").items():
        if not (key.isascii() and key.isdecimal()) or len(key) > 9 or key != str(int(key)):
            raise ServerError(f"{name} sent {_quoted(key)} where a token id should be")
        value = _dict(name, value, "a log-probability")
        rank = value.get("rank")
        if rank is not None and not (_is_int(rank) and rank >= 1):
            raise ServerError(f"{name} sent {_quoted(rank)} where a token's rank should be")
        entries[int(key)] = _logp(name, value.get("logprob")), rank
    if len(entries) < wanted:
        raise ServerError(
            f"{name} sent {len(entries)} tokens where {wanted} were asked for: start it with --max-logprobs {wanted}"
        )
    return entries


def _row(name: str, row: Any, token: int, wanted: int, vocab_size: int) -> tuple[list[tuple[int, float]], float]:
    """Read one position: the `wanted` likeliest tokens with their log-probabilities, likeliest first, and the token's own."""
    entries = _entries(name, row, wanted)
    if token not in entries:
        raise ServerError(f"{name} said nothing of the token {token} that stands there: was the text another?")
    own, rank = entries[token]
    outside = sum(math.exp(logp) for i, (logp, _) in entries.items() if i >= vocab_size)
    if outside > 0.01:  # rows that only pad the vocabulary are next to impossible
        raise ServerError(f"{name} finds tokens likely that the tokenizer does not have: it serves another model")
    _refuse_over_full(name, sum(math.exp(logp) for logp, _ in entries.values()))
    if rank is not None and own + math.log(rank) > OVER_FULL:  # those before it are at least as likely
        raise ServerError(
            f"{name} sent the log-probability {own:.4g} for the token of rank {_quoted(rank)}, which is too much: start it with "
            "--logprobs-mode raw_logprobs"
        )
    beside = len(entries) > wanted  # the likeliest, and the token that stands there is none of them
    if beside:
        del entries[token]
    best = sorted(((logp, rank, i) for i, (logp, rank) in entries.items()), key=lambda one: (-one[0], one[1] or 0))
    _refuse_misfits(name, best, wanted, vocab_size)
    if beside and best and own > best[-1][0]:
        raise ServerError(f"{name} named tokens less likely than the token {token} that stands there as the likeliest")
    likeliest = [(i, logp) for logp, _, i in best if i < vocab_size]
    return likeliest + (likeliest or [(token, own)])[:1] * (wanted - len(likeliest)), own


def _refuse_misfits(name: str, best: Sequence[tuple[float, int | None, int]], wanted: int, vocab_size: int) -> None:
    """More than the `wanted` likeliest, in another order than that of their ranks, or with likelier ones left out."""
    if len(best) > wanted:
        raise ServerError(f"{name} sent {len(best)} tokens where {wanted} and the one that stands there were asked for")
    ranks = [rank for _, rank, _ in best]
    if None not in ranks and ranks != list(range(1, wanted + 1)):
        raise ServerError(
            f"{name} sent ranks that are not those of its log-probabilities: its numbers do not fit together"
        )
    if wanted > 1:
        _refuse_left_out(name, [math.exp(logp) for logp, _, _ in best], vocab_size)


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


def _once_each(name: str, ids_TK: Tensor, logp_TK: Tensor) -> Tensor:
    """NOTHING where a token stands a second time in its row: who asks names the written token beside the K likeliest, and it
    may be one of them. Both times it must have the same log-probability."""
    ids_TK, order_TK = ids_TK.sort(dim=-1, stable=True)
    logp_TK = logp_TK.gather(-1, order_TK)
    again_TK = torch.zeros_like(ids_TK, dtype=torch.bool)
    again_TK[:, 1:] = ids_TK[:, 1:] == ids_TK[:, :-1]
    if (again_TK[:, 1:] & ((logp_TK[:, 1:] - logp_TK[:, :-1]).abs() > 1e-4)).any():
        raise ServerError(f"{name} sent two log-probabilities for one token: its numbers do not fit together")
    return logp_TK.masked_fill(again_TK, NOTHING)


def _npy(name: str, packed: str, shape: tuple[int, ...]) -> numpy.ndarray:
    """The numbers of an .npy file in base64, as float32. Its head is compared before anything as large as it says is made."""
    wrong = ServerError(f"{name} sent prompt_token_id_logprobs that are no .npy array in base64")
    try:
        file = io.BytesIO(base64.b64decode(packed, validate=True))
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[npy.read_magic(file)]
        theirs, by_column, dtype = read(file)
    except Exception:  # noqa: BLE001  # numpy's parser of a head raises of many kinds on what a stranger wrote
        raise wrong from None
    if dtype.kind != "f" or dtype.itemsize < 4 or theirs != shape:
        raise ServerError(f"{name} scored {theirs} of {dtype} where {shape} of float32 were asked for")
    data = file.read()
    if len(data) != dtype.itemsize * math.prod(shape):
        raise wrong
    numbers = numpy.frombuffer(data, dtype).reshape(shape, order="F" if by_column else "C")
    with numpy.errstate(over="ignore"):
        return numbers.astype(numpy.float32, order="C")


def _refuse_uniform(name: str, logp_TK: Tensor) -> None:
    """A model whose weights never arrived finds all tokens alike, and would teach that."""
    if logp_TK.numel() >= SEVERAL and logp_TK.max() - logp_TK.min() < 1e-6 and logp_TK.max() < -0.1:
        raise ServerError(f"{name} finds all tokens equally likely: its weights are not loaded")


def _refuse_certain(name: str, rows: Sequence[Any], ids: Sequence[int], start: int) -> None:
    """Every token of a response is certain. A short one may be; a long one, or one behind a prompt that is certain too, is
    the answer of a server that writes 0 for everything."""
    told = [row.get(str(token)) if isinstance(row, dict) else None for row, token in zip(rows, ids, strict=True)]
    if len(ids) - start >= SEVERAL or (
        len(ids) > 2 and all(isinstance(entry, dict) and entry.get("logprob") == 0 for entry in told[1:])
    ):
        raise _certain(name)


def _certain(name: str) -> ServerError:
    return ServerError(
        f"{name} finds every token certain, with a log-probability of exactly 0, which no model does: it does not tell its "
        "log-probabilities, or tells them of greedy decoding; start it with --logprobs-mode raw_logprobs"
    )
