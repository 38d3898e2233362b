"""What the toy worlds and their shipped models are held against."""

from typing import Any

import torch
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from kibitz.worlds import get

SPLITS = ("train", "dev", "test")
seeds = st.integers(0, 2**32)


def by_python(text: str) -> str:
    """The oracle: Python's own precedence, over the integers."""
    return str(eval(text) % 10)


def probabilities(world: str, name: str, prompt: str, response: str) -> list[float]:
    """What a shipped model gives to each token of a response and to its end."""
    tok: Any = get(world).tokenizer()
    model = AutoModelForCausalLM.from_pretrained(get(world).checkpoint(name))
    messages = [{"role": "user", "content": prompt}]
    num_prompt = len(tok.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])
    messages.append({"role": "assistant", "content": response})
    ids = torch.tensor(tok.apply_chat_template(messages)["input_ids"])
    with torch.no_grad():
        probability_TV = model(ids[None]).logits[0].softmax(-1)
    return probability_TV[num_prompt - 1 : -1].gather(-1, ids[num_prompt:, None])[:, 0].tolist()
