"""Sharded models, as far as one process can see: loading on meta, files, joined collectives, and what is refused."""

import json
import random
import threading

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from support.folders import CHANGES, changed
from support.models import make_model, tokenizer
from support.runs import recipe
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM

from kibitz import config
from kibitz.config import LoraConfig, ModelConfig, StudentConfig
from kibitz.models import lora
from kibitz.models.load import load_student
from kibitz.parallel import fsdp, lockstep, sharded_files
from kibitz.parallel.ranks import Ranks, plain
from kibitz.training import meeting


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("models")
    make_model(home / "tied", tie_word_embeddings=True)
    return {"tied": home / "tied", "apart": make_model(home / "apart")}


# ------------------------------------------------------------------ on the meta device


@pytest.mark.parametrize("name", ["tied", "apart"])
def test_a_model_without_weights_is_the_same_but_for_them(folders, name):
    real = AutoModelForCausalLM.from_pretrained(folders[name])
    bare = fsdp._on_meta(ModelConfig(model=str(folders[name])), torch.float32)
    assert {p.device.type for p in bare.parameters()} == {"meta"}
    shapes = [{n: (p.shape, p.dtype) for n, p in model.named_parameters()} for model in (real, bare)]
    assert shapes[0] == shapes[1]
    buffers = dict(real.named_buffers())
    assert buffers
    assert all(torch.equal(buffer, buffers[n]) for n, buffer in bare.named_buffers())
    assert bare.generation_config.to_dict() == real.generation_config.to_dict()


@pytest.mark.parametrize("name", ["tied", "apart"])
def test_files_fill_what_had_no_weights(folders, name):
    """All parameters are read, tied ones too: one that is not would be NaN."""
    bare = fsdp._on_meta(ModelConfig(model=str(folders[name])), torch.float32)
    stored = fsdp._match(bare, fsdp._weight_files(str(folders[name])), name)
    bare._apply(lambda t: torch.full_like(t, float("nan"), device="cpu") if t.device.type == "meta" else t)
    bare.tie_weights()
    fsdp._fill(bare, stored)
    real = AutoModelForCausalLM.from_pretrained(folders[name]).state_dict()
    assert all(torch.equal(tensor, real[n]) for n, tensor in bare.state_dict().items())


@pytest.mark.parametrize("name", ["tied", "apart"])
def test_what_is_to_be_sharded_is_copied_without_weights(folders, name):
    """In float32, and no number of the student's is copied: what was tied is tied, what was frozen is frozen."""
    config = StudentConfig(model=str(folders[name]), dtype="bfloat16", lora=LoraConfig(rank=2))
    student = load_student(config, torch.device("cpu"), tokenizer()).model if name == "apart" else None
    model = student or AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.bfloat16)
    bare = fsdp._without_weights(model)
    assert {(p.device.type, p.dtype) for p in bare.parameters()} == {("meta", torch.float32)}
    assert [(n, p.shape, p.requires_grad) for n, p in bare.named_parameters()] == [
        (n, p.shape, p.requires_grad) for n, p in model.named_parameters()
    ]
    heads = bare.get_input_embeddings().weight, bare.get_output_embeddings().weight
    assert (heads[0] is heads[1]) is (name == "tied")
    assert all(torch.equal(buffer, dict(bare.named_buffers())[n]) for n, buffer in model.named_buffers())


def test_other_threads_keep_their_parameters():
    """Two threads build at once: the one on meta, the other with numbers."""
    built, entered, left = {}, threading.Event(), threading.Event()

    def other():
        entered.wait(timeout=300)
        built["other"] = torch.nn.Linear(3, 2)
        left.set()

    thread = threading.Thread(target=other)
    thread.start()
    with fsdp._parameters_on_meta():
        entered.set()
        assert left.wait(timeout=300)
        built["meta"] = torch.nn.Linear(3, 2)
    thread.join()
    built["after"] = torch.nn.Linear(3, 2)
    assert {name: module.weight.device.type for name, module in built.items()} == {
        "meta": "meta", "other": "cpu", "after": "cpu"
    }  # fmt: skip


