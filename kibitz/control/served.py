"""A teacher behind HTTP, as a large model that acts (vision-language-action) would be: batched, rate-limited, checked.

POST url  {"observations": [[...], ...]}  ->  {"actions": [...]}, with "std" or "logp" where it knows them
"""

import time
from typing import Any

import httpx
import numpy as np

from kibitz.control.environments import Shape
from kibitz.control.recipe import PolicyTeacherConfig
from kibitz.control.teachers import Answer, TeacherError, checked

FIRST_PAUSE = 0.25  # seconds before a request is tried again, doubled each time


class ServedTeacher:
    flops = 0.0

    def __init__(self, config: PolicyTeacherConfig, shape: Shape):
        self.config, self.shape = config, shape
        self.name = f"the teacher at {config.url}"
        self.client = httpx.Client(timeout=config.timeout)
        self.next_at = 0.0

    def answer(self, observed_BO: np.ndarray) -> Answer:
        size = self.config.batch
        parts = [self._ask(observed_BO[start : start + size]) for start in range(0, len(observed_BO), size)]
        return Answer(*(_joined([getattr(part, name) for part in parts]) for name in ("action", "std_BA", "logp_BK")))

    def _ask(self, observed_BO: np.ndarray) -> Answer:
        body = {"observations": observed_BO.tolist()}
        for attempt in range(self.config.retries + 1):
            self._wait()
            try:
                reply = self.client.post(str(self.config.url), json=body)
                return self._read(reply, len(observed_BO))
            except httpx.TimeoutException:
                raise TeacherError(
                    f"{self.name} gave no answer within {self.config.timeout:g} s: raise teacher.timeout, or lower teacher.batch"
                ) from None
            except httpx.HTTPError as error:
                if attempt == self.config.retries:
                    raise TeacherError(f"{self.name} cannot be reached: {error}") from None
                time.sleep(FIRST_PAUSE * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

    def _wait(self) -> None:
        """Not more often than the recipe allows."""
        now = time.monotonic()
        time.sleep(max(0.0, self.next_at - now))
        self.next_at = max(now, self.next_at) + (1.0 / self.config.per_second if self.config.per_second else 0.0)

    def _read(self, reply: httpx.Response, size: int) -> Answer:
        if reply.status_code != 200:
            raise TeacherError(f"{self.name} answered {reply.status_code}: {reply.text[:80]!r}")
        try:
            tree: Any = reply.json()
            actions = np.asarray(tree["actions"], dtype=np.float64)
            std, logp = (None if tree.get(key) is None else np.asarray(tree[key], float) for key in ("std", "logp"))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise TeacherError(f'{self.name} did not answer with {{"actions": [...]}}: {reply.text[:80]!r}') from None
        found = checked(self.name, Answer(actions), size, self.shape)
        for name, rows in (("std", std), ("logp", logp)):
            if rows is not None and (rows.shape != (size, self.shape.num_outputs) or not np.isfinite(rows).all()):
                raise TeacherError(f"{self.name} answered with {name} of shape {rows.shape}, or not finite")
        if std is not None and (std <= 0).any():
            raise TeacherError(f"{self.name} answered with a std that is not above 0")
        return Answer(found.action, None if self.shape.discrete else std, logp if self.shape.discrete else None)


def _joined(parts: list[np.ndarray | None]) -> Any:
    return None if any(part is None for part in parts) else np.concatenate([part for part in parts if part is not None])
