"""A conversation with a model: its chat template, its tokens, the embedded engine."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from kibitz.config import ModelConfig
from kibitz.data import encode_prompt
from kibitz.engines import Engine
from kibitz.engines.torch import TorchEngine
from kibitz.models import LanguageModel
from kibitz.models.load import load_model, pick_device, stop_ids
from kibitz.types import Prompt, Sampling

MOST_AT_ONCE = 16
"""Tokens of a piece of a stream: what was written before is read again for each."""


@dataclass
class Conversation:
    """Remembers what was said. The seed, the conversation so far and nothing else decide what the model answers."""

    model: LanguageModel
    engine: Engine
    sampling: Sampling
    system: str | None = None
    template: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, str]] = field(default_factory=list)

    @staticmethod
    def with_model(name: str, sampling: Sampling, system: str | None = None, **template: Any) -> "Conversation":
        """`name` is a folder or a hub name; `template` are arguments of its chat template."""
        model = load_model(ModelConfig(model=name), "model", pick_device())
        return Conversation(
            model, TorchEngine(model), replace(sampling, stop_ids=stop_ids(model, [])), system, template
        )

    def ask(self, text: str) -> str:
        """The model's answer, cut off where its room ends. Raises ValueError where there is no room for any."""
        ids, asked, sampling = self._asked(text)
        prompt = Prompt(ids=ids, text=text, key=str(len(asked)))
        (rollout,) = self.engine.generate([prompt], sampling)
        answer = self._decoded(rollout.response_ids)
        self.messages = [*asked, {"role": "assistant", "content": answer}]
        return answer

    def stream(self, text: str) -> Iterator[str]:
        """The same in pieces, as they are written: greedily the same text, else another sample. Whoever stops listening, by
        Ctrl-C or `close`, leaves what was said so far as the answer."""
        ids, asked, sampling = self._asked(text)
        written: list[int] = []
        shown = ""
        try:
            while len(written) < sampling.max_tokens:
                piece = min(MOST_AT_ONCE, 1 + len(written) // 4, sampling.max_tokens - len(written))
                prompt = Prompt(ids=(*ids, *written), text=text, key=f"{len(asked)}|{len(written)}")
                (rollout,) = self.engine.generate([prompt], replace(sampling, max_tokens=piece))
                written += rollout.response_ids
                said = self._decoded(written)
                last = rollout.finished or len(written) == sampling.max_tokens
                if last or not said.endswith("\ufffd"):  # a sign of which some bytes are still to come
                    shown, new = said, said[len(shown) :]
                    yield new
                if rollout.finished:
                    return
        finally:
            self.messages = [*asked, {"role": "assistant", "content": shown}]

    def _asked(self, text: str) -> tuple[tuple[int, ...], list[dict[str, str]], Sampling]:
        """What the model reads, as ids and as messages, and how much it may write."""
        if not text.strip():
            raise ValueError("there is nothing to answer: write a text")
        asked = [*self.messages, {"role": "user", "content": text}]
        opening = [] if self.system is None else [{"role": "system", "content": self.system}]
        ids = encode_prompt(self.model.tokenizer, [*opening, *asked], self.template)
        room = (self.model.max_positions or len(ids) + self.sampling.max_tokens) - len(ids)
        if room < 1:
            raise ValueError(f"the conversation has {len(ids)} tokens, and the model room for no more: begin a new one")
        return tuple(ids), asked, replace(self.sampling, max_tokens=min(room, self.sampling.max_tokens))

    def _decoded(self, ids: list[int]) -> str:
        return self.model.tokenizer.decode(ids, skip_special_tokens=True)

    def forget(self) -> None:
        """Begin a new conversation."""
        self.messages = []
