"""Rollouts and what is known about them, as micro-batches of bounded size.

Rows of similar length go together, so little is padded. Student and teacher group the same rollouts in the same way:
their forward passes then have equal shapes, and a student that equals its teacher gets bit-equal log-probabilities.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kibitz.signals import Anchor, Batch, Deferred, Scored, Signal, Tokens, beside, cat_signals
from kibitz.types import Rollout

OVERHEAD = 512
"""Positions that could be computed in the time that a micro-batch takes beyond its own. On a CPU none of three models of 0.2 to
5 million parameters is more than a tenth faster with 128, 256 or 1,024; with 32, which leaves less than 5% of padding, the
smaller ones are slower by a quarter."""


def group(rollouts: Sequence[Rollout], max_tokens: int) -> list[list[int]]:
    """Indices of the rollouts in each micro-batch: longest first, at most `max_tokens` positions with the padding
    (a single longer rollout stands alone). Of all ways to cut that order it is the one with the fewest positions, where each
    micro-batch counts as `OVERHEAD` more. The rollouts of one micro-batch alone make one again."""
    lengths = [len(r.prompt.ids) + r.num_tokens for r in rollouts]
    order = sorted(range(len(rollouts)), key=lambda i: (-lengths[i], i))
    cost, start = [0], [0]  # of the first n rollouts, and where their last micro-batch begins
    for end in range(1, len(order) + 1):
        cost.append(cost[-1] + lengths[order[end - 1]] + OVERHEAD)
        start.append(end - 1)
        for begin in range(end - 2, -1, -1):
            positions = (end - begin) * lengths[order[begin]]
            if positions > max_tokens:
                break
            if cost[begin] + positions + OVERHEAD < cost[end]:
                cost[end], start[end] = cost[begin] + positions + OVERHEAD, begin
    groups, end = [], len(order)
    while end:
        groups.append(order[start[end] : end])
        end = start[end]
    return groups[::-1]


def micro_batches(scored: Sequence[Scored], max_tokens: int) -> list[list[int]]:
    """`group`, an objective at a time."""
    by_objective: dict[str, list[int]] = {}
    for index, one in enumerate(scored):
        by_objective.setdefault(one.objective, []).append(index)
    return [
        [members[place] for place in places]
        for members in by_objective.values()
        for places in group([scored[index].rollout for index in members], max_tokens)
    ]


def settled(scored: Sequence[Scored]) -> list[Scored]:
    """The rollouts of a micro-batch with the signals that were deferred until now."""
    rollouts, signals, anchors = [s.rollout for s in scored], *_signals(scored)
    if any(isinstance(signal, Deferred) for signal in signals):
        scored = [replace(s, signal=signal) for s, signal in zip(scored, _made(signals, rollouts), strict=True)]
    if any(isinstance(anchor.signal, Deferred) for anchor in anchors):
        made = _made([anchor.signal for anchor in anchors], rollouts)
        triples = zip(scored, anchors, made, strict=True)
        scored = [replace(s, anchor=replace(anchor, signal=signal)) for s, anchor, signal in triples]
    return list(scored)


def _made(signals: Sequence[Signal | Deferred], rollouts: Sequence[Rollout]) -> list[Signal]:
    """Signals of all rollouts together, which one scorer deferred."""
    first = signals[0]
    assert isinstance(first, Deferred), "a micro-batch mixes kinds"
    assert all(isinstance(s, Deferred) and s.score == first.score for s in signals), "a micro-batch mixes kinds"
    return first.score(rollouts)


def _signals(scored: Sequence[Scored]) -> tuple[list[Signal | Deferred], list[Anchor]]:
    return [s.signal for s in scored if s.signal is not None], [s.anchor for s in scored if s.anchor is not None]


def pack(scored: Sequence[Scored], device: torch.device | str = "cpu", sample: int | None = None) -> Batch:
    """One micro-batch of these rollouts, settled. About `sample` of its tokens, or all, are those of costly metrics: each n-th,
    from a place that the number of tokens decides."""
    scored = settled(scored)
    num_tokens = sum(s.rollout.num_tokens for s in scored)
    every = 1 if sample is None else max(1, -(-num_tokens // sample))
    rollouts = [s.rollout for s in scored]
    ids_BL, position_T = _rows(rollouts)
    signals = [s.signal for s in scored if s.signal is not None and not isinstance(s.signal, Deferred)]
    advantages = [s.advantage_T for s in scored if s.advantage_T is not None]
    anchors = [s.anchor for s in scored if s.anchor is not None]
    assert all(len(kind) in (0, len(scored)) for kind in (signals, advantages, anchors)), "a micro-batch mixes kinds"
    assert len({(s.objective, *s.numbers) for s in scored}) == 1, "a micro-batch mixes objectives"
    tokens = Tokens(
        token_T=torch.tensor([t for r in rollouts for t in r.response_ids], device=device),
        weight_T=torch.cat([s.weight_T for s in scored]).to(device),
        logp_T=torch.cat([r.logp_T for r in rollouts]).to(device),
        signal=beside(cat_signals(signals), device) if signals else None,
        advantage_T=torch.cat(advantages).to(device) if advantages else None,
        numbers={name: torch.cat([s.numbers[name] for s in scored]).to(device) for name in scored[0].numbers},
        anchor=beside(cat_signals(anchors), device) if anchors else None,
        every=every,
        first=num_tokens % every,
    )
    length_B = torch.tensor([len(r.prompt.ids) + r.num_tokens for r in rollouts], device=device)
    return Batch(ids_BL.to(device), length_B, position_T.to(device), tokens, scored[0].objective)


def _rows(rollouts: Sequence[Rollout]) -> tuple[Tensor, Tensor]:
    """Right-padded ids `[B, L]`, and where in `[B*L]` the logits of each response token stand: one to its left."""
    length = max(len(r.prompt.ids) + r.num_tokens for r in rollouts)
    ids_BL = torch.zeros(len(rollouts), length, dtype=torch.long)
    positions = []
    for row, rollout in enumerate(rollouts):
        num_prompt, num_tokens = len(rollout.prompt.ids), rollout.num_tokens
        ids_BL[row, : num_prompt + num_tokens] = torch.tensor([*rollout.prompt.ids, *rollout.response_ids])
        positions.append(torch.arange(num_prompt - 1, num_prompt + num_tokens - 1) + row * length)
    return ids_BL, torch.cat(positions)


def without_padding(ids_BL: Tensor, length_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same rows one behind the other: ids and positions `[1, N]`, each row counted from 0, and where in N each
    place of the flattened `[B*L]` now stands (of padding, somewhere)."""
    place_L = torch.arange(ids_BL.shape[1], device=ids_BL.device)
    real_BL = place_L < length_B[:, None]
    position_1N = place_L.expand_as(ids_BL)[real_BL][None]
    return ids_BL[real_BL][None], position_1N, real_BL.flatten().cumsum(0) - 1
