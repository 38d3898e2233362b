"""Several processes train what one trains: real ones, which meet by gloo, on two and three ranks and on two hosts."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.models import make_model
from support.receiver import Receiver
from support.runs import recipe
from support.torchrun import TORCHRUN, WORKER, torchrun
from support.train_together import train
from support.vllm_stub import Stub
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from transformers import AutoModelForCausalLM

import kibitz
from kibitz.config import ParallelConfig
from kibitz.files import JSONL
from kibitz.parallel import sharded_files
from kibitz.parallel.ranks import Ranks, join
from kibitz.training import checkpoint

pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes are started and stopped the POSIX way")

RUNS = {
    "opd": {},
    "sft": {"method": {"type": "sft"}},
    "grpo": {"method": {"type": "grpo", "normalize_std": True, "normalize": "sequence"}},
    # 30 tokens a micro-batch: some processes have more of them than others
    "entropy": {"method": {"token_weight": "entropy", "token_share": 0.3}, "optim": {"tokens_per_micro_batch": 30}},
    "tip": {"method": {"token_weight": "tip", "normalize": "sequence"}, "guards": {"cut_off": "mask"}},
    "sampled": {"method": {"support": "sampled", "reward_coef": 0.5, "discount": 0.9}},
    "skd": {"method": {"type": "skd", "accept_top_k": 4}},
    "minillm": {"method": {"type": "minillm", "whiten": True}},
    "distillm2": {"method": {"type": "distillm2", "adaptive": True}},
    "kdrl": {"method": {"type": "kdrl"}},
    "lora": {"student": {"lora": {"rank": 4}}, "optim": {"lr": 1e-2}},
    "checkpointing": {"optim": {"checkpointing": True, "clip": 0.1, "packing": True}},
    "held": {"method": {"reference_kl": 0.3, "replay": 0.5}, "optim": {"tokens_per_micro_batch": 60}},
    "tied": {},
}
UNEVEN = ["opd", "grpo", "entropy"]
IN_PARTS = ["opd", "lora", "tied", "checkpointing", "entropy", "held"]
"""Those that run once more with a student that no process ever holds whole."""
STEPS = 3
EPS = 1e-4
"""AdamW divides a gradient by its own size: with 1e-8, one that is nothing but rounding moves its weight by the whole
learning rate, up here and down there (GRPO's advantages sum to zero, and so do some of its gradients)."""


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    make_model(folder / "tied", seed=3, tie_word_embeddings=True)
    make_model(folder / "deep", seed=4, hidden_size=128, intermediate_size=256, num_hidden_layers=10)
    return make_model(folder / "student", seed=1), make_model(folder / "teacher", seed=2, hidden_size=48)


def jobs(models, folder: Path, names) -> list[dict]:
    """Runs of 5 prompts a step, which neither two nor three processes share evenly, and one that is saved halfway."""
    made = [_job(models, folder, name, **RUNS[name]) for name in names]
    return [*made, _job(models, folder, "half", steps=2, optim={"schedule": "constant"})]


def jobs_in_parts(models, folder: Path, names) -> list[dict]:
    parallel = {"whole_copy": False}
    made = [_job(models, folder, name, as_name=f"{name}_in_parts", parallel=parallel, **RUNS[name]) for name in names]
    half = {"steps": 2, "optim": {"schedule": "constant"}, "parallel": parallel}
    return [*made, _job(models, folder, "half", as_name="half_in_parts", **half)]


def _job(models, folder: Path, name: str, resume: bool = False, as_name: str | None = None, **sections) -> dict:
    sections = {"steps": STEPS, "rollout": {"prompts_per_step": 5, "store": True}, **sections}
    sections["eval"] = {"every": 2, "num_prompts": 5, "samples": 2, "heatmaps": 1}
    sections["optim"] = {"eps": EPS, **sections.get("optim", {})}
    student = models[0].with_name("tied") if name == "tied" else models[0]
    return {"recipe": recipe(student, models[1], folder / (as_name or name), **sections), "resume": resume}


def peak_job(models, folder: Path, name: str, whole_copy: bool) -> dict:
    """A run whose processes look at what they hold: a student of many layers, alone."""
    sections = {"method": {"type": "sft"}, "steps": 2, "parallel": {"whole_copy": whole_copy}}
    sections |= {
        "eval": {"num_prompts": 2},
        "rollout": {"prompts_per_step": 6, "samples_per_prompt": 1, "max_tokens": 4},
    }
    sections |= {"optim": {"tokens_per_micro_batch": 40}}
    tree = recipe(models[0].with_name("deep"), None, folder / name, **sections)
    return {"recipe": tree, "resume": False, "peak": str(folder / name)}


@pytest.fixture(scope="module")
def alone(models, tmp_path_factory) -> Path:
    """The folder of all runs, in this process; and of the one that was never halved."""
    folder = tmp_path_factory.mktemp("alone")
    for job in jobs(models, folder, RUNS):
        train(job)
    train(_job(models, folder, "whole", steps=4, optim={"schedule": "constant"}))
    return folder


@pytest.fixture(scope="module")
def by_two(alone, models, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("by-two")
    copies = _job(models, folder, "copies", parallel={"replicate": 2})
    sharded = _job(models, folder, "sharded", parallel={"shard_teacher": True}, optim={"tokens_per_micro_batch": 30})
    all_split = {"whole_copy": False, "shard_teacher": True}
    both = _job(models, folder, "skd", as_name="both_in_parts", parallel=all_split, **RUNS["skd"])
    some = _job(models, folder, "copies_in_parts", parallel={"replicate": 2, "whole_copy": False})
    each = _job(
        models, folder, "each", parallel={"reduce_gradients": "micro_batch"}, optim={"tokens_per_micro_batch": 30}
    )
    rounded = _job(models, folder, "rounded", parallel={"whole_copy": False}, student={"dtype": "bfloat16"})
    peaks = [peak_job(models, folder, f"peak-{whole}", whole) for whole in (True, False)]
    more = [copies, sharded, each, both, some, rounded, *peaks, *jobs_in_parts(models, folder, IN_PARTS)]
    torchrun(2, [*jobs(models, folder, RUNS), *more], folder)
    return folder


@pytest.fixture(scope="module")
def by_three(alone, by_two, models, tmp_path_factory) -> Path:
    """And what one process and two had saved halfway goes on with three."""
    folder, going_on = tmp_path_factory.mktemp("by-three"), []
    for name, before in (("from_one", alone), ("from_two", by_two)):
        shutil.copytree(before / "half", folder / name)
        going_on.append(_job(models, folder, name, resume=True, steps=4, optim={"schedule": "constant"}))
    for name, before in (("one_in_parts", alone / "half"), ("two_in_parts", by_two / "half_in_parts")):
        shutil.copytree(before, folder / name)
        sections = {"steps": 4, "optim": {"schedule": "constant"}, "parallel": {"whole_copy": False}}
        going_on.append(_job(models, folder, name, resume=True, **sections))
    in_parts = jobs_in_parts(models, folder, ["opd", "lora"])
    torchrun(3, [*jobs(models, folder, UNEVEN), *going_on, *in_parts], folder)
    return folder


def rows(folder: Path, name: str) -> list[dict]:
    return JSONL(folder / f"{name}.jsonl").read()


def assert_same_run(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    """Every number of every step and evaluation, the rollouts token by token, and the weights and moments."""
    for name in ("metrics", "evals"):
        for mine, theirs in zip(rows(one, name), rows(other, name), strict=True):
            assert _numbers(mine) == pytest.approx(_numbers(theirs), rel=tolerance, abs=tolerance)
    assert [(row["prompt_key"], row["response_ids"]) for row in rows(one, "stored")] == [
        (row["prompt_key"], row["response_ids"]) for row in rows(other, "stored")
    ]
    checkpoints = [checkpoint.checkpoints(folder)[-1] for folder in (one, other)]
    assert checkpoints[0].name == checkpoints[1].name
    for read in (weights_in, state_in):
        ours, theirs = (read(path) for path in checkpoints)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=10 * tolerance)


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    assert files
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def state_in(folder: Path) -> dict[str, torch.Tensor]:
    """The optimizer's, put together where several processes wrote it."""
    shares = folder / "training" / "optimizer"
    if not shares.is_dir():
        return load_file(folder / "training" / "optimizer.safetensors")
    stored = HuggingFaceStorageReader(str(shares)).read_metadata().state_dict_metadata
    return sharded_files.read(shares, lambda name: torch.empty(stored[name].size))


def _numbers(row: dict, path: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, dict) and key not in ("seconds", "peak_bytes"):
            found |= _numbers(value, f"{path}{key}.")
        elif isinstance(value, int | float) and key not in ("tokens_per_second",):
            found[path + key] = value
    return found


# ------------------------------------------------------------------ the same run


@pytest.mark.slow
@pytest.mark.parametrize(("num", "name"), [*((2, name) for name in RUNS), *((3, name) for name in UNEVEN)])
def test_several_processes_give_the_run_of_one(alone, by_two, by_three, num, name):
    assert_same_run((by_two if num == 2 else by_three) / name, alone / name)


@pytest.mark.slow
def test_two_copies_of_the_student_learn_as_one(alone, by_two):
    """HSDP: each process holds all, and gradients are summed between them."""
    assert_same_run(by_two / "copies", alone / "opd")


@pytest.mark.slow
def test_a_teacher_that_is_sharded_says_the_same(alone, by_two):
    assert_same_run(by_two / "sharded", alone / "opd")


@pytest.mark.slow
def test_gradients_that_are_reduced_each_time_give_the_same_step(alone, by_two):
    assert_same_run(alone / "opd", by_two / "each")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["from_one", "from_two"])
def test_a_run_of_one_or_two_processes_goes_on_with_three(alone, by_three, name):
    assert_same_run(by_three / name, alone / "whole")


@pytest.mark.slow
def test_each_process_writes_its_part_of_the_moments(by_two, by_three):
    """As equal as rows can be divided, all of them, and nothing twice."""
    for num, folder in ((2, by_two), (3, by_three)):
        saved = checkpoint.checkpoints(folder / "opd")[-1]
        assert checkpoint.damage(saved) is None
        files = sorted((saved / "training" / "optimizer").iterdir())
        assert len(files) == num
        held = [{name: t.numel() for name, t in load_file(file).items() if t.ndim} for file in files]
        whole = {name: t.numel() for name, t in state_in(saved).items() if t.ndim}
        assert {name: sum(part.get(name, 0) for part in held) for name in whole} == whole
        sizes = [sum(part.values()) for part in held]
        assert max(sizes) - min(sizes) < 0.1 * sum(sizes)


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_with_one(alone, by_two, models, tmp_path):
    shutil.copytree(by_two / "half", tmp_path / "half")
    train(_job(models, tmp_path, "half", resume=True, steps=4, optim={"schedule": "constant"}))
    assert_same_run(tmp_path / "half", alone / "whole")


@pytest.mark.slow
def test_one_process_writes_the_files(by_two):
    for name in RUNS:
        assert [row["step"] for row in rows(by_two / name, "metrics")] == list(range(1, STEPS + 1))
        assert checkpoint.damage(checkpoint.checkpoints(by_two / name)[-1]) is None


# ------------------------------------------------------------------ a student that no process holds whole


@pytest.mark.slow
@pytest.mark.parametrize(("num", "name"), [*((2, name) for name in IN_PARTS), (3, "opd"), (3, "lora")])
def test_a_student_in_parts_gives_the_run_of_one_process(alone, by_two, by_three, num, name):
    assert_same_run((by_two if num == 2 else by_three) / f"{name}_in_parts", alone / name, tolerance=2e-5)


@pytest.mark.slow
def test_student_and_teacher_in_parts_write_one_text_together(alone, by_two):
    assert_same_run(by_two / "both_in_parts", alone / "skd")


@pytest.mark.slow
def test_two_copies_in_parts_learn_as_one(alone, by_two):
    assert_same_run(by_two / "copies_in_parts", alone / "opd")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one_in_parts", "two_in_parts"])
def test_in_parts_three_processes_go_on(alone, by_three, name):
    assert_same_run(by_three / name, alone / "whole")


@pytest.mark.slow
def test_one_process_goes_on_with_what_two_saved_in_parts(alone, by_two, models, tmp_path):
    shutil.copytree(by_two / "half_in_parts", tmp_path / "half")
    train(_job(models, tmp_path, "half", resume=True, steps=4, optim={"schedule": "constant"}))
    assert_same_run(tmp_path / "half", alone / "whole")


@pytest.mark.slow
def test_in_parts_weights_are_rounded_from_float32_masters(by_two):
    saved = checkpoint.checkpoints(by_two / "rounded")[-1]
    weights, state = weights_in(saved), state_in(saved)
    masters = {name.removesuffix("|master"): t for name, t in state.items() if name.endswith("|master")}
    assert masters.keys() == weights.keys()
    for name, weight in weights.items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, masters[name].bfloat16())
        assert not torch.equal(weight.float(), masters[name])


