"""Several teachers: each prompt has one or more of them, by its row, its task or none of these, and those of one prompt
score it together, as a mixture in probability space."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from kibitz.config import MethodConfig, SignalKind, TeacherConfig
from kibitz.engines import Engine, OnReady, nobody_waits
from kibitz.engines.asked import longest_text
from kibitz.engines.torch import TorchEngine
from kibitz.ledger import Count, uncounted
from kibitz.logprobs import log_mixture
from kibitz.models import LanguageModel
from kibitz.signals import Dense, Sampled, Signal, locked
from kibitz.teachers import MakeEngine, Scorer, ScoreRequest, Teacher, Voice
from kibitz.teachers.local import decided, reduced
from kibitz.teachers.mixture import Mix, MixedDecoder, MixedHead, mix_of
from kibitz.types import Prompt, Rollout, Sampling

ALONG = (
    "only models of their own in this process that read the student's prompt can, one token after another: give each task one "
    "teacher (tasks)"
)


def name_of(config: TeacherConfig, place: int) -> str:
    return config.name or f"teacher {place + 1}"


def mix_for(configs: Sequence[TeacherConfig], prompt: Prompt) -> Mix:
    """Return the teachers of a prompt: the one that its row names; else those of its task; else those without tasks."""
    names = [name_of(config, place) for place, config in enumerate(configs)]
    if prompt.route is not None:
        if prompt.route not in names:
            raise ValueError(
                f"a row's route is {prompt.route!r} and the teachers are {', '.join(map(repr, names))}: give one that name"
            )
        return ((names.index(prompt.route), 0.0),)
    own = [place for place, config in enumerate(configs) if prompt.task in config.tasks]
    places = own or [place for place, config in enumerate(configs) if not config.tasks]
    mix = mix_of({place: configs[place].weight_on(prompt.task) for place in places})
    if not mix:
        raise ValueError(
            f"no teacher scores the task {prompt.task!r}: enter it in the tasks of one, leave the tasks of one out, or "
            "give one of those that could a weight above 0"
        )
    return mix


def routed(configs: Sequence[TeacherConfig], prompts: Sequence[Prompt], method: MethodConfig) -> list[list[Prompt]]:
    """Return the prompts of each teacher. Raise ValueError if a prompt would have no teacher, or more than the method can
    take."""
    mix, heard = remembered(configs), [[] for _ in configs]
    for prompt in prompts:
        speak = [place for place, _ in mix(prompt)]
        for place in speak:
            heard[place].append(prompt)
        if len(speak) == 1 or not method.needs().teacher_writes:
            continue
        if method.needs().teacher_judges:
            raise ValueError(
                f"{method.type} has one teacher judge a text, and the task {prompt.task!r} has {len(speak)}: give it one (tasks)"
            )
        if not all(configs[place].reads_along() for place in speak):
            raise ValueError(f"the teachers of the task {prompt.task!r} cannot write together: {ALONG}")
    return heard


def several(members: Sequence[Teacher], configs: Sequence[TeacherConfig]) -> Teacher:
    """All of them as one teacher."""
    mix = remembered(configs)
    kinds: tuple[SignalKind, ...] = tuple(
        kind for kind in members[0].kinds if all(kind in member.kinds for member in members)
    )
    numbers: dict[str, float] = {}
    examiners = _examiners(members)

    def of(prompts: Sequence[Prompt], place: int) -> list[int]:
        return [i for i, prompt in enumerate(prompts) if any(place == at for at, _ in mix(prompt))]

    def check(prompts: Sequence[Prompt], max_tokens: int) -> None:
        for place, member in enumerate(members):
            if own := of(prompts, place):
                member.check([prompts[i] for i in own], max_tokens)

    def voices(prompt: Prompt) -> list[Voice]:
        """Return the teachers of a prompt, and the others that could score it: one with a context reads columns of its own
        rows."""
        speak = dict(mix(prompt))
        return [
            Voice(name_of(config, place), math.exp(speak[place]) if place in speak else 0.0, member)
            for place, (member, config) in enumerate(zip(members, configs, strict=True))
            if member.examiner is not None and (place in speak or config.context is None)
        ]

    def each(call: Callable[[Teacher], object]) -> None:
        for member in members:
            call(member)

    return Teacher(
        kinds=kinds,
        scorer=lambda request: SeveralScorer(members, mix, request, numbers),
        examiner=None if examiners is None else lambda request: SeveralScorer(examiners, mix, request, {}),
        writer=lambda make: SeveralEngine(members, mix, make),
        num_parameters=sum(member.num_parameters for member in members),
        check=check,
        sync=lambda student: each(lambda member: member.sync(student)),
        metrics=lambda: {**numbers, **{k: v for member in members for k, v in member.metrics().items()}},
        close=lambda: each(lambda member: member.close()),
        stateful={
            name if i == 0 else f"{name}-{i}": kept for i, m in enumerate(members) for name, kept in m.stateful.items()
        },
        models=[model for member in members for model in member.models],
        voices=voices,
        served=[one for member in members for one in member.served],
    )


def _examiners(members: Sequence[Teacher]) -> list[Teacher] | None:
    """The same teachers as they answer evaluations, if all of them do."""
    found = [replace(member, scorer=ask) for member in members if (ask := member.examiner) is not None]
    return found if len(found) == len(members) else None


def remembered(configs: Sequence[TeacherConfig]) -> Callable[[Prompt], Mix]:
    """`mix_for`, worked out once for each task and route."""
    found: dict[tuple[str, str | None], Mix] = {}

    def mix(prompt: Prompt) -> Mix:
        key = (prompt.task, prompt.route)
        if key not in found:
            found[key] = mix_for(configs, prompt)
        return found[key]

    return mix


@dataclass(frozen=True)
class SeveralScorer:
    """`numbers` are those of the last rollouts that were scored: how far the teachers of one prompt are from each other."""

    members: Sequence[Teacher]
    mix: Callable[[Prompt], Mix]
    request: ScoreRequest
    numbers: dict[str, float]
    head: MixedHead = field(default_factory=MixedHead)

    @torch.no_grad()
    def score(self, rollouts: Sequence[Rollout]) -> list[Signal]:
        mixes = [self.mix(rollout.prompt) for rollout in rollouts]
        request = decided(self.request, self._read(rollouts, mixes))
        said: list[dict[int, Signal]] = [{} for _ in rollouts]
        kinds = [self._kind(mix) for mix in mixes]
        for place, member in enumerate(self.members):
            for kind in sorted(set(kinds)):
                own = [i for i, mix in enumerate(mixes) if kinds[i] == kind and any(place == at for at, _ in mix)]
                scorer: Scorer = member.scorer(replace(request, kind=kind))
                signals = scorer.score([rollouts[i] for i in own]) if own else []
                for i, signal in zip(own, signals, strict=True):
                    said[i][place] = signal
        dense = _in_one_place([_dense(one) for one in said])
        width = 1 + max((sum(s.hidden_TD.shape[-1] for s in one.values()) for one in dense if one), default=0)
        whole = [self.head.packed(mix, one, width) if one else None for mix, one in zip(mixes, dense, strict=True)]
        self._watch(mixes, whole)
        return [self._joined(*parts) for parts in zip(rollouts, mixes, said, whole, strict=True)]

    def _read(self, rollouts: Sequence[Rollout], mixes: Sequence[Mix]) -> list[tuple[LanguageModel, list[Rollout]]]:
        """The models of the teachers, each with the rollouts that it reads."""
        return [
            (model, [rollout for rollout, mix in zip(rollouts, mixes, strict=True) if place in dict(mix)])
            for place, member in enumerate(self.members)
            for model in member.models
        ]

    def _kind(self, mix: Mix) -> SignalKind:
        """Return the signal to ask the teachers for: a mixture takes whole distributions if all can give them."""
        if len(mix) == 1 or not all("dense" in self.members[place].kinds for place, _ in mix):
            return self.request.kind
        return "dense"

    def _joined(self, rollout: Rollout, mix: Mix, said: dict[int, Signal], whole: Dense | None) -> Signal:
        if whole is not None:
            token_T = torch.tensor(rollout.response_ids, device=whole.hidden_TD.device)
            return reduced(whole, token_T, self.request)
        if len(mix) == 1:
            return said[mix[0][0]]
        logp = [s.logp_T for s in said.values() if isinstance(s, Sampled)]
        if len(logp) < len(mix) or self.request.temperature != 1:
            raise ValueError(
                "teachers that do not give whole distributions are mixed by the sampled token's probability, at temperature "
                "1: write method.support=sampled, or give each task one teacher (tasks)"
            )
        logp_IT = torch.stack([logp_T.to(logp[0].device) for logp_T in logp])
        return Sampled(log_mixture(logp_IT, logp_IT.new_tensor([log_weight for _, log_weight in mix])))

    def _watch(self, mixes: Sequence[Mix], whole: Sequence[Dense | None]) -> None:
        self.numbers.clear()
        together = [(mix, one) for mix, one in zip(mixes, whole, strict=True) if len(mix) > 1 and one is not None]
        if not together:
            return
        sums = [self.head.agreement(mix, one.hidden_TD) for mix, one in together]
        num_tokens = sum(len(one.hidden_TD) for _, one in together)
        self.numbers["teachers_disagreement"] = sum(nats for nats, _ in sums) / max(1, num_tokens)
        self.numbers["teachers_agree"] = sum(same for _, same in sums) / max(1, num_tokens)


def _dense(said: dict[int, Signal]) -> dict[int, Dense]:
    return {place: signal for place, signal in said.items() if isinstance(signal, Dense)}


def _in_one_place(said: list[dict[int, Dense]]) -> list[dict[int, Dense]]:
    """Hidden states that wait in host memory and logits, which stay on the device, are joined in host memory."""
    places = {signal.hidden_TD.device.type for one in said for signal in one.values()}
    if len(places) <= 1:
        return said
    return [{place: locked(signal) for place, signal in one.items()} for one in said]


class SeveralEngine:
    """Each prompt is answered by its teacher; where it has several, each token is drawn from their mixture."""

    def __init__(self, members: Sequence[Teacher], mix: Callable[[Prompt], Mix], make: MakeEngine):
        self.members, self.mix, self.make = members, mix, make
        self.engines: dict[Mix, tuple[Engine, list[TorchEngine]]] = {}

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, on_ready: OnReady = nobody_waits, count: Count = uncounted
    ) -> list[Rollout]:
        places: dict[Mix, list[int]] = {}
        for place, prompt in enumerate(prompts):
            places.setdefault(self.mix(prompt), []).append(place)
        written: list[list[Rollout]] = [[] for _ in prompts]
        for mix, own in places.items():
            if mix not in self.engines:
                self.engines[mix] = self._engine(mix)
            engine, together = self.engines[mix]
            theirs = [prompts[place] for place in own]
            if isinstance(engine, TorchEngine) and together:
                decoders = [writer.decoder(longest_text(theirs, sampling)) for writer in together]
                engine.use(MixedDecoder(decoders, mix, min(writer.student.vocab_size for writer in together)))
            rollouts = engine.generate(theirs, sampling, on_ready, count)
            for writer in together[1:]:
                count(writer.student, rollouts)
            rollouts = iter(rollouts)
            for place in own:
                written[place] = [next(rollouts) for _ in range(sampling.num_samples)]
        return [rollout for group in written for rollout in group]

    def sync(self, student: LanguageModel) -> None:
        """Teachers follow the student by themselves, if at all."""

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        for engine, _ in self.engines.values():
            engine.close()

    def _engine(self, mix: Mix) -> tuple[Engine, list[TorchEngine]]:
        """Return the engine that writes for these teachers, and of several the engines whose decoders it mixes."""
        if len(mix) == 1:
            return self.members[mix[0][0]].writer(self.make), []
        engines = [self.members[place].writer(self.make) for place, _ in mix]
        writers = [engine for engine in engines if isinstance(engine, TorchEngine)]
        if len(writers) < len(mix):
            raise ValueError(f"these teachers cannot write together: {ALONG}")
        return TorchEngine(writers[0].student, writers[0].max_rows), writers
