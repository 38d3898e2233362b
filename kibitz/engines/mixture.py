"""Text that student and teacher write together, each token drawn from (1 - a) S + a T (MiniLLM, 2306.08543).

A mixture of the distributions, token by token, and not of responses: a token of the teacher's may follow one of the
student's, so that the text stays near the student's while the teacher keeps it from going astray. Both models read every
token and keep their own KV caches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kibitz.engines import OnReady, nobody_waits
from kibitz.engines.asked import Student, longest_text
from kibitz.engines.cache import Decoder
from kibitz.engines.torch import TorchEngine, evaluating
from kibitz.ledger import Count, uncounted
from kibitz.logprobs import log_probs, mixture
from kibitz.types import Prompt, Rollout, Sampling


@dataclass(frozen=True)
class MixtureDecoder:
    """Two decoders with the same rows as one. Its logits are the log-probabilities of the mixture, on the student's device."""

    student: Decoder
    teacher: Decoder
    share: float
    vocab_size: int
    teacher_device: torch.device

    def start(self, num_rows: int, num_slots: int) -> None:
        self.student.start(num_rows, num_slots)
        self.teacher.start(num_rows, num_slots)

    def prefill(self, ids_GP: Tensor, prompt_R: Tensor, row_R: Tensor) -> None:
        self.student.prefill(ids_GP, prompt_R, row_R)
        self.teacher.prefill(self._over(ids_GP), self._over(prompt_R), self._over(row_R))

    def step(self, token_N: Tensor, position_N: Tensor, num_slots: int) -> Tensor:
        student_NV = self.student.step(token_N, position_N, num_slots)
        teacher_NV = self.teacher.step(self._over(token_N), self._over(position_N), num_slots)
        student_NV, teacher_NV = (
            log_probs(logits_NV[:, : self.vocab_size].float()) for logits_NV in (student_NV, teacher_NV)
        )
        return mixture(teacher_NV.to(student_NV.device), student_NV, self.share)

    def move(self, source_M: Tensor, target_M: Tensor) -> None:
        self.student.move(source_M, target_M)
        self.teacher.move(self._over(source_M), self._over(target_M))

    def stop(self) -> None:
        self.student.stop()
        self.teacher.stop()

    def _over(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.teacher_device)


class MixtureEngine:
    """Rollouts from (1 - share) S + share T. `logp_T` is under that mixture. With a share of 0 they are the student's own."""

    def __init__(self, student: Student, teacher: Student, share: float, max_rows: int = 256):
        if student.vocab_size != teacher.vocab_size:
            raise ValueError(
                f"student and teacher write one text, and their vocabularies have {student.vocab_size} and "
                f"{teacher.vocab_size} tokens: choose a teacher of the student's family"
            )
        self.share = share
        self._student, self._teacher = TorchEngine(student, max_rows), TorchEngine(teacher, max_rows)
        self._writer = TorchEngine(student, max_rows)

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, on_ready: OnReady = nobody_waits, count: Count = uncounted
    ) -> list[Rollout]:
        if not prompts:
            return []
        teacher, longest = self._teacher.student, longest_text(prompts, sampling)
        decoders = self._student.decoder(longest), self._teacher.decoder(longest)
        self._writer.use(MixtureDecoder(*decoders, self.share, teacher.vocab_size, teacher.device))
        with evaluating(teacher.model):
            rollouts = self._writer.generate(prompts, sampling, on_ready, count)
        count(teacher, rollouts)
        return rollouts

    def sync(self, student: Student) -> None:
        self._student.sync(student)
        self._writer.sync(student)

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None: ...