@pytest.mark.slow
def test_no_process_ever_holds_a_student_in_parts_whole(by_two, models):
    """Beside its half of weights, gradients and two moments a process holds the two layers that are computed or come next,
    what stands around the layers, and a file's worth: loading, writing, learning and saving. With a whole copy it does not
    keep to that, so that the bound means something."""
    model = AutoModelForCausalLM.from_pretrained(models[0].with_name("deep"))
    total, layers = (sum(p.nbytes for p in m.parameters()) for m in (model, model.model.layers))
    around, layer = total - layers, layers / len(model.model.layers)
    limit = 4 * total / 2 + 2 * (around + 2 * layer) + 2**18
    peaks = {
        whole: [json.loads((by_two / f"peak-{whole}-{rank}.json").read_text()) for rank in range(2)]
        for whole in (True, False)
    }
    assert max(peaks[False]) < limit < min(peaks[True])
    assert max(peaks[False]) < max(peaks[True]) - 0.9 * total  # a machine short of memory takes some of it back


@pytest.mark.slow
def test_a_student_in_parts_is_saved_in_files_of_bounded_size(by_two):
    ours, theirs = (checkpoint.checkpoints(by_two / f"peak-{whole}")[-1] for whole in (False, True))
    sizes = [file.stat().st_size for file in ours.glob("model-*-of-*.safetensors")]
    assert len(sizes) > 2
    assert max(sizes) < 2**18 + 2**14
    one, other = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (ours, theirs))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=1e-4)
    assert {path.name for path in theirs.glob("*.json")} <= {path.name for path in ours.glob("*.json")}


