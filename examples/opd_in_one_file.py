"""On-policy distillation in one file: the whole idea, without the library.

    python examples/opd_in_one_file.py STUDENT TEACHER PROMPTS.jsonl [OUTPUT]

STUDENT and TEACHER are Hugging Face folders with one tokenizer; PROMPTS.jsonl has a "prompt" on each line. A step:

    1.  the student writes a response to each prompt          (its own mistakes, not somebody else's text)
    2.  the teacher reads it once, and so has an opinion on every token
    3.  the loss at each token is KL(student || teacher) there, summed over the vocabulary; no gradient flows through
        the writing, so this is supervised learning on states that the student itself visits

Everything here is as plain as can be: each token costs a full forward pass. `kibitz train` does the same steps, with
the same loss on the same seed (tests/test_example.py), with a KV cache, bounded memory and a report.
"""

import hashlib
import json
import random
import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

SEED = 0
STEPS = 40
PROMPTS_PER_STEP = 16
SAMPLES_PER_PROMPT = 4
MAX_TOKENS = 64
LEARNING_RATE = 1e-3
CLIP = 1.0


# ---------------------------------------------------------------- 1. the student writes


def uniform(seed: int, key: str, sample: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments (splitmix64): the batch cannot change a rollout."""
    mask = (1 << 64) - 1
    z = int.from_bytes(hashlib.blake2b(f"{seed}|{key}|{sample}".encode()).digest()[:8], "little")
    z = (z + (position + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
    return ((z ^ z >> 31) >> 11) / 2**53


@torch.no_grad()
def write(student, prompt: list[int], end: int, vocab: int, seed: int, key: str, sample: int) -> list[int]:
    """One response, token by token, each drawn from the student's distribution; it ends with EOS or is cut off."""
    response: list[int] = []
    while len(response) < MAX_TOKENS and response[-1:] != [end]:
        logits = student(torch.tensor([prompt + response])).logits[0, -1, :vocab]
        cdf = logits.float().log_softmax(-1).exp().cumsum(-1, dtype=torch.float64)
        u = uniform(seed, key, sample, len(response)) * cdf[-1]
        response.append(int(torch.searchsorted(cdf, u, right=True)))
    return response


# ---------------------------------------------------------------- 2. the teacher comments, 3. the student learns


def response_logp(model, prompt: list[int], response: list[int], vocab: int) -> Tensor:
    """Log-probabilities `[tokens, vocabulary]` at each token of the response. The logits at position t score token
    t+1: those of a response begin at the prompt's last token, and the last logits score nothing."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1, :vocab]
    return logits.float().log_softmax(-1)


def reverse_kl(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """KL(student || teacher) at each token, in nats. (p - q sums to zero, and keeps the gradient of equals exactly 0.)"""
    p, q = student_logp.exp(), teacher_logp.exp()
    return (p * (student_logp - teacher_logp) - p + q).sum(-1)


def step(student, teacher, optimizer, rollouts: list[tuple[list[int], list[int]]], vocab: int) -> float:
    """One update. The loss is the mean over all tokens of all rollouts: not a mean of means, which would make the
    tokens of short responses weigh more."""
    num_tokens = sum(len(response) for _, response in rollouts)
    total = 0.0
    for prompt, response in rollouts:
        with torch.no_grad():
            teacher_logp = response_logp(teacher, prompt, response, vocab)
        loss = reverse_kl(response_logp(student, prompt, response, vocab), teacher_logp).sum() / num_tokens
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP)
    optimizer.step()
    optimizer.zero_grad()
    return total


# ---------------------------------------------------------------- the loop


def read_prompts(path: str, tokenizer) -> list[tuple[str, list[int]]]:
    """Each prompt in the chat template, with a key that names it for good."""
    prompts = []
    for line in Path(path).read_text(encoding="utf-8").split("\n"):
        if line.strip():
            messages = [{"role": "user", "content": json.loads(line)["prompt"]}]
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            text = json.dumps(messages, ensure_ascii=False, sort_keys=True)
            prompts.append((hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), ids))
    return prompts


def pick(prompts: list, number: int) -> list:
    """The prompts of one step: epoch after epoch, each in its own order."""
    chosen = []
    for position in range(number * PROMPTS_PER_STEP, (number + 1) * PROMPTS_PER_STEP):
        epoch, index = divmod(position, len(prompts))
        order = list(range(len(prompts)))
        random.Random(f"{SEED}|{epoch}").shuffle(order)
        key, ids = prompts[order[index]]
        copies = sum(other == ids for _, other in chosen)  # a second copy must not bring the same responses again
        chosen.append((f"{key}+{copies}" if copies else key, ids))
    return chosen


def main(
    student_folder: str, teacher_folder: str, prompts_file: str, output: str = "", steps: int = STEPS
) -> list[float]:
    tokenizer = AutoTokenizer.from_pretrained(student_folder)
    student = AutoModelForCausalLM.from_pretrained(student_folder, dtype=torch.float32).eval()  # no dropout, ever
    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder, dtype=torch.float32).eval().requires_grad_(False)
    prompts = read_prompts(prompts_file, tokenizer)
    vocab, end = len(tokenizer), tokenizer.eos_token_id  # a model may have more rows than the tokenizer has tokens
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for number in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - number / steps)
        rollouts = [
            (ids, write(student, ids, end, vocab, SEED * 1_000_003 + number, key, sample))
            for key, ids in pick(prompts, number)
            for sample in range(SAMPLES_PER_PROMPT)
        ]
        losses.append(step(student, teacher, optimizer, rollouts, vocab))
        print(f"step {number + 1:3d}  reverse KL {losses[-1]:.4f} nats per token")
    if output:
        student.save_pretrained(output)
        tokenizer.save_pretrained(output)
    return losses


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    main(*sys.argv[1:])
