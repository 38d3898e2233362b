"""Greedy texts of two programs that should write the same: up to where the two likeliest tokens are too close to tell."""

from collections.abc import Sequence

import httpx
import torch
from transformers import AutoModelForCausalLM


def by_transformers(folder: str, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[tuple[int, float]]]:
    """For each prompt the tokens that `generate` writes, each with the gap of the two likeliest log-probabilities there."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for ids in prompts:
        out = model.generate(
            torch.tensor([list(ids)]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), max_new_tokens=num_tokens,
            do_sample=False, output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        pairs = [scores[0].log_softmax(-1).topk(2).values.tolist() for scores in out.scores]
        written = out.sequences[0, len(ids) :].tolist()
        found.append([(token, first - second) for token, (first, second) in zip(written, pairs, strict=True)])
    return found


def by_server(url: str, name: str, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
    """The same of a server with the completions API that returns token ids, as vLLM's does."""
    found = []
    for ids in prompts:
        body = {
            "model": name,
            "prompt": list(ids),
            "max_tokens": num_tokens,
            "temperature": 0,
            "return_token_ids": True,
        }
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=600)
        answer.raise_for_status()
        found.append(answer.json()["choices"][0]["token_ids"])
    return found


def num_compared(ours: Sequence[tuple[int, float]], theirs: Sequence[int], tie: float = 1e-3) -> int:
    """Return how many tokens were the same before the first tie; AssertionError where two differ before one."""
    for place, (token, gap) in enumerate(ours):
        if gap < tie:
            return place
        assert place < len(theirs) and theirs[place] == token, f"token {place}: {token} and {theirs[place : place + 1]}"
    assert len(theirs) == len(ours), "both end at the same token"
    return len(ours)