# ------------------------------------------------------------------ the command line, and a signal


STOPPED = """
import os, time
from kibitz.cli import main
from kibitz.training.trainer import Trainer

step = Trainer.step

def held(trainer):
    step(trainer)
    while trainer.done == 3 and os.environ["RANK"] == "1" and not trainer.stop.number:
        time.sleep(0.01)

Trainer.step = held
main()
"""
"""`kibitz` in a process that does not begin a fourth step before it was told to stop: with every step the bits of two processes
part from those of one a little more."""


def processes_under(parent: int) -> dict[str, int]:
    """The processes that torchrun started, by rank."""
    found = {}
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        try:
            environment = Path(f"/proc/{child}/environ").read_bytes().decode().split("\0")
        except (FileNotFoundError, ProcessLookupError):  # one that has ended meanwhile
            continue
        found |= {line.removeprefix("RANK="): int(child) for line in environment if line.startswith("RANK=")}
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes by Linux's /proc")
def test_a_command_trains_on_two_processes_and_goes_on_with_one(models, tmp_path):
    """One of them is told to stop, all do, and what is saved is that of one and the same step."""
    sections = {"optim": {"schedule": "constant"}, "save": {"every": 0}, "eval": {"num_prompts": 4}}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe(*models, tmp_path / "run", steps=500, **sections)))
    (tmp_path / "stopped.py").write_text(STOPPED)
    line = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", str(tmp_path / "stopped.py"), "train", str(path)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        deadline = time.monotonic() + 900
        while len(rows(tmp_path / "run", "metrics")) < 2:
            assert running.poll() is None, running.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(processes_under(running.pid)["1"], signal.SIGTERM)
        _, said = running.communicate(timeout=900)
    assert "continue it with: kibitz train" in said
    (saved,) = checkpoint.checkpoints(tmp_path / "run")
    done = int(saved.name.removeprefix("step-"))
    assert checkpoint.damage(saved) is None
    assert done == 3

    program = "from kibitz.cli import main; main()"
    line = [sys.executable, "-c", program, "train", str(path), "--resume", f"steps={done + 1}", "--quiet", "--json"]
    answer = subprocess.run(line, capture_output=True, text=True, timeout=900)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["steps"] == done + 1
    whole = kibitz.train(recipe(*models, tmp_path / "whole", steps=done + 1, **sections))
    assert [_numbers(row) for row in rows(tmp_path / "run", "metrics")] == [
        pytest.approx(_numbers(row), rel=1e-5, abs=1e-5) for row in whole.metrics
    ]


