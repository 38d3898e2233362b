"""Weights that a server on the trainer's GPU reads where they lie: what is asked in which order, what vLLM's own classes make of
it, and the folder that follows where a server does not take it. Handles of a GPU's memory need a GPU: others stand for them here,
which carry the tensor."""

import json
import subprocess
import threading

import pytest
from support.models import language_model, make_model
from support.receiver import CONTROL, Receiver, carried
from support.vllm_cpu import ENVIRONMENT, MISSING, PYTHON, installed
from support.vllm_stub import Stub

from kibitz.config.servers import RolloutServerConfig
from kibitz.engines import sync
from kibitz.engines.ipc import IPCTransfer, Preferred
from kibitz.engines.sync import ReloadedFolder, Weights
from kibitz.engines.untied import HEAD
from kibitz.servers import ServerError
from kibitz.servers.http import Passing, Server


@pytest.fixture
def synced(two_models, tmp_path, monkeypatch):
    """Bring the second model's weights to a stub that has the first's, which looks at them by the probe; how they went."""

    def run(receiver: Receiver):
        student = language_model(two_models[1])
        preferred = Preferred(IPCTransfer(carried), ReloadedFolder(tmp_path / "weights"))
        monkeypatch.setattr(sync, "carrier", lambda *_: preferred)
        with Stub(two_models[0], bend=receiver) as stub:
            receiver.stub = stub
            server = Server(stub.url, "student", 30.0)
            weights = Weights(RolloutServerConfig(), tmp_path, student, lambda _: stub_answers(stub))
            weights.meet(server)
            weights.publish(student)
            weights.ensure(server)
            told, paths = weights.metrics()["sync"], [path for path, _, _ in stub.asked if path != "/v1/models"]
            server.close()
        return told, paths, (tmp_path / "weights").exists()

    return run


def stub_answers(stub):
    """What the stub writes now, with its own log-probabilities: the probe."""
    return stub._write([1, 5, 6], {"max_tokens": 8, "seed": 1}, [])


def test_a_server_that_offers_it_reads_the_weights_and_no_file_is_written(synced):
    told, paths, written = synced(Receiver())
    assert told["way"] == "ipc" and "why" not in told and not written
    assert paths == list(CONTROL)


@pytest.mark.parametrize("route", [CONTROL[0], CONTROL[2]])
def test_a_server_that_does_not_take_it_gets_the_folder_and_the_metrics_say_why(route, synced):
    told, paths, written = synced(Receiver(route))
    assert told["way"] == "reload" and "no engine for weights" in told["why"] and written
    assert paths[-1] == "/collective_rpc" and paths.count(route) == 1, "not tried a second time"


def test_a_server_that_is_down_is_no_reason_for_another_way(two_models, tmp_path):
    with Stub(two_models[0], bend=Receiver(*CONTROL, "/health")) as stub:
        server = Server(stub.url, "student", 30.0)
        preferred = Preferred(IPCTransfer(carried), ReloadedFolder(tmp_path))
        with pytest.raises(Passing, match="500"):
            preferred.meet(server)
        assert preferred.way == "ipc" and not preferred.why
        server.close()


def test_a_server_that_was_lost_is_met_again_before_it_gets_weights(two_models):
    with Stub(two_models[0], bend=(receiver := Receiver())) as stub:
        receiver.stub = stub
        server, transfer = Server(stub.url, "student", 30.0), IPCTransfer(carried)
        transfer.meet(server)
        transfer.publish(language_model(two_models[1]), 1)
        for _ in range(2):
            transfer.push(server)
        assert [path for path, _, _ in stub.asked].count(CONTROL[0]) == 1
        server.lost += 1
        transfer.push(server)
        assert [path for path, _, _ in stub.asked].count(CONTROL[0]) == 2
        server.close()


def test_several_servers_that_refuse_at_the_same_time_get_one_folder(two_models, tmp_path):
    class Folder(ReloadedFolder):
        published = 0

        def publish(self, student, version):
            Folder.published += 1
            super().publish(student, version)

    class Refusing:
        way, met = "ipc", threading.Barrier(2)

        def meet(self, server): ...
        def publish(self, student, version): ...
        def push(self, server):
            self.met.wait(300)
            raise ServerError("no")

    preferred = Preferred(Refusing(), Folder(tmp_path))
    preferred.publish(language_model(two_models[1]), 1)
    with Stub(two_models[0]) as one, Stub(two_models[0]) as two:
        servers = [Server(stub.url, "student", 30.0) for stub in (one, two)]
        threads = [threading.Thread(target=preferred.push, args=(server,)) for server in servers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert Folder.published == 1 and [stub.asked[-1][0] for stub in (one, two)] == ["/collective_rpc"] * 2
        for server in servers:
            server.close()


def test_it_needs_a_gpu_where_it_is_asked_for(two_models, tmp_path):
    with pytest.raises(ValueError, match="sync: ipc needs the student on a GPU"):
        sync.carrier(RolloutServerConfig(sync="ipc"), tmp_path, language_model(two_models[0]))


READS = """
import json, os, sys
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
import torch
from types import SimpleNamespace
from vllm.distributed.weight_transfer import ipc_engine
from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
body = json.load(open(sys.argv[1]))
engine_class = WeightTransferEngineFactory._registry["ipc"]()
info = engine_class.update_info_cls(**WeightTransferUpdateRequest(**body).update_info)
init = engine_class.init_info_cls(packed=False)
ipc_engine.torch.cuda.get_device_properties = lambda index: SimpleNamespace(uuid="GPU-here")
ipc_engine.rebuild_cuda_tensor = lambda *args: (args[0], args[6])
loaded = []
engine = SimpleNamespace(device=torch.device("cuda", 3), packed=init.packed, model=SimpleNamespace(load_weights=loaded.extend))
engine_class.receive_weights(engine, info)
print(json.dumps([[name, where, list(shape)] for (name, (where, device)), shape in zip(loaded, info.shapes) if device == 3]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not installed(), reason=MISSING)
def test_vllms_own_classes_read_what_is_sent(tmp_path):
    """The request goes through vLLM's request, information and engine classes; only the call that opens a GPU's memory is
    replaced. The seventh argument of a handle is the device, which the receiver sets to its own."""
    student = language_model(make_model(tmp_path / "m", kind="llama", tie_word_embeddings=True))
    numbers = iter(range(1000))
    transfer = IPCTransfer(lambda tensor: ("GPU-here", (next(numbers), *([None] * 14))))
    transfer.publish(student, 1)
    sent = []
    server = type(
        "Server", (), {"url": "u", "lost": 0, "order": lambda _, path, body=None: sent.append((path, body))}
    )()
    transfer.push(server)  # pyright: ignore[reportArgumentType]
    assert [path for path, _ in sent] == list(CONTROL) and sent[0][1] == {"init_info": {"packed": False}}
    (tmp_path / "body.json").write_text(json.dumps(sent[2][1]))
    (tmp_path / "reads.py").write_text(READS)
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), **ENVIRONMENT}
    asked = [PYTHON, str(tmp_path / "reads.py"), str(tmp_path / "body.json")]
    done = subprocess.run(asked, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    read = json.loads(done.stdout.splitlines()[-1])
    named = {**dict(student.model.named_parameters()), HEAD: student.model.get_output_embeddings().weight}
    assert {name: shape for name, _, shape in read} == {name: list(tensor.shape) for name, tensor in named.items()}
    assert [name for name, _, _ in read][-1] == HEAD and [where for _, where, _ in read] == list(range(len(read)))
