"""Weights over one channel to all servers: what is asked of whom, and what is sent. The broadcast itself needs GPUs."""

import threading
from contextlib import ExitStack

import pytest
import torch
from support.models import language_model, make_model
from support.vllm_stub import Stub

from kibitz.engines.transfer import Group, Routes, Weighed, num_workers
from kibitz.engines.untied import HEAD
from kibitz.servers import ServerError
from kibitz.servers.http import Server


@pytest.fixture
def servers(two_models):
    """Two servers, of 2 and of 1 GPU, that answer a call only when both have it; and what they were asked."""
    met = threading.Barrier(2, timeout=300)

    def bend(size: int):
        def answer(path, given):
            if path == "/get_world_size":
                return {"world_size": size}
            met.wait()
            return {}

        return answer

    with ExitStack() as stack:
        stubs = [stack.enter_context(Stub(two_models[0], bend=bend(size))) for size in (2, 1)]
        found = [Server(stub.url, "student", 30.0) for stub in stubs]
        for server in found:
            stack.callback(server.close)
        yield found, stubs


def test_every_call_goes_to_all_at_once_and_ranks_follow_one_another(servers):
    found, stubs = servers
    sizes = [num_workers(server) for server in found]
    assert sizes == [2, 1]
    routes = Routes(found, sizes)
    routes.init_weight_transfer_engine({"rank_offset": 1, "world_size": 4, "master_port": 5})
    routes.start_weight_update()
    routes.update_weights({"names": ["a"]})
    routes.finish_weight_update()
    routes.shutdown_weight_transfer_engine()
    paths = ["/init_weight_transfer_engine", "/start_weight_update", "/update_weights", "/finish_weight_update",
             "/shutdown_weight_transfer_engine"]  # fmt: skip
    for stub, offset in zip(stubs, (1, 3), strict=True):
        asked = [(path, body) for path, _, body in stub.asked if path != "/get_world_size"]
        assert [path for path, _ in asked] == paths
        assert asked[0][1] == {"init_info": {"rank_offset": offset, "world_size": 4, "master_port": 5}}
        assert asked[2][1] == {"update_info": {"names": ["a"]}}


def test_a_server_that_does_not_know_its_gpus_is_named(two_models):
    with Stub(two_models[0], bend=lambda path, answer: {"world_size": "two"}) as stub:
        server = Server(stub.url, "student", 30.0)
        with pytest.raises(
            ServerError, match=f"{stub.url} does not say how many GPUs it has.*--weight-transfer-config"
        ):
            num_workers(server)
        server.close()


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_sent_is_every_parameter_once_and_the_output_head(tied, tmp_path):
    student = language_model(make_model(tmp_path / "m", kind="llama", tie_word_embeddings=tied))
    model, source = student.model, Weighed(student, lambda name, dtype, shape: (name, dtype, shape))
    sent = list(source)
    assert source.metadata() == [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in sent]
    names = [name for name, _ in sent]
    assert len(set(names)) == len(names) and names[-1] == HEAD
    assert set(names) == {name for name, _ in model.named_parameters()} | {HEAD}
    assert torch.equal(sent[-1][1], model.get_output_embeddings().weight)
    assert [name for name, _ in source] == names, "a fresh pass each time"


class Lamp:
    """A server as a group sees it."""

    def __init__(self, url: str):
        self.url, self.lost, self.down_until = url, 0, 0.0


def test_one_broadcast_serves_all_and_a_lost_server_makes_a_new_channel():
    opened, sent, lamps = [], [], [Lamp(name) for name in "abc"]

    def make(servers):
        opened.append("".join(server.url for server in servers))
        return lambda: sent.append(opened[-1])

    group = Group(make)  # pyright: ignore[reportArgumentType]
    for lamp in lamps:
        group.join(lamp)  # pyright: ignore[reportArgumentType]
    threads = [threading.Thread(target=group.send, args=(lamp, 1)) for lamp in lamps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert opened == ["abc"] and sent == ["abc"]
    group.send(lamps[1], 2)
    assert opened == ["abc"] and sent == ["abc", "abc"], "the channel stays"
    lamps[2].lost, lamps[2].down_until = 1, float("inf")
    group.send(lamps[0], 3)
    assert opened == ["abc", "ab"]
    lamps[2].down_until = 0.0
    group.send(lamps[2], 3)
    assert opened == ["abc", "ab", "abc"] and len(sent) == 4
    group.send(lamps[0], 3)
    assert len(sent) == 4
    group.send(lamps[0], 4)
    assert opened[3:] == [] and sent[-1] == "abc"


def test_a_channel_that_broke_off_is_not_used_again():
    opened = []

    def make(servers):
        opened.append(len(servers))
        return lambda: 1 / 0 if len(opened) == 1 else None

    group = Group(make)
    group.join(lamp := Lamp("a"))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ZeroDivisionError):
        group.send(lamp, 1)  # pyright: ignore[reportArgumentType]
    group.send(lamp, 1)  # pyright: ignore[reportArgumentType]
    assert opened == [1, 1]