# ------------------------------------------------------------------ two hosts


def ip(*words: str) -> bool:
    return subprocess.run(["ip", *words], capture_output=True, check=False).returncode == 0


@pytest.fixture
def hosts() -> Iterator[dict[str, str]]:
    """Two network namespaces, each with an address of its own and a wire between them; names by address."""
    if shutil.which("ip") is None:
        pytest.skip("there is no `ip` to make network namespaces with")
    names = [f"kibitz-{side}-{os.getpid()}" for side in "ab"]
    ends = [f"kb{side}{os.getpid() % 100000}" for side in "ab"]
    addresses = ["10.213.77.1", "10.213.77.2"]
    try:
        if not all(ip("netns", "add", name) for name in names):
            pytest.skip("network namespaces are not permitted here")
        if not ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1]):
            pytest.skip("virtual network cards are not permitted here")
        for name, end, address in zip(names, ends, addresses, strict=True):
            assert ip("link", "set", end, "netns", name)
            assert ip("-n", name, "link", "set", end, "name", "wire")
            assert ip("-n", name, "address", "add", f"{address}/24", "dev", "wire")
            assert ip("-n", name, "link", "set", "wire", "up")
            assert ip("-n", name, "link", "set", "lo", "up")
        yield dict(zip(addresses, names, strict=True))
    finally:
        for name in names:
            ip("netns", "delete", name)  # and with it the card inside


