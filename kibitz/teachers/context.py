"""Privileged context: a teacher whose prompt holds more than the student's (a solution, feedback, a system prompt).

OPSD (2601.18734), SDFT (2601.19897), SDPO (2601.20802) and context distillation (2602.12275) are this, around a teacher made
of the student. The rollout is scored after the teacher's own prompt, rendered by the teacher's own chat template; the
response's tokens are the same, so only positions move.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import StrictUndefined, TemplateError, TemplateRuntimeError, UndefinedError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kibitz.config import ContextConfig
from kibitz.data import encode_prompt
from kibitz.engines import Engine, OnReady, nobody_waits
from kibitz.ledger import Count, uncounted
from kibitz.models import LanguageModel
from kibitz.signals import Signal
from kibitz.teachers import Scorer, ScoreRequest, Teacher
from kibitz.types import Prompt, Rollout, Sampling

NOTHING_YET: dict[str, Any] = {"attempt": None, "reward": None, "success": None}


def _text(value: Any) -> Any:
    """What a template may write of a row: text and numbers; nothing where there is nothing."""
    if isinstance(value, Mapping | Sequence | set) and not isinstance(value, str):
        kind = "an object" if isinstance(value, Mapping) else "a list"
        raise TemplateRuntimeError(
            f"it writes {kind}, which is no text: name a part of it, write {{{{ prompt }}}} for the text of the last message, "
            "or {{ NAME | tojson }} for all of it"
        )
    return "" if value is None else value


class Rendering:
    """Turns the student's prompt into the teacher's."""

    def __init__(self, config: ContextConfig, tokenizer: Any):
        self.config, self.tokenizer = config, tokenizer
        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, finalize=_text)
        self.prompt = environment.from_string(config.prompt)
        self.system = None if config.system is None else environment.from_string(config.system)

    def messages(self, prompt: Prompt, seen: dict[str, Any] = NOTHING_YET) -> list[dict[str, str]]:
        """The teacher's conversation; `seen` is what is known of a rollout."""
        known = {"answer": prompt.answer, "response": prompt.response, "task": prompt.task}
        known = {name: value for name, value in known.items() if value is not None}
        columns = {**prompt.columns, **known, "prompt": prompt.text, **seen}
        try:
            text = self.prompt.render(columns)
            system = None if self.system is None else self.system.render(columns)
        except UndefinedError as error:
            raise ValueError(
                f"teacher.context: {error} in the row of the prompt {prompt.text[:80]!r}, which has "
                f"{', '.join(map(repr, sorted(columns)))}: bring that column, or write {{% if NAME is defined %}} around it"
            ) from None
        except (TemplateError, TypeError) as error:
            raise ValueError(
                f"teacher.context cannot be rendered for the row of the prompt {prompt.text[:80]!r}: {error}"
            ) from None
        before = [dict(message) for message in prompt.messages[:-1]]
        if system is not None:
            before = [{"role": "system", "content": system}, *(m for m in before if m["role"] != "system")]
        return [*before, {"role": "user", "content": text}]

    def __call__(self, prompt: Prompt, seen: dict[str, Any] = NOTHING_YET) -> Prompt:
        messages = self.messages(prompt, seen)
        ids = encode_prompt(self.tokenizer, messages, self.config.template, prompt.tools)
        return replace(prompt, ids=tuple(ids), messages=tuple(messages))


def check_context(config: ContextConfig, prompts: Sequence[Prompt]) -> None:
    """Raise ValueError for a row that lacks a column that the templates use."""
    rendering = Rendering(config, None)
    for prompt in prompts:
        rendering.messages(prompt)


def in_context(teacher: Teacher, config: ContextConfig, tokenizer: Any) -> Teacher:
    """`teacher`, with prompts of its own. `tokenizer` is the teacher's."""
    rendering = Rendering(config, tokenizer)

    def read(rollouts: Sequence[Rollout]) -> list[Rollout]:
        prompts = [rendering(r.prompt, seen) for r, seen in zip(rollouts, seen_of(rollouts), strict=True)]
        return [replace(r, prompt=prompt) for r, prompt in zip(rollouts, prompts, strict=True)]

    examiner = teacher.examiner
    return replace(
        teacher,
        scorer=lambda request: InContext(teacher, teacher.scorer, request, read),
        examiner=None if examiner is None else lambda request: InContext(teacher, examiner, request, read),
        writer=lambda make: ContextEngine(teacher.writer(make), rendering),
        check=lambda prompts, max_tokens: teacher.check([rendering(prompt) for prompt in prompts], max_tokens),
    )


def seen_of(rollouts: Sequence[Rollout]) -> list[dict[str, Any]]:
    """Return the context of each rollout: its text and reward, and another one of the same prompt with full reward, if any."""
    right: dict[str, list[Rollout]] = {}
    for rollout in rollouts:
        if rollout.reward is not None and rollout.reward >= 1.0:
            right.setdefault(rollout.prompt.key, []).append(rollout)
    seen = []
    for rollout in rollouts:
        others = (other.text for other in right.get(rollout.prompt.key, []) if other is not rollout)
        seen.append({"attempt": rollout.text, "reward": rollout.reward, "success": next(others, None)})
    return seen


@dataclass(frozen=True)
class InContext:
    teacher: Teacher
    scorer: Callable[[ScoreRequest], Scorer]
    request: ScoreRequest
    read: Callable[[Sequence[Rollout]], list[Rollout]]

    def score(self, rollouts: Sequence[Rollout]) -> list[Signal]:
        theirs = self.read(rollouts)
        self.teacher.check([r.prompt for r in theirs], max(r.num_tokens for r in theirs))
        return self.scorer(self._asked(rollouts, theirs)).score(theirs)

    def _asked(self, rollouts: Sequence[Rollout], theirs: Sequence[Rollout]) -> ScoreRequest:
        """Tokens that the asker names, it names by the student's rollouts."""
        name = self.request.candidates
        if name is None:
            return self.request
        own = {id(their): rollout for their, rollout in zip(theirs, rollouts, strict=True)}
        return replace(self.request, candidates=lambda some: name([own[id(r)] for r in some]))


class ContextEngine:
    """Writes after the teacher's prompt; the rollouts keep the student's."""

    def __init__(self, engine: Engine, rendering: Rendering):
        self.engine, self.rendering = engine, rendering

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, on_ready: OnReady = nobody_waits, count: Count = uncounted
    ) -> list[Rollout]:
        """The rollouts are ready when all are."""
        written = self.engine.generate([self.rendering(prompt) for prompt in prompts], sampling, count=count)
        asked = (prompt for prompt in prompts for _ in range(sampling.num_samples))
        rollouts = [replace(rollout, prompt=prompt) for rollout, prompt in zip(written, asked, strict=True)]
        on_ready(rollouts)
        return rollouts

    def sync(self, student: LanguageModel) -> None:
        self.engine.sync(student)

    def metrics(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        self.engine.close()
