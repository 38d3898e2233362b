"""Whole steps on a GPU that is not there (`support.pretended`): nothing meets on two devices, and the numbers are the CPU's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.chat_stub import Endpoint, says
from support.models import make_model
from support.pretended import DEVICE, NAME, Counts, WrongDevice, only_pretended, pretended
from support.runs import recipe
from support.vllm_stub import Stub

import kibitz
from kibitz import worlds
from kibitz.config import OptimConfig
from kibitz.files import checkpoints
from kibitz.optim import Optimizer
from kibitz.teachers import local
from kibitz.training.setup import prepare
from kibitz.training.trainer import NullProgress, Trainer

ROLLOUT = {"prompts_per_step": 3, "samples_per_prompt": 2, "max_tokens": 5}
QUICK = {"device": DEVICE, "rollout": ROLLOUT, "eval": {"every": 0, "num_prompts": 2, "heatmaps": 1}}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Models of one layer: `student`, `teacher` and `second`."""
    folder = tmp_path_factory.mktemp("pretended")
    for seed, (name, width) in enumerate({"student": 32, "teacher": 48, "second": 32}.items()):
        make_model(folder / name, seed, hidden_size=width, num_hidden_layers=1)
    return folder


@pytest.fixture
def tree(home, tmp_path):
    """Makes the recipe of a run on the device."""

    def build(**sections: Any) -> dict[str, Any]:
        teacher = sections.pop("teacher", {"model": str(home / "teacher")})
        made = recipe(home / "student", None, tmp_path / "run", **{**QUICK, **sections})
        return made if teacher is None else made | {"teacher": teacher}

    return build


def odd(prompt: Any, text: str) -> float:
    return float(len(text) % 2)


def steps(sections: dict[str, Any], number: int = 1, **options: Any) -> tuple[list[dict[str, Any]], Counts, Trainer]:
    """The rows of so many steps, without the evaluation around them."""
    with pretended() as counts:
        trainer = Trainer(prepare(sections, grader=odd, **options), NullProgress())
        for _ in range(number):
            trainer.step()
        trainer.save()
        trainer.setup.close()
    return trainer.folder.metrics.read(), counts, trainer


def opd(**options: Any) -> dict[str, Any]:
    return {"method": {"type": "opd", **options}}


def of(method: str, **options: Any) -> dict[str, Any]:
    return {"method": {"type": method, **options}}