@pytest.mark.slow
def test_two_hosts_give_the_run_of_one_process(hosts, models, tmp_path):
    (tmp_path / "together").mkdir()
    (tmp_path / "jobs.json").write_text(json.dumps([_job(models, tmp_path / "together", "opd")]))
    first = next(iter(hosts))
    running = []
    for place, name in enumerate(hosts.values()):
        line = ["ip", "netns", "exec", name, *TORCHRUN, "--nnodes", "2", "--node-rank", str(place)]
        line += ["--nproc-per-node", "1", "--master-addr", first, "--master-port", "29500"]
        line += [str(WORKER), str(tmp_path / "jobs.json")]
        options = {"env": os.environ | {"GLOO_SOCKET_IFNAME": "wire"}, "stderr": subprocess.PIPE, "text": True}
        running.append(subprocess.Popen(line, stdout=subprocess.PIPE, **options))
    answers = [process.communicate(timeout=900) for process in running]
    assert [process.returncode for process in running] == [0, 0], "\n".join(said[-4000:] for _, said in answers)
    assert all("done" in out for out, _ in answers)
    train(_job(models, tmp_path, "opd"))
    assert_same_run(tmp_path / "together" / "opd", tmp_path / "opd")


# ------------------------------------------------------------------ what one process can be asked


def test_alone_everything_is_trivial():
    ranks = Ranks()
    assert ranks.is_main
    assert ranks.gather(3) == [3]
    assert ranks.first(lambda: 3) == 3
    assert ranks.part([1, 2, 3]) == [1, 2, 3]
    assert ranks.in_shares(lambda part: [2 * one for one in part], [1, 2]) == [2, 4]
    assert ranks.with_all(sorted, [2, 1]) == [1, 2]
    assert join(ParallelConfig(), torch.device("cpu")) == (ranks, torch.device("cpu"))


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_parts_are_even_and_together_are_the_whole(size):
    items = list(range(17))
    parts = [Ranks(rank, size).part(items) for rank in range(size)]
    assert [item for part in parts for item in part] == items
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("config", [{"shard": 2}, {"replicate": 2}, {"shard": 2, "replicate": 3}])
def test_a_division_that_is_not_that_of_the_processes_is_refused(config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="is not the number of processes, 3"):
        join(ParallelConfig(**config), torch.device("cpu"))


