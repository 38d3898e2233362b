"""The overlap of the student's and the teacher's K likeliest tokens.

A run that works shows it growing: 72% to 91% of the top 16 in the source, while the shared tokens hold 97-99% of the
probability; a run that fails shows it standing still, one that collapses late shows it falling (Rethinking OPD,
2604.13016, eq. 6 and appendix B.1).
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Overlap(NamedTuple):
    """`share_C` of the K tokens is shared; `student_mass_C` and `teacher_mass_C` are the probability of those tokens."""

    share_C: Tensor
    student_mass_C: Tensor
    teacher_mass_C: Tensor


@torch.no_grad()
def top_k_overlap(student_CV: Tensor, teacher_CV: Tensor, k: int = 16) -> Overlap:
    """|topK(S) & topK(T)| / K at each position, from log-probabilities over the whole vocabulary.

    A token of the student's that ties with the teacher's K-th counts as shared, so equal models give 1. A share is not
    a mass: with a small vocabulary or a sharp teacher most of the K tokens have no probability, and the masses say
    more. K=16 is the source's; it is cut to the vocabulary."""
    k = min(k, student_CV.shape[-1])
    student_CK, ids_CK = student_CV.topk(k, dim=-1)
    teacher_CK = teacher_CV.gather(-1, ids_CK)
    shared_CK = teacher_CK >= teacher_CV.topk(k, dim=-1).values[..., -1:]
    masses = [torch.where(shared_CK, logp_CK.exp(), 0.0).sum(-1) for logp_CK in (student_CK, teacher_CK)]
    return Overlap(shared_CK.to(student_CV.dtype).mean(-1), *masses)
