"""The rows of the heat-map: both models' log-probabilities and likeliest tokens at every token of a response."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kibitz.batching import group, pack
from kibitz.config import LocalTeacherConfig, ModelConfig
from kibitz.data import encode_prompt, encode_text
from kibitz.engines.torch import TorchEngine
from kibitz.logprobs import gather_tokens, log_probs
from kibitz.losses.criteria import ReverseKL, likeliest
from kibitz.losses.spans import span_sums
from kibitz.losses.supports import find_token
from kibitz.methods.stored import load_rollouts, prompts_of
from kibitz.models import LanguageModel
from kibitz.models.language_model import num_ids
from kibitz.models.load import load_model, load_tokenizer, pick_device, share_vocabulary, stop_ids
from kibitz.signals import Batch, Dense, Sampled, Scored, Signal, Spans, Tokens, TopK
from kibitz.teachers import ScoreRequest, Teacher, Voice, build
from kibitz.types import Prompt, Rollout, Sampling

DEFAULT_TOKENS = 256
FORK_NATS = 1.0
"""A response has a forking token only if the teacher finds one e times less likely than the student did."""


@torch.no_grad()
def annotate(
    student: LanguageModel,
    teacher: Teacher | None,
    rollouts: Sequence[Rollout],
    top: int = 5,
    max_tokens: int | None = None,
) -> list[dict[str, Any]]:
    """One row per rollout, in order, as in `rollouts.jsonl`. Log-probabilities are at temperature 1.

    Both models' whole distributions over `max_tokens` tokens are in memory at a time; by default that goes with the
    vocabulary, and only a single longer rollout takes more."""
    rows: dict[int, dict[str, Any]] = {}
    size = max_tokens or min(8192, 4 * student.chunk_tokens)
    for indices in group(rollouts, size):
        members = [rollouts[i] for i in indices]
        signals = [None] * len(members) if teacher is None else teacher.score(members, size)
        batch = pack([Scored(r, r.weight_T(), s) for r, s in zip(members, signals, strict=True)], student.device)
        tokens, start = _tokens(student, batch, top), 0
        for index, rollout in zip(indices, members, strict=True):
            part = slice(start, start + rollout.num_tokens)
            rows[index] = _row(student, rollout, tokens[part])
            if teacher is not None and (voices := teacher.voices(rollout.prompt)):
                rows[index]["teachers"] = _one_by_one(student, voices, rollout, batch.tokens[part], tokens[part], top)
            start = part.stop
    return [rows[i] for i in range(len(rollouts))]


def _one_by_one(
    student: LanguageModel,
    voices: Sequence[Voice],
    rollout: Rollout,
    tokens: Tokens,
    shown: list[dict[str, Any]],
    top: int,
) -> list[dict[str, Any]]:
    """Add to each token, as `teachers`, the scores of each of several teachers, and return their names and weights."""
    for token in shown:
        token["teachers"] = []
    for voice in voices:
        signal = voice.teacher.score([rollout])[0]
        logp_T, kl_T = _against(signal, tokens)
        best = _named(student, *likeliest(signal, top))
        for token, logp, kl, likely in zip(shown, logp_T.tolist(), kl_T.tolist(), best, strict=True):
            token["teachers"].append({"logp": logp, "kl": None if math.isnan(kl) else kl, "top": likely})
    return [{"name": voice.name, "weight": voice.weight} for voice in voices]


def _against(signal: Signal, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """One teacher's log-probabilities of the written tokens, and KL(it || all of them together); NaN if it cannot be known."""
    match signal:
        case Dense(hidden_TD, head):
            heard = ReverseKL()(head(hidden_TD).float(), tokens)
            return heard["student_logp"], heard["reverse_kl"]
        case TopK():
            logp_T = find_token(signal, tokens.token_T)[0]
        case Sampled(logp_T) | Spans(teacher_logp_T=logp_T):
            pass
    return logp_T, torch.full_like(logp_T, math.nan)


def _tokens(student: LanguageModel, batch: Batch, top: int) -> list[dict[str, Any]]:
    """Describe each response token of a batch, by the student's distribution and by the teacher's signal."""
    ids = batch.tokens.token_T.tolist()
    tokens: list[dict[str, Any]] = [{"text": _decoded(student, token), "id": token} for token in ids]

    def say(**columns: Sequence[Any]) -> None:
        for name, column in columns.items():
            for token, value in zip(tokens, column, strict=True):
                token[name] = _short(value) if isinstance(value, float) else value

    def look(hidden_TD: Tensor, head: nn.Module) -> tuple:
        logits_TV = head(hidden_TD).float()
        logp_TV = log_probs(logits_TV)
        best = logp_TV.topk(min(top, logp_TV.shape[-1]), dim=-1)
        written_T = gather_tokens(logp_TV, batch.tokens.token_T)
        say(student_logp=written_T.tolist(), student_top=_named(student, best.indices, best.values))
        if (signal := batch.tokens.signal) is not None:
            heard = ReverseKL()(logits_TV, batch.tokens)
            say(teacher_logp=heard["teacher_logp"].tolist(), teacher_top=_named(student, *likeliest(signal, top)))
            say(reverse_kl=heard["reverse_kl"].tolist())
            if isinstance(signal, Spans):
                say(**_of_spans(signal, written_T))
        return ()

    student(batch, look)
    return tokens


