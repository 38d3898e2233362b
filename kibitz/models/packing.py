"""Packing: the sequences of a micro-batch are concatenated into one row without padding, and none attends to another.

transformers tells the sequences apart by positions that restart at 0: variable-length kernels (flash attention) never
look across, others get a block-diagonal mask. Recurrent layers may carry their state across, and a wrong result would
train silently, so a model packs only after a numerical check.
"""

import warnings
from collections.abc import Sequence
from typing import Literal

import torch

from kibitz.models.language_model import LanguageModel


def pack_rows(models: Sequence[LanguageModel], wish: bool | Literal["auto"]) -> None:
    """Let all models pack, or none: two equal models that read a micro-batch in the same layout agree to the bit. "auto"
    packs only with variable-length kernels, since a block-diagonal mask costs the square of the micro-batch."""
    if wish is False or (wish == "auto" and not all(_has_kernel(model) for model in models)):
        return
    problems = [
        f"the {model.name} ({type(model.model).__name__}) {said}" for model in models if (said := packing_error(model))
    ]
    if problems and wish is True:
        raise ValueError(f"optim.packing: {'; '.join(problems)}: write optim.packing=false")
    if problems:
        warnings.warn(f"rows are padded, not packed: {'; '.join(problems)}", stacklevel=2)
    for model in models:
        model.pack_rows(not problems)


def _has_kernel(model: LanguageModel) -> bool:
    kernel = model.model.config._attn_implementation or ""
    return "flash" in kernel or "flex" in kernel


@torch.no_grad()
def packing_error(model: LanguageModel) -> str | None:
    """A sentence if packing changes this model's hidden states, else None. The sequence before another must not change a
    bit of it, and alone it must give the same states up to rounding. The check exceeds a sliding window of up to 64
    tokens; a longer one is trusted."""
    window = getattr(model.model.config.get_text_config(), "sliding_window", None) or 0
    length = min(2 * window + 8 if window <= 64 else 12, model.max_positions or 12)
    ids_3L = torch.randint(model.vocab_size, (3, length), generator=torch.Generator().manual_seed(0)).to(model.device)
    position_L = torch.arange(length, device=model.device)
    first = slice(0, length - 3)  # rows of unequal length
    position_1N = torch.cat([position_L[first], position_L])[None]
    try:
        rows = [torch.cat([ids_3L[row, first], ids_3L[2]])[None] for row in (0, 1)]
        seen = [model.within(lambda ids_1N=ids_1N: model.hidden(ids_1N, position_1N))[0] for ids_1N in rows]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - a model may refuse positions in any way; the caller reports it
        return f"takes no positions: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    after = [hidden_ND[-length:] for hidden_ND in seen]
    if not torch.equal(after[0], after[1]):
        return "lets a sequence see the one before it"
    alone = model.within(lambda: model.hidden(ids_3L[2:]))[0]
    error = ((after[0] - alone).float().square().mean() / alone.float().square().mean()).sqrt().item()
    if not error < (1e-4 if alone.dtype == torch.float32 else 5e-2):
        return f"gives other hidden states packed than alone (off by {error:.1e})"
    return None
