"""A conversation with a model: its chat template, its tokens, the embedded engine."""

from dataclasses import dataclass, field, replace
from typing import Any

from kibitz.config import ModelConfig
from kibitz.data import encode_prompt
from kibitz.engines import Engine
from kibitz.engines.torch import TorchEngine
from kibitz.models import LanguageModel
from kibitz.models.load import load_model, pick_device, stop_ids
from kibitz.types import Prompt, Sampling


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
        if not text.strip():
            raise ValueError("there is nothing to answer: write a text")
        asked = [*self.messages, {"role": "user", "content": text}]
        opening = [] if self.system is None else [{"role": "system", "content": self.system}]
        ids = encode_prompt(self.model.tokenizer, [*opening, *asked], self.template)
        room = (self.model.max_positions or len(ids) + self.sampling.max_tokens) - len(ids)
        if room < 1:
            raise ValueError(f"the conversation has {len(ids)} tokens, and the model room for no more: begin a new one")
        prompt = Prompt(ids=tuple(ids), text=text, key=str(len(asked)))
        sampling = replace(self.sampling, max_tokens=min(room, self.sampling.max_tokens))
        (rollout,) = self.engine.generate([prompt], sampling)
        answer = self.model.tokenizer.decode(rollout.response_ids, skip_special_tokens=True)
        self.messages = [*asked, {"role": "assistant", "content": answer}]
        return answer

    def forget(self) -> None:
        """Begin a new conversation."""
        self.messages = []
