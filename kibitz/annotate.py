"""What both models thought at every token of a response: the rows that the heat-map shows."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kibitz.batching import group, pack
from kibitz.config import ModelConfig
from kibitz.data import encode_prompt
from kibitz.engines.torch import TorchEngine
from kibitz.losses.divergences import reverse_kl
from kibitz.models import LanguageModel, check_same_tokenizer, load_model, load_tokenizer, pick_device, stop_ids
from kibitz.types import Prompt, Rollout, Sampling, Scored

DEFAULT_TOKENS = 256
FORK_NATS = 1.0
"""A response has a forking token only if the teacher finds one e times less likely than the student did."""


@torch.no_grad()
def annotate(
    student: LanguageModel,
    teacher: LanguageModel | None,
    rollouts: Sequence[Rollout],
    top: int = 5,
    max_tokens: int | None = None,
) -> list[dict[str, Any]]:
    """One row per rollout, in order, as in `rollouts.jsonl`. Log-probabilities are at temperature 1.

    Both models' whole distributions over `max_tokens` tokens are in memory at a time; by default that goes with the
    vocabulary, and only a single longer rollout takes more."""
    rows: dict[int, dict[str, Any]] = {}
    for indices in group(rollouts, max_tokens or min(8192, 4 * student.chunk_tokens)):
        members = [rollouts[i] for i in indices]
        batch = pack([Scored(r, r.weight_T()) for r in members], student.device)
        tokens = [_tokens(model, batch, top) for model in (student, teacher) if model is not None]
        start = 0
        for index, rollout in zip(indices, members, strict=True):
            part = slice(start, start + rollout.num_tokens)
            rows[index] = _row(student, rollout, [one[part] for one in tokens])
            start += rollout.num_tokens
    return [rows[i] for i in range(len(rollouts))]


class _Opinion:
    """One model's log-probabilities of the written tokens, its top few, and the whole distribution."""

    def __init__(self, logp_TV: Tensor, token_T: Tensor, top: int):
        self.logp_TV, self.token_T, self.top = logp_TV, token_T, top

    def __getitem__(self, part: slice) -> "_Opinion":
        return _Opinion(self.logp_TV[part], self.token_T[part], self.top)

    def written(self) -> list[float]:
        return self.logp_TV.gather(-1, self.token_T[:, None])[:, 0].tolist()

    def best(self, decode) -> list[list[tuple[str, float]]]:
        logp_TK, ids_TK = self.logp_TV.topk(min(self.top, self.logp_TV.shape[-1]), dim=-1)
        pairs = zip(ids_TK.tolist(), logp_TK.exp().tolist(), strict=True)
        return [[(decode(i), p) for i, p in zip(ids, probabilities, strict=True)] for ids, probabilities in pairs]


def _tokens(model: LanguageModel, batch, top: int) -> _Opinion:
    (logp_TV,) = model(batch, lambda hidden_TD, head: (torch.log_softmax(head(hidden_TD).float(), -1),))
    return _Opinion(logp_TV, batch.tokens.token_T, top)


def _row(student: LanguageModel, rollout: Rollout, opinions: list[_Opinion]) -> dict[str, Any]:
    def decode(token: int) -> str:
        return student.tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    ours, theirs = opinions[0], opinions[-1] if len(opinions) > 1 else None
    tokens = [
        {"text": decode(token), "id": token, "student_logp": logp, "student_top": best}
        for token, logp, best in zip(rollout.response_ids, ours.written(), ours.best(decode), strict=True)
    ]
    fork = None
    if theirs is not None:
        kl = reverse_kl(ours.logp_TV, theirs.logp_TV).tolist()
        for token, logp, best, nats in zip(tokens, theirs.written(), theirs.best(decode), kl, strict=True):
            token |= {"teacher_logp": logp, "teacher_top": best, "reverse_kl": nats}
        penalties = [token["student_logp"] - token["teacher_logp"] for token in tokens]
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

    A given response is not closed by an EOS: it may be the beginning of one."""
    configs = {"student": ModelConfig(model=student), "teacher": ModelConfig(model=teacher)}
    tokenizers = {role: load_tokenizer(config, role) for role, config in configs.items()}
    check_same_tokenizer(tokenizers["student"], tokenizers["teacher"])
    device = pick_device()
    ours, theirs = (load_model(config, role, device, tokenizers[role]) for role, config in configs.items())
    prompts = [_prompt(ours, number, text, template or {}) for number, (text, _) in enumerate(pairs)]
    longest = max(len(prompt.ids) for prompt in prompts)
    limit = max_tokens or min(DEFAULT_TOKENS, max(1, _room(ours, theirs) - longest))
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
    return annotate(ours, theirs, rollouts)


def _prompt(model: LanguageModel, number: int, text: str, template: dict[str, Any]) -> Prompt:
    if not text.strip():
        raise ValueError("the prompt is empty: write the text that the student should answer")
    ids = encode_prompt(model.tokenizer, [{"role": "user", "content": text}], template)
    return Prompt(ids=tuple(ids), text=text, key=str(number))


def _given(model: LanguageModel, prompt: Prompt, response: str) -> Rollout:
    ids = model.tokenizer(response, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError("the response is empty: write one, or leave it out and the student writes its own")
    return Rollout(prompt, ids, torch.zeros(len(ids)), finished=False)


def _room(*models: LanguageModel) -> int:
    """Positions that all models have."""
    return min(model.max_positions or 2**31 for model in models)
