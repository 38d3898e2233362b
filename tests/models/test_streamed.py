"""Offloaded layers on a GPU, which is pretended: the order of copies, computation and waits, and the numbers."""

from pathlib import Path

import pytest
import torch
from support.models import make_model
from support.pretended import Device, gpu, pretended
from support.streams import Race, Stream

from kibitz.config import FrozenConfig
from kibitz.models import LanguageModel, offload
from kibitz.models.streamed import Streamed
from kibitz.teachers import ScoreRequest
from kibitz.teachers.local import LocalScorer
from kibitz.types import Prompt, Rollout

LAYERS = 5
ROLLOUTS = [Rollout(Prompt((1, 5 + i), "", str(i)), [4, 9, 2 + i], torch.zeros(3), True) for i in range(4)]
IN_TWO = ScoreRequest("dense", tokens_per_micro_batch=10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("streamed") / "model", seed=2, num_hidden_layers=LAYERS)


def states(model: LanguageModel) -> torch.Tensor:
    return torch.cat([signal.hidden_TD for signal in LocalScorer(model, IN_TWO).score(ROLLOUTS)]).held


def loaded(folder: Path, how: str | None) -> LanguageModel:
    return offload.load_frozen(FrozenConfig(model=str(folder), offload=how), "teacher", gpu())


def test_layers_that_come_one_after_another_give_the_same_numbers(folder):
    with pretended():
        whole = states(loaded(folder, None))
        model = loaded(folder, "layers")
        for _ in range(2):
            assert torch.equal(states(model), whole)
        assert {p.device.type for p in model.model.model.layers.parameters()} == {"cpu"}
        assert {p.is_pinned() for p in model.model.model.layers.parameters()} == {True}


def test_a_layer_is_copied_while_the_one_before_it_is_computed(folder):
    """Two at first, then one more before each layer: when the last is computed, nothing is under way."""
    with pretended():
        model = loaded(folder, "layers")
        Device.current.streams.log.clear()
        states(model)
        streams = Device.current.streams
    in_layer = len(list(model.model.model.layers[0].parameters()))
    runs: list[tuple[str, int]] = []
    for stream, what in streams.log:
        name = "compute" if stream is streams.main else what
        runs = [*runs[:-1], (name, runs[-1][1] + 1)] if runs and runs[-1][0] == name else [*runs, (name, 1)]
    copies = [number for name, number in runs if name == "copy"]
    assert copies == 2 * [2 * in_layer, *[in_layer] * (LAYERS - 2)]  # of two micro-batches
    assert runs[-1][0] == "compute"


@pytest.mark.parametrize("what", ["the copy", "the computation"])
def test_a_wait_that_is_left_out_is_a_race(folder, monkeypatch, what):
    """The computing stream must wait for the copy, and the copy for the layer that was in its buffer."""
    wait = Stream.wait_event

    def forgetful(stream, event):
        main = stream is Device.current.streams.main
        if main is not (what == "the copy"):
            wait(stream, event)

    with pretended():
        model = loaded(folder, "layers")
        monkeypatch.setattr(Stream, "wait_event", forgetful)
        with pytest.raises(Race, match="computing stream" if what == "the copy" else "copying stream"):
            states(model)


def test_there_are_two_buffers_and_only_while_layers_are_read(folder):
    with pretended():
        model = loaded(folder, "layers")
        hosts = [[(layer, name, p) for name, p in layer.named_parameters()] for layer in model.model.model.layers]
        streamed = Streamed([[(torch.empty(0), "data", p.data) for _, _, p in host] for host in hosts], gpu())
        for number in range(LAYERS):
            streamed.fetch(number)
            assert [len(buffer) for buffer in streamed.buffers] == [streamed.size] * 2
            streamed.evict(number)
        assert streamed.buffers == []
    layer = sum(p.nbytes for p in model.model.model.layers[0].parameters())
    assert layer <= streamed.size <= layer + 256 * len(hosts[0])
