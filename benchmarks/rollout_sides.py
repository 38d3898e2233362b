"""One side's sampling, for `benchmarks.rollout`: the embedded engine, `model.generate`, `generate_batch`, or vLLM.

All load the same folder in float32 and write for the same prompts at temperature 1, untruncated.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.worker import timed

Written = list[list[int]]
"""The response ids of each prompt."""
Writes = Callable[[list[list[int]], dict[str, Any]], Written]
"""(prompt ids, a load) -> responses, of at most `rows` side by side and `tokens` each."""
CHECKED = 4
"""Rollouts whose log-probabilities are compared with a plain forward pass."""


@dataclass
class Bare:
    """A model as the engine wants it."""

    model: Any
    vocab_size: int
    device: Any


def work(side: str, model: str, loads: list[dict[str, Any]], end: int, threads: int) -> dict[str, Any]:
    """Seconds and tokens of each load, after a short one that nobody counts; how far log-probabilities are from those of a
    plain pass, where the side tells them."""
    import torch

    torch.set_num_threads(threads)
    write, logp = SIDES[side](model, end)
    found = []
    for load in loads:
        ids = prompt_ids(model, load["number"], load["prompt"])
        write(ids[:2], {**load, "tokens": 4})
        said: Written = []
        spent = timed(lambda ids=ids, load=load, said=said: said.extend(write(ids, load)))
        found.append({"load": load["name"], "tokens": sum(map(len, said)), **spent})
    error = None if logp is None else logp(prompt_ids(model, CHECKED, 20))
    return {"loads": found, "logp_error": error}


def prompt_ids(model: str, number: int, length: int) -> list[list[int]]:
    import torch
    from transformers import AutoConfig

    vocab = min(AutoConfig.from_pretrained(model).vocab_size, 30_000)
    return torch.randint(2, vocab, (number, length), generator=torch.Generator().manual_seed(1)).tolist()


def loaded(model: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def brute_force(model: Any, ids: list[int], response: list[int]) -> Any:
    """log p of each response token by one forward pass over the whole text."""
    import torch

    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*ids, *response]])).logits[0, len(ids) - 1 : -1]
    return logits.double().log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]


# ------------------------------------------------------------------ sides


def with_kibitz(folder: str, end: int) -> tuple[Writes, Any]:
    from kibitz.engines.torch import TorchEngine
    from kibitz.types import Prompt, Sampling

    model = loaded(folder)
    student, engines = Bare(model, model.config.vocab_size, model.device), {}

    def rollouts(ids: list[list[int]], load: dict[str, Any]) -> Any:
        engine = engines.setdefault(load["rows"], TorchEngine(student, load["rows"]))
        prompts = [Prompt(tuple(one), "", str(key)) for key, one in enumerate(ids)]
        return engine.generate(prompts, Sampling(max_tokens=load["tokens"], stop_ids=(end,)))

    def error(ids: list[list[int]]) -> float:
        found = rollouts(ids, {"rows": CHECKED, "tokens": 32})
        return max(
            float((brute_force(model, list(r.prompt.ids), r.response_ids) - r.logp_T).abs().max()) for r in found
        )

    return lambda ids, load: [list(r.response_ids) for r in rollouts(ids, load)], error


def with_generate(folder: str, end: int) -> tuple[Writes, Any]:
    """Batches of as many rows as the engine has, each until its last row has ended: that is what `generate` does."""
    import torch

    model = loaded(folder)

    def write(ids: list[list[int]], load: dict[str, Any]) -> Written:
        said: Written = []
        for start in range(0, len(ids), load["rows"]):
            batch = torch.tensor(ids[start : start + load["rows"]])
            out = model.generate(
                batch, attention_mask=torch.ones_like(batch), do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
                max_new_tokens=load["tokens"], eos_token_id=end, pad_token_id=end,
            )  # fmt: skip
            said += [_until(row, end) for row in out[:, batch.shape[1] :].tolist()]
        return said

    return write, None


def with_generate_batch(folder: str, end: int) -> tuple[Writes, Any]:
    """transformers' continuous batching, as it comes."""
    from transformers import GenerationConfig

    model = loaded(folder)

    def write(ids: list[list[int]], load: dict[str, Any]) -> Written:
        settings = GenerationConfig(
            do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=load["tokens"],
            eos_token_id=end, pad_token_id=end,
        )  # fmt: skip
        answers = model.generate_batch(inputs=ids, generation_config=settings)
        said = [list(answer.generated_tokens) for answer in answers.values()]
        if len(said) < len(ids) or not all(said):
            raise RuntimeError(f"generate_batch answered {sum(map(bool, said))} of {len(ids)} prompts")
        return said

    return write, None


def with_vllm(folder: str, end: int) -> tuple[Writes, Any]:
    """vLLM in this process, so that its processor seconds are known; token ids in and out, and no more responses at once than the
    load has rows."""
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    room = {"max_model_len": 1024, "max_num_seqs": 256, "enforce_eager": True, "enable_prefix_caching": False}
    model = LLM(folder, dtype="float32", skip_tokenizer_init=True, disable_log_stats=True, **room)
    scheduler = model.llm_engine.engine_core.engine_core.scheduler
    if not hasattr(scheduler, "max_num_active_reqs"):
        raise RuntimeError("this vLLM has another scheduler, and nothing would hold it to a number of rows")

    def ask(ids: list[list[int]], tokens: int, **more: Any) -> Any:
        params = SamplingParams(temperature=1.0, max_tokens=tokens, stop_token_ids=[end], detokenize=False, **more)
        return model.generate([{"prompt_token_ids": one} for one in ids], params, use_tqdm=False)

    def error(ids: list[list[int]]) -> float:
        plain, worst = loaded(folder), 0.0
        for one, answer in zip(ids, ask(ids, 32, logprobs=0), strict=True):
            said = list(answer.outputs[0].token_ids)
            logp = [places[token].logprob for places, token in zip(answer.outputs[0].logprobs, said, strict=True)]
            gaps = [abs(float(a) - b) for a, b in zip(brute_force(plain, one, said), logp, strict=True)]
            worst = max(worst, *gaps)
        return worst

    def write(ids: list[list[int]], load: dict[str, Any]) -> Written:
        scheduler.max_num_active_reqs = load["rows"]
        return [list(answer.outputs[0].token_ids) for answer in ask(ids, load["tokens"])]

    return write, error


def _until(row: list[int], end: int) -> list[int]:
    return row[: row.index(end) + 1] if end in row else row


SIDES = {"kibitz": with_kibitz, "generate": with_generate, "generate_batch": with_generate_batch, "vllm": with_vllm}