@pytest.fixture
def one_process(tmp_path):
    """A process group of one, in which everything is sharded as in several."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield Ranks(0, 1, init_device_mesh("cpu", (1,), mesh_dim_names=("shard",)))
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["tied", "apart"])
def test_sharded_models_are_finished_and_compute_what_others_do(folders, one_process, name, tmp_path):
    """The head is checked on the weights, the bare model is called as engines call it, and what is saved is the same."""
    config, cpu = StudentConfig(model=str(folders[name])), torch.device("cpu")
    plain, ids_BL = load_student(config, cpu, tokenizer()), torch.tensor([[1, 5, 6, 7]])
    student = fsdp.load_sharded(config, cpu, tokenizer(), 0, None, one_process)
    frozen = fsdp.load_frozen(config, "teacher", cpu, one_process, "x")
    for model in (student, frozen):
        assert model.head_stands_alone and model.num_parameters == plain.num_parameters
        with torch.no_grad():
            want, logits = plain.model(ids_BL).logits, model.model(ids_BL).logits
            head = model.within(lambda model=model: model.head(model.hidden(ids_BL)))
        assert torch.equal(logits, want) and torch.equal(head, want[..., : plain.vocab_size])
    for model, folder in ((plain, tmp_path / "plain"), (student, tmp_path / "sharded")):
        folder.mkdir()
        model.save(folder)
    one, other = (load_file(tmp_path / folder / "model.safetensors") for folder in ("plain", "sharded"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_an_adapter_on_a_base_without_weights_begins_as_any_other(folders):
    options = LoraConfig(rank=4)
    whole = load_student(
        StudentConfig(model=str(folders["apart"]), lora=options), torch.device("cpu"), tokenizer(), seed=5
    )
    bare = fsdp._on_meta(ModelConfig(model=str(folders["apart"])), torch.float32)
    with fsdp._zero_stride_weights(bare):
        lora.attach(bare, options, seed=5)
    adapted = {n: p for n, p in whole.model.named_parameters() if p.requires_grad}
    assert adapted
    for name, parameter in bare.named_parameters():
        assert parameter.requires_grad == (name in adapted)
        assert parameter.device.type == ("cpu" if name in adapted else "meta")
        assert name not in adapted or torch.equal(parameter, adapted[name])


def test_files_with_other_names_than_the_model_are_refused(folders, tmp_path):
    weights = load_file(folders["apart"] / "model.safetensors")
    save_file({n.replace("q_proj", "query"): t for n, t in weights.items()}, tmp_path / "model.safetensors")
    bare = fsdp._on_meta(ModelConfig(model=str(folders["apart"])), torch.float32)
    with pytest.raises(ValueError, match=r"does not store model\.layers\.0\.self_attn\.q_proj.*whole_copy=true"):
        fsdp._match(bare, [tmp_path / "model.safetensors"], "x")


def test_files_with_other_shapes_than_the_model_are_refused(folders):
    bare = fsdp._on_meta(ModelConfig(model=str(folders["apart"])), torch.float32)
    stored = fsdp._match(bare, fsdp._weight_files(str(folders["apart"])), "x")
    bare._apply(lambda t: t.new_empty(*t.shape[:-1], t.shape[-1] + 1, device="cpu"))
    with pytest.raises(ValueError, match="is stored where"):
        fsdp._fill(bare, stored)


@pytest.mark.parametrize("change", CHANGES)
def test_no_tensor_of_a_sharded_model_can_be_changed_silently(change, folders, one_process, tmp_path):
    """Each fifth tensor, of all kinds, as student and as teacher."""
    names = sorted(load_file(folders["apart"] / "model.safetensors"))
    for number, name in enumerate(names[::5]):
        folder = str(
            changed(folders["apart"], tmp_path / str(number), lambda tensors, name=name: change(tensors, name))
        )
        with pytest.raises(ValueError, match=r"student\.model: |parallel\.whole_copy=true"):
            fsdp.load_sharded(StudentConfig(model=folder), torch.device("cpu"), tokenizer(), 0, None, one_process)
        with pytest.raises(ValueError, match=r"teacher\.model: |shard_teacher=false"):
            fsdp.load_frozen(ModelConfig(model=folder), "teacher", torch.device("cpu"), one_process, fsdp.WHOLE_TEACHER)


def test_a_sharded_tensor_of_another_float_dtype_keeps_its_numbers(folders, one_process, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"

    def halve(tensors):
        tensors[name] = tensors[name].half()

    folder = changed(folders["apart"], tmp_path / "m", halve)
    model = fsdp.load_frozen(ModelConfig(model=str(folder)), "teacher", torch.device("cpu"), one_process, "x")
    assert torch.equal(plain(model.model.state_dict()[name]), load_file(folder / "model.safetensors")[name].float())


def test_an_index_that_leaves_the_folder_is_not_followed(folders, tmp_path):
    folder = changed(folders["apart"], tmp_path / "m", lambda tensors: None)
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(names, "../a.safetensors")})
    )
    with pytest.raises(ValueError, match="outside of the folder"):
        fsdp._weight_files(str(folder), "teacher")


@pytest.mark.parametrize("size", [1, 10_000, 2**30])
def test_files_of_bounded_size_are_one_model(folders, tmp_path, monkeypatch, size):
    """Also where each tensor is larger than a file may be."""
    monkeypatch.setattr(sharded_files, "FILE_BYTES", size)
    real = AutoModelForCausalLM.from_pretrained(folders["apart"])
    sharded_files.write_whole(real.named_parameters(), tmp_path)
    real.config.save_pretrained(tmp_path)
    files = list(tmp_path.glob("*.safetensors"))
    assert (len(files) == 1) == (size == 2**30)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, again[n]) for n, tensor in real.state_dict().items())


# ------------------------------------------------------------------ collectives that one process needs


@pytest.mark.parametrize("num", [2, 5])
def test_all_join_the_same_collectives_however_unequal_their_needs_are(num, monkeypatch):
    """Threads stand for processes: each needs other collectives, and all take part in the same ones in the same order."""
    draws, done = random.Random(num), [[] for _ in range(num)]
    said, gate, mine = [0] * num, threading.Barrier(num, timeout=300), threading.local()

    def highest(number):
        said[mine.rank] = number
        gate.wait()
        most = max(said)
        gate.wait()
        return most

    monkeypatch.setattr(lockstep, "_highest", highest)

    def process(rank, needs):
        mine.rank = rank
        own = lockstep.Lockstep()
        calls = [own.register(lambda collective=collective: done[rank].append(collective)) for collective in range(3)]
        for needed in needs:
            for collective in needed:
                calls[collective]()
                done[rank].append(collective)
            own.wait()

    needs = [[draws.choices(range(3), k=draws.randrange(6)) for _ in range(4)] for _ in range(num)]
    threads = [threading.Thread(target=process, args=pair) for pair in enumerate(needs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(one == done[0] for one in done)
    assert len(done[0]) >= max(sum(map(len, needed)) for needed in needs)


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"student": {"trust_remote_code": True}}, "trust_remote_code"),
        ({"teacher": {"student": "start"}}, "teacher.student"),
        (
            {"method": {"type": "opd", "reference_kl": 0.1, "reference": {"model": "x", "compile": True}}},
            "reference.compile",
        ),
    ],
)
def test_what_needs_a_whole_student_is_refused(folders, tmp_path, sections, said):
    teacher = None if "teacher" in sections else folders["tied"]
    tree = recipe(folders["apart"], teacher, tmp_path / "run", parallel={"whole_copy": False}, **sections)
    with pytest.raises(config.RecipeError, match=said):
        meeting._check_parts(config.load(tree, []))


def test_adapters_and_quantized_weights_are_refused(folders, tmp_path):
    student = load_student(
        StudentConfig(model=str(folders["apart"]), lora=LoraConfig()), torch.device("cpu"), tokenizer()
    )
    student.save(tmp_path / "adapter")
    with pytest.raises(config.RecipeError, match="--merge"):
        fsdp.check_shardable(StudentConfig(model=str(tmp_path / "adapter")), "student")
    real = AutoModelForCausalLM.from_pretrained(folders["apart"])
    real.config.quantization_config = {"quant_method": "fp8"}
    real.config.save_pretrained(tmp_path / "small")
    with pytest.raises(config.RecipeError, match="quantized"):
        fsdp.check_shardable(StudentConfig(model=str(tmp_path / "small")), "teacher")
    fsdp.check_shardable(StudentConfig(model=str(folders["apart"])), "student")
