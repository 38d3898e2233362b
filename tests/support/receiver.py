"""A stub that takes weights by vLLM's control routes, and what stands for vLLM's half of a trainer where there is none."""

import base64
import pickle
import sys
import weakref
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

import kibitz.engines.transfer

CONTROL = ("/init_weight_transfer_engine", "/start_weight_update", "/update_weights", "/finish_weight_update")


def carried(tensor: torch.Tensor):
    return "GPU-here", (tensor,)


class Receiver:
    """Bends a stub into a server that takes weights by handles; `broken` are the control routes that it answers 500."""

    def __init__(self, *broken: str):
        self.broken, self.stub = broken, None

    def __call__(self, path, answer):
        if path in self.broken:
            return 500, {"error": {"message": "no engine for weights"}}
        if path == "/update_weights":
            update = self.stub.asked[-1][2]["update_info"]
            handles = pickle.loads(base64.b64decode(update["ipc_handles_pickled"]))
            found = {name: handle["GPU-here"][0] for name, handle in zip(update["names"], handles, strict=True)}
            assert update["shapes"] == [list(tensor.shape) for tensor in found.values()]
            self.stub.model.model.load_state_dict(found, strict=False)
        if path == "/get_world_size":
            return {"world_size": 1}
        return {} if path in CONTROL else answer


def packed(tensor: torch.Tensor) -> str:
    return base64.b64encode(pickle.dumps([{"GPU-here": (tensor.clone(),)}])).decode()


@dataclass
class _Sender:
    """Sends each weight in a request of its own, and keeps none: two of them are never alive at a time, but a tied head's."""

    client: Any
    source: Any

    def send_weights(self) -> None:
        self.client.start_weight_update()
        names, before = [about[0] for about in self.source.metadata()], []
        weights = iter(self.source)
        for place in range(len(names)):
            name, weight = next(weights)
            assert name == names[place]
            self.client.update_weights(
                {"names": [name], "shapes": [list(weight.shape)], "ipc_handles_pickled": packed(weight)}
            )
            before.append(weakref.ref(weight))
            del weight
            alive = sum(one() is not None for one in before)
            assert alive <= 2, f"{alive} whole weights are alive at a time"
        assert next(weights, None) is None
        self.client.finish_weight_update()


def trainer_init(info: Any, client: Any, source: Any) -> _Sender:
    client.init_weight_transfer_engine({"rank_offset": 1, "world_size": info.world_size})
    return _Sender(client, source)


def stand_in() -> None:
    """Let `sync: nccl` find a GPU and vLLM's trainer half in this process, which sends by HTTP what a broadcast would."""
    modules = {name: ModuleType(name) for name in ("vllm", "vllm.distributed", "vllm.distributed.weight_transfer")}
    transfer = modules["vllm.distributed.weight_transfer"]
    transfer.WeightTransferTrainerFactory = SimpleNamespace(trainer_init=trainer_init)  # pyright: ignore
    for name, given in (
        ("nccl_engine", {"NCCLTrainerInitInfo": lambda **about: SimpleNamespace(**about)}),
        ("base", {"ParamMeta": lambda *about: about}),
    ):
        module = ModuleType(f"{transfer.__name__}.{name}")
        vars(module).update(given)
        modules[module.__name__] = module
    sys.modules.update(modules)
    gpu = SimpleNamespace(**vars(torch) | {"cuda": SimpleNamespace(is_available=lambda: True)})
    kibitz.engines.transfer.torch = gpu  # pyright: ignore
