"""The shapes of Qwen3, as folders with a config.json and nothing else."""

from pathlib import Path

from transformers import Qwen3Config

SIZES = {  # hidden, inner, layers, heads, keys and values, tied
    "0.6B": (1024, 3072, 28, 16, 8, True),
    "1.7B": (2048, 6144, 28, 16, 8, True),
    "4B": (2560, 9728, 36, 32, 8, True),
    "8B": (4096, 12288, 36, 32, 8, False),
    "14B": (5120, 17408, 40, 40, 8, False),
    "32B": (5120, 25600, 64, 64, 8, False),
}


def qwen3(home: Path, name: str) -> Path:
    """The folder of a size, such as 8B; of a hub's name or a checkpoint of the 8B runs, that of its size."""
    size = next((size for size in SIZES if f"-{size}" in f"-{name}"), "8B")
    folder = home / size
    hidden, inner, layers, heads, kv, tied = SIZES[size]
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "head_dim": 128}
    heads_of = {"num_attention_heads": heads, "num_key_value_heads": kv}
    config = Qwen3Config(
        **sizes, **heads_of, vocab_size=151_936, tie_word_embeddings=tied, max_position_embeddings=40_960
    )
    config.save_pretrained(folder)
    return folder
