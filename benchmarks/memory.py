"""What a teacher costs in memory beside a student that learns by LoRA, phase by phase: a second copy, in float32, bfloat16 or
8 bits, against the student's own base with the adapter switched off; and the same for a reference.

    python benchmarks/memory.py [out.json]
    python benchmarks/memory.py --precision [out.json]

The second says what bfloat16 and 8 bits do to a trained teacher's log-probabilities: that of the toy world, on its own text.

A random Qwen3 of 110 million parameters with a vocabulary of 32,768, two steps, each arm in a process of its own. Numbers are
those of run.json: the largest resident set of the process on a CPU, what the allocator handed out on a GPU (--device cuda).
Arms that stand in out.json already are not run again.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MODELS = ("student", "teacher")
VOCAB, WORDS = 32_768, 6
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 768,
    "intermediate_size": 2304,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def arms(folder: Path) -> dict[str, dict[str, Any]]:
    """By name: what differs in the recipe."""
    copy, base = {"model": str(folder / "teacher")}, {"student": "base"}
    held = {"type": "opd", "reference_kl": 0.1}
    return {
        "none (grpo)": {"method": {"type": "grpo"}},
        "copy": {"teacher": copy},
        "copy, bfloat16": {"teacher": {**copy, "dtype": "bfloat16"}},
        "copy, int8": {"teacher": {**copy, "quantize": "int8"}},
        "copy, offload body": {"teacher": {**copy, "offload": "body"}},
        "copy, offload layers": {"teacher": {**copy, "offload": "layers"}},
        "base": {"teacher": base},
        "base, held to a copy": {"teacher": base, "method": {**held, "reference": {"model": str(folder / "student")}}},
        "base, held to the base": {"teacher": base, "method": held},
    }


def prepare(folder: Path, name: str) -> None:
    """A random model with a tokenizer of made-up words, and prompts in them."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

    words = ["<end>", "<pad>", *(f"w{i}" for i in range(VOCAB - 2))]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(MODELS.index(name))
    AutoModelForCausalLM.from_config(Qwen3Config(**SHAPE)).save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    draw = random.Random(0)
    rows = [{"prompt": " ".join(draw.choices(words[2:], k=WORDS)), "answer": "1"} for _ in range(16)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(folder: Path, arm: str, device: str) -> None:
    import kibitz

    tree = {
        "student": {"model": str(folder / "student"), "lora": {"rank": 16}},
        "data": {"prompts": str(folder / "prompts.jsonl"), "grader": "exact"},
        "method": {"type": "opd"},
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 2, "max_tokens": 8},
        "optim": {"lr": 1e-4, "tokens_per_micro_batch": 160, "chunk_tokens": 64},
        "steps": 2,
        "device": device,
        "threads": 1,
        "output": str(folder / "run"),
        **arms(folder)[arm],
    }
    kibitz.train(tree, overwrite=True)


def measure(folder: Path, device: str, out: Path | None) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(out.read_text()) if out is not None and out.exists() else {}
    for arm in [name for name in (*MODELS, *arms(folder)) if name not in found]:
        subprocess.run([sys.executable, __file__, "--folder", folder, "--arm", arm, "--device", device], check=True)
        if arm in MODELS:
            continue
        info = json.loads((folder / "run" / "run.json").read_text())
        rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        kept = ("peak_bytes", "host_peak_bytes", "student_params", "commit", "torch")
        found[arm] = {key: info[key] for key in kept if key in info} | {"signal_bytes": rows[0]["signal_bytes"]}
        phases = ", ".join(f"{phase} {size / 2**20:,.0f}" for phase, size in found[arm].get("peak_bytes", {}).items())
        print(f"{arm:<24} MiB: {phases}", file=sys.stderr)
        if out is not None:
            out.write_text(json.dumps(found, indent=1) + "\n")
    return found


def precision(device: str) -> dict[str, Any]:
    """Bytes of the weights; on 256 responses that the teacher wrote at T=1, against its float32 numbers: mean |log p' - log p|
    of the written tokens and its largest, KL(float32 || small) in nats a token, and how often both would say the same."""
    import torch

    from kibitz import worlds
    from kibitz.config import DataConfig, FrozenConfig
    from kibitz.data import load_prompts
    from kibitz.engines.torch import TorchEngine
    from kibitz.models.offload import load_frozen
    from kibitz.teachers import ScoreRequest
    from kibitz.teachers.local import LocalScorer
    from kibitz.types import Sampling

    torch.set_num_threads(1)
    where, folder = torch.device(device), str(worlds.get("arithmetic").checkpoint("teacher"))
    settings = {"float32": {"dtype": "float32"}, "bfloat16": {"dtype": "bfloat16"}}
    settings |= {
        "int8": {"dtype": "float32", "quantize": "int8"},
        "int8 of bfloat16": {"dtype": "bfloat16", "quantize": "int8"},
        "nf4": {"dtype": "float32", "quantize": "nf4"},
        "nf4 of bfloat16": {"dtype": "bfloat16", "quantize": "nf4"},
    }
    found: dict[str, Any] = {}
    for name, options in settings.items():
        model = load_frozen(FrozenConfig(model=folder, **options), "teacher", where)
        if name == "float32":
            prompts = load_prompts(DataConfig(world="arithmetic", split="test", limit=256), model.tokenizer, 0, False)
            stop = (model.tokenizer.eos_token_id,)
            text = TorchEngine(model).generate(prompts, Sampling(max_tokens=32, stop_ids=stop))
            token_T = torch.tensor([token for r in text for token in r.response_ids])
        with torch.no_grad():
            signals = LocalScorer(model, ScoreRequest()).score(text)
            logp_TV = torch.cat([torch.log_softmax(s.head(s.hidden_TD).double().cpu(), -1) for s in signals])
        if name == "float32":
            plain_TV = logp_TV
        gap_T = (logp_TV - plain_TV).gather(-1, token_T[:, None]).abs()
        kl_T = (plain_TV.exp() * (plain_TV - logp_TV)).sum(-1)
        found[name] = {
            "bytes": sum(p.nbytes for p in model.model.parameters()),  # of nf4 without the scales
            "mean_gap": gap_T.mean().item(),
            "largest_gap": gap_T.max().item(),
            "kl": kl_T.mean().item(),
            "same_best": (logp_TV.argmax(-1) == plain_TV.argmax(-1)).double().mean().item(),
            "num_tokens": len(token_T),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", action="store_true")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.arm is not None:
        if given.arm in MODELS:
            prepare(given.folder, given.arm)
        else:
            run(given.folder, given.arm, given.device)
        return
    if given.precision:
        found = precision(given.device)
    else:
        with tempfile.TemporaryDirectory() as name:
            found = measure(Path(name), given.device, given.out)
    text = json.dumps(found, indent=1)
    if given.out is None:
        print(text)
    else:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