def _of_spans(signal: Spans, written_T: Tensor) -> dict[str, list[Any]]:
    """Both models' log-probabilities of the whole span, at each of its tokens; none of the teacher's where it could not be
    compared. `span` counts the spans of a response."""
    heard = zip(signal.teacher_logp_T.tolist(), signal.comparable_T.tolist(), strict=True)
    return {
        "span": signal.span_T.tolist(),
        "student_logp": span_sums(written_T, signal).tolist(),
        "teacher_logp": [logp if weight else None for logp, weight in heard],
    }


def _named(student: LanguageModel, ids_TK: Tensor, logp_TK: Tensor) -> list[list[tuple[str, float]]]:
    """Tokens as text with their probabilities."""
    pairs = zip(ids_TK.tolist(), logp_TK.exp().tolist(), strict=True)
    return [[(_decoded(student, i), _short(p)) for i, p in zip(ids, shares, strict=True)] for ids, shares in pairs]


def _short(value: float) -> float:
    """The digits that float32 has: written as float64 they would be half of the file."""
    return float(f"{value:.7g}")


def _decoded(student: LanguageModel, token: int) -> str:
    return student.tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _row(student: LanguageModel, rollout: Rollout, tokens: list[dict[str, Any]]) -> dict[str, Any]:
    fork = None
    if "span" in tokens[0]:
        tokens = [token | {"span": token["span"] - tokens[0]["span"]} for token in tokens]
    if "teacher_logp" in tokens[0]:
        unheard = float("-inf")
        penalties = [unheard if (t := token["teacher_logp"]) is None else token["student_logp"] - t for token in tokens]
        worst = max(range(len(tokens)), key=penalties.__getitem__)
        fork = worst if penalties[worst] > FORK_NATS else None
    return {
        "prompt": rollout.prompt.text,
        "prompt_key": rollout.prompt.key,
        "answer": rollout.prompt.answer,
        "response": rollout.text or student.tokenizer.decode(rollout.response_ids, skip_special_tokens=True),
        "finished": rollout.finished,
        "reward": rollout.reward,
        "fork": fork,
        "tokens": tokens,
    }


def score_texts(
    student: str,
    teacher: str,
    pairs: Sequence[tuple[str, str | None]],
    *,
    max_tokens: int | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    template: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Annotated rows of `(prompt, response)` texts; where the response is None, the student writes one.

    A given response is not closed by an EOS: it may be the beginning of one, so that its row has no `finished`."""
    configs = {"student": ModelConfig(model=student), "teacher": ModelConfig(model=teacher)}
    tokenizers = {role: load_tokenizer(config, role) for role, config in configs.items()}
    device = pick_device()
    ours, theirs = (load_model(config, role, device, tokenizers[role]) for role, config in configs.items())
    share_vocabulary([ours, theirs])
    reader = build.reader_of(theirs, tokenizers["student"], template or {})
    prompts = [_prompt(ours, number, text, template or {}) for number, (text, _) in enumerate(pairs)]
    longest = max(len(prompt.ids) for prompt in prompts)
    limit = min(max_tokens or DEFAULT_TOKENS, max(1, _room(ours, theirs) - longest))
    sampling = Sampling(max_tokens=limit, temperature=temperature, stop_ids=stop_ids(ours, []), seed=seed)
    engine, rollouts = TorchEngine(ours), []
    for prompt, (_, response) in zip(prompts, pairs, strict=True):
        if response is None:
            rollouts += engine.generate([prompt], sampling)
        else:
            rollouts.append(_given(ours, prompt, response))
    longest = max(len(r.prompt.ids) + r.num_tokens for r in rollouts)
    if longest > _room(ours, theirs):
        raise ValueError(
            f"prompt and response have {longest} tokens together, and the models {_room(ours, theirs)} positions"
        )
    rows = annotate(ours, reader, rollouts)
    return [row if given is None else {**row, "finished": None} for row, (_, given) in zip(rows, pairs, strict=True)]


def _prompt(model: LanguageModel, number: int, text: str, template: dict[str, Any]) -> Prompt:
    if not text.strip():
        raise ValueError("the prompt is empty: write the text that the student should answer")
    ids = encode_prompt(model.tokenizer, [{"role": "user", "content": text}], template)
    return Prompt(ids=tuple(ids), text=text, key=str(number))


def _given(model: LanguageModel, prompt: Prompt, response: str) -> Rollout:
    ids = encode_text(model.tokenizer, response)
    if not ids:
        raise ValueError("the response is empty: write one, or leave it out and the student writes its own")
    return Rollout(prompt, ids, torch.zeros(len(ids)), finished=False)


def _room(*models: LanguageModel) -> int:
    """Positions that all models have."""
    return min(model.max_positions or 2**31 for model in models)


def store_scores(
    teacher: str, rollouts: Path, folder: Path, request: ScoreRequest, rows: int = 256
) -> Iterator[tuple[int, int]]:
    """Let a teacher read a file of rollouts once, and keep what it says in a folder, for `teacher.stored` or
    `teacher.store` of a recipe. Yields how many are done, of how many."""
    config = LocalTeacherConfig(model=teacher, store=str(folder))
    tokenizer = load_tokenizer(config, "teacher")
    prompts = prompts_of(rollouts)
    by_key = load_rollouts(rollouts, prompts, num_ids(tokenizer), num_samples=1, max_tokens=2**31)
    found = [rollout for some in by_key.values() for rollout in some]
    model = build.load(config, pick_device(), build.StudentInfo(tokenizer))
    assert model is not None
    model.check(prompts, max(r.num_tokens for r in found))
    scorer = model.scorer(request)
    for start in range(0, len(found), rows):
        scorer.score(found[start : start + rows])
        yield min(len(found), start + rows), len(found)