@pytest.mark.slow
def test_servers_write_and_score_for_two_processes_as_for_one(models, tmp_path):
    """The set-up of many machines: the student in several processes, rollouts and teacher behind servers."""
    method = {"support": "top_k", "top_k_of": "teacher", "top_k": 8}
    for num, name in enumerate(("one", "two"), 1):
        with Stub(models[0], name="student") as writer, Stub(models[1]) as teacher:
            rollout = {"engine": "vllm", "urls": [writer.url], "prompts_per_step": 5, "server": {"patience": 600.0}}
            job = _job(models, tmp_path, name, method=method, rollout=rollout)
            job["recipe"]["teacher"] = {"url": teacher.url, "patience": 600.0}
            in_parts = copy.deepcopy(job)
            in_parts["recipe"] |= {"output": str(tmp_path / "in_parts"), "parallel": {"whole_copy": False}}
            train(job) if num == 1 else torchrun(2, [job, in_parts], tmp_path)
            reloads = [path for path, _, _ in writer.asked if path == "/collective_rpc"]
            assert len(reloads) >= num * STEPS, "each step's weights reach the server, once for all processes"
    one, *others = (rows(tmp_path / name, "metrics") for name in ("one", "two", "in_parts"))
    for other in others:
        assert len(one) == len(other) == STEPS
        for ours, theirs in zip(one, other, strict=True):
            for key in ("loss", "reverse_kl", "grad_norm", "response_tokens", "num_tokens"):
                assert theirs[key] == pytest.approx(ours[key], abs=1e-4), key
    assert one[0]["loss"] > 0


@pytest.mark.slow
def test_a_student_in_parts_is_sent_one_weight_after_another_and_all_processes_gather(models, tmp_path):
    """By the channel of `sync: nccl`, whose broadcast a request for each weight stands for. The rollouts of later steps, and the
    probe after each sync, are those of a server that has the weights."""
    rollout = {"engine": "vllm", "prompts_per_step": 5}
    one = _job(models, tmp_path, "one", rollout=rollout)
    two = _job(models, tmp_path, "two", rollout=rollout, parallel={"whole_copy": False})
    for job, sync in ((one, "reload"), (two, "nccl")):
        with Stub(models[0], name="student", bend=(receiver := Receiver())) as writer:
            receiver.stub = writer
            job["recipe"]["rollout"] |= {"urls": [writer.url], "server": {"patience": 600.0, "sync": sync}}
            train(job) if sync == "reload" else torchrun(2, [job | {"stand_in": True}], tmp_path)
            paths = [path for path, _, _ in writer.asked]
    assert paths.count("/init_weight_transfer_engine") == 1 and "/collective_rpc" not in paths
    assert paths.count("/finish_weight_update") == STEPS + 1, "at the start and after each step, once for all processes"
    assert not list(tmp_path.glob("two/weights/version-*"))
    ours, theirs = (rows(tmp_path / name, "metrics") for name in ("one", "two"))
    assert [row["sync"]["way"] for row in theirs] == ["nccl"] * STEPS
    for alone, together in zip(ours, theirs, strict=True):
        for key in ("loss", "reverse_kl", "grad_norm", "response_tokens", "num_tokens"):
            assert together[key] == pytest.approx(alone[key], abs=1e-4), key


@pytest.mark.slow
def test_processes_wait_for_their_checkpoints_whatever_was_asked_for(models, tmp_path):
    """Each writes its part of the optimizer, in step with the others."""
    save = {"every": 1, "keep": 9}
    made = [
        _job(models, tmp_path, name, save={**save, "background": behind})
        for name, behind in (("asked", True), ("not-asked", False))
    ]
    torchrun(2, made, tmp_path)
    for asked, other in zip(*(checkpoint.checkpoints(tmp_path / name) for name in ("asked", "not-asked")), strict=True):
        assert asked.name == other.name and checkpoint.damage(asked) is None
    assert asked.name == f"step-{STEPS:06d}"