HINT = "{{ prompt }} is a sum"
CASES: dict[str, dict[str, Any]] = {
    "exact": opd(),
    "student's top k": opd(support="top_k", top_k=4),
    "teacher's top k": opd(support="top_k", top_k=4, top_k_of="teacher"),
    "sampled": opd(support="sampled", discount=0.9, reward_coef=0.5, policy_loss="truncated"),
    "baseline": opd(support="sampled", baseline=True),
    "weighed by entropy": opd(token_weight="entropy"),
    "weighed by tip": opd(token_weight="tip"),
    "weighed by iw": opd(token_weight="iw"),
    "by sequence, tokens masked": opd(normalize="sequence", mask_tokens=["="]),
    "seeded": opd(seed_tokens=3, seed_decays=True),
    "seed learnt": opd(seed_tokens=3, learn_seed=True),
    "held and replayed": opd(reference_kl=0.1, replay=0.25, replay_coef=0.5),
    "sft": of("sft"),
    "sft of the teacher": of("sft", source="teacher"),
    "gkd": of("gkd"),
    "skd": of("skd", accept_top_k=3),
    "minillm": of("minillm"),
    "distillm2": of("distillm2"),
    "grpo": of("grpo"),
    "kdrl": of("kdrl"),
    "ammd": of("ammd"),
    "lora": {"student": {"lora": {"rank": 2}}},
    "packed": {"optim": {"packing": True}},
    "recomputed": {"optim": {"checkpointing": True}},
    "muon": {"optim": {"name": "muon"}},
    "sgd": {"optim": {"name": "sgd"}},
    "chunks": {"optim": {"chunk_tokens": 5, "tokens_per_micro_batch": 40}},
    "truncated": {"rollout": {**ROLLOUT, "top_p": 0.9, "top_k": 5, "epsilon": 0.01, "temperature": 0.8}},
    "guards": {"guards": {"cut_off": "mask"}, "rollout": {**ROLLOUT, "max_tokens": 12}},
    "states wait": {"optim": {"hidden_states": "cpu"}},
    "own, average": {"teacher": {"student": "ema", "context": HINT}},
    "own, current": {"teacher": {"student": "current", "context": HINT}},
    "own, start": {"teacher": {"student": "start", "context": HINT}},
    "own, base": {"student": {"lora": {"rank": 2}}, "teacher": {"student": "base", "context": HINT}},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_step_of_everything(tree, name):
    """The gradient is not zero, so that the backward pass has been through all of it."""
    (row,), _, trainer = steps(tree(**CASES[name]))
    assert row["grad_norm"] > 0
    assert row["loss"] != 0 or name == "grpo"  # whose advantages add up to zero where all responses have one length
    assert trainer.student.device.type == DEVICE


def test_the_judge_of_gad_learns_and_then_the_student(tree):
    rows, _, _ = steps(tree(**of("gad", source="teacher", warmup=0.0)), 2)
    assert rows[0]["discriminator_loss"] > 0
    assert rows[1]["grad_norm"] > 0


def test_numbers_are_those_of_the_cpu(tree, home, tmp_path):
    """Two steps, of models that take the same kernels in both places, up to the order of sums."""
    same = {"dtype": "float32", "attention": "eager"}
    teacher, optim = {"model": str(home / "teacher"), **same}, {"name": "sgd", "lr": 0.1, "checkpointing": True}
    sections = tree(student=same, teacher=teacher, optim=optim)
    rows, _, trainer = steps(sections, 2)
    on_cpu = Trainer(prepare({**sections, "device": "cpu", "output": str(tmp_path / "cpu")}), NullProgress())
    for _ in range(2):
        on_cpu.step()
    for ours, theirs in zip(rows, on_cpu.folder.metrics.read(), strict=True):
        for name in ("loss", "reverse_kl", "student_logp", "teacher_entropy", "grad_norm", "response_tokens"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5)
    for ours, theirs in zip(trainer.student.model.parameters(), on_cpu.student.model.parameters(), strict=True):
        torch.testing.assert_close(getattr(ours, "held", ours).cpu(), theirs)


# ------------------------------------------------------------------ whole runs


def test_a_checkpoint_is_written_behind_later_steps_to_the_same_bytes(tree, tmp_path):
    """Which is what a GPU does where the recipe says nothing."""
    saved = []
    for name, save in (("behind", {}), ("waits", {"background": False})):
        sections = {**tree(save={"every": 1, "keep": 9, **save}), "steps": 3, "output": str(tmp_path / name)}
        with pretended():
            trainer = Trainer(prepare(sections, grader=odd), NullProgress())
            threads, run = [], trainer.saver._run
            trainer.saver._run = lambda *given, run=run, seen=threads: (seen.append(1), run(*given))
            trainer.run()
        saved.append(checkpoints(tmp_path / name))
        assert len(threads) == (2 if name == "behind" else 0)
    assert [path.name for path in saved[0]] == [f"step-00000{step}" for step in (1, 2, 3)]
    for ours, theirs in zip(*saved, strict=True):
        for part in ("model.safetensors", "training/optimizer.safetensors"):
            assert (ours / part).read_bytes() == (theirs / part).read_bytes()


@pytest.mark.parametrize("name", ["exact", "lora", "muon", "sgd", "ammd", "own, average", "packed"])
def test_a_run_goes_on_from_its_checkpoint(tree, name):
    """Moments, masters and what a method or teacher keeps come back where the weights are."""
    sections = tree(**CASES[name])
    _, _, first = steps(sections)
    first.folder.lock.release()  # it is dead
    rows, _, trainer = steps(sections, resume=True)
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[1]["grad_norm"] > 0
    states = [value for part in trainer.optimizer.parts for one in part.state.values() for value in one.values()]
    assert {value.device.type for value in states if isinstance(value, torch.Tensor)} <= {DEVICE}


def test_the_room_of_a_count_is_beside_its_parameter():
    """A sharded optimizer reads its checkpoint into it."""
    with pretended():
        optimizer = Optimizer(torch.nn.Linear(2, 2).to(DEVICE), OptimConfig())
        assert {optimizer.room(f"weight|{key}").device.type for key in ("step", "exp_avg")} == {DEVICE}


def test_evaluation_heat_maps_and_checkpoints(tree):
    with pretended():
        run = kibitz.train(tree(steps=1), grader=odd)
    assert len(run.evals) == 2
    assert run.evals[-1]["reverse_kl"] > 0
    assert run.checkpoint is not None
    assert (run.folder / "rollouts.jsonl").read_text()


# ------------------------------------------------------------------ teachers


@pytest.mark.parametrize("support", ["sampled", "top_k"])
@pytest.mark.parametrize("generous", [True, False])
def test_a_teacher_behind_http(tree, home, support, generous):
    """Its scores come from the network, and the loss wants them on the device."""
    with Stub(home / "teacher", generous=generous) as stub:
        (row,), _, _ = steps(tree(teacher={"url": stub.url}, **opd(support=support, top_k=4)))
    assert row["grad_norm"] > 0


def test_a_teacher_that_chats(tree):
    with Endpoint(lambda body: says("1+2=3")) as endpoint:
        (row,), _, _ = steps(tree(teacher={"chat": endpoint.url}, **of("sft", source="teacher")))
    assert row["loss"] > 0


@pytest.mark.parametrize("method", [opd(support="sampled"), opd(alignment="gold"), opd(alignment="alm")])
@pytest.mark.parametrize("waits", ["device", "cpu"])
def test_a_teacher_with_its_own_tokenizer(tree, method, waits):
    teacher = {"model": str(worlds.get("arithmetic-long").checkpoint("teacher")), "tokenizer": "own"}
    (row,), _, _ = steps(tree(teacher=teacher, optim={"hidden_states": waits}, **method))
    assert row["grad_norm"] > 0


def test_scores_from_a_store(tree, home, tmp_path):
    """Filled in one run, read in the next."""
    sections = tree(teacher={"model": str(home / "teacher"), "store": str(tmp_path / "store")})
    (first,), _, _ = steps(sections)
    (again,), _, _ = steps({**sections, "output": str(tmp_path / "again")})
    assert (first["stored_share"], again["stored_share"]) == (0.0, 1.0)
    assert again["loss"] == first["loss"] != 0


@pytest.mark.parametrize("how", ["body", "layers"])
def test_an_offloaded_teacher(tree, home, how):
    """Weights come from page-locked memory for a forward pass, and are the host's again behind it."""
    resident = steps(tree())[0]
    teacher = {"model": str(home / "teacher"), "offload": how}
    rows, counts, trainer = steps({**tree(teacher=teacher), "output": str(home / how)})
    assert rows[0]["loss"] == resident[0]["loss"]
    if DEVICE == NAME:
        assert sum(number for line, number in counts.copies.items() if line.startswith("models/")) > 10
    (model,) = trainer.setup.parts.teacher.models
    assert {p.device.type for p in model.model.model.layers.parameters()} == {"cpu"}


@pytest.mark.parametrize("states", ["device", "cpu"])
def test_several_teachers(tree, home, states):
    pair = [{"model": str(home / name), "name": name} for name in ("teacher", "second")]
    (row,), _, _ = steps(tree(teacher=pair, optim={"hidden_states": states}))
    assert row["grad_norm"] > 0


def test_several_teachers_decide_together_where_their_states_wait(tree, home, monkeypatch):
    """One alone would be above what `auto` calls large, the other below it."""
    width = {"teacher": 48, "second": 32}
    tokens = ROLLOUT["prompts_per_step"] * ROLLOUT["samples_per_prompt"] * ROLLOUT["max_tokens"]
    monkeypatch.setattr(local, "LARGE", 2 * tokens * width["second"])
    pair = [{"model": str(home / name), "name": name} for name in width]
    (row,), _, _ = steps(tree(teacher=pair))
    assert row["grad_norm"] > 0


# ------------------------------------------------------------------ the device itself


@only_pretended
def test_devices_that_meet_are_refused_and_waits_are_counted():
    with pretended() as counts:
        there, here = torch.ones(3, device="gpu"), torch.ones(3)
        for mix in (lambda: there + here, lambda: torch.cat([there, here]), lambda: here.gather(0, there.long())):
            with pytest.raises(WrongDevice, match="met gpu:0 and the CPU"):
                mix()
        assert (there + torch.tensor(1.0)).tolist() == [2.0] * 3  # a number may come from the CPU
        assert there[[0, 2]].sum().item() == 2.0
        assert there.cpu().device.type == "cpu"
    assert sum(counts.waits.values()) == 3


@only_pretended
def test_page_locked_memory_is_known():
    with pretended():
        here = torch.empty(3, pin_memory=True)
        assert here.is_pinned()
        assert here[1:].is_pinned()
        assert not torch.empty(3).is_pinned()
        assert not torch.ones(3, device="gpu").is_pinned()
