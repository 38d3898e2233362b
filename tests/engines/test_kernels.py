"""What the engine asks of a GPU: kernels that take its masks, and no sort of the vocabulary."""

import warnings

import pytest
import torch
from support.models import language_model, make_model
from transformers import AttentionInterface

from kibitz.engines import sampling
from kibitz.engines.cache import CachedDecoder
from kibitz.engines.sampling import draw, log_distribution, truncate, uniforms
from kibitz.engines.torch import TorchEngine
from kibitz.types import Prompt, Sampling

PROMPTS = [Prompt((1, 5, 6), "", "a"), Prompt((1, 7), "", "b")]


def only_plain_masks(module, query, key, value, attention_mask, **options):
    """As flash attention does: a mask of two dimensions, or none."""
    raise AssertionError("a kernel that takes no mask of four dimensions was given one")


AttentionInterface.register("only_plain_masks", only_plain_masks)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_attention_of_the_recipe_ends_in_the_decoder_that_recomputes_everything(tmp_path, dtype):
    """The engine writes by sdpa whatever the model trains with, and gives the kernel back."""
    student = language_model(make_model(tmp_path / "model", vocab_size=256), dtype=dtype)
    wanted = TorchEngine(student).generate(PROMPTS, Sampling(max_tokens=6))
    student.model.config._attn_implementation = "only_plain_masks"
    engine = TorchEngine(student)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rollouts = engine.generate(PROMPTS, Sampling(max_tokens=6))
    assert dtype == "float32" or isinstance(engine.decoder(), CachedDecoder)
    assert [r.response_ids for r in rollouts] == [r.response_ids for r in wanted]
    assert student.model.config._attn_implementation == "only_plain_masks"


def sorted_whole(logits_NV: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Each row by itself: from the likeliest on, the lower id first among equals."""
    cut_NV = torch.full_like(logits_NV, -torch.inf)
    for row, logits_V in enumerate(logits_NV):
        order = sorted(range(len(logits_V)), key=lambda i: (-logits_V[i].item(), i))[: top_k or None]
        p = logits_V[order].softmax(-1).double()
        kept = [i for i, before in zip(order, (p.cumsum(-1) - p).tolist(), strict=True) if before < top_p or top_p == 1]
        cut_NV[row, kept] = logits_V[kept]
    return cut_NV


@pytest.mark.parametrize(("top_k", "top_p"), [(7, 1.0), (40, 0.77), (0, 0.9), (0, 0.3), (0, 0.9999)])
def test_the_likeliest_tokens_are_found_without_sorting_the_vocabulary(monkeypatch, top_k, top_p):
    """Rounded logits have ties at the edge. Where 32 tokens do not reach the mass, as at 0.9999, all are sorted."""
    monkeypatch.setattr(sampling, "MANY", 32)
    logits_NV = (3 * torch.randn(5, 400, generator=torch.Generator().manual_seed(0))).round(decimals=1)
    logits_NV[3] = torch.arange(400) % 3  # 133 equals, whose shares reach none of the masses exactly
    logits_NV[4, 7] = 30.0
    found = truncate(logits_NV.clone(), top_k, top_p)
    assert torch.equal(found, sorted_whole(logits_NV, top_k, top_p))
    rows = [truncate(row[None].clone(), top_k, top_p) for row in logits_NV]
    assert torch.equal(found, torch.cat(rows))


def test_the_same_tokens_are_drawn_either_way(monkeypatch):
    """2,000 rows of a vocabulary of 5,000: the two ways of cutting differ in no sample."""
    logits_NV = 4 * torch.randn(2000, 5000, generator=torch.Generator().manual_seed(1))
    uniform_N = uniforms(torch.arange(2000), torch.zeros(2000, dtype=torch.long))
    drawn = []
    for many in (sampling.MANY, 5000):  # of 5,000, all are sorted
        monkeypatch.setattr(sampling, "MANY", many)
        drawn.append(draw(log_distribution(logits_NV, Sampling(top_p=0.9)), uniform_N))
    assert torch.equal(*drawn)
