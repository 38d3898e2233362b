"""What goes wrong for a person is one sentence and exit code 2, in every command; what goes wrong in kibitz is a short report."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from safetensors.torch import load_file, save_file
from support.cli import assert_refused, kibitz_says
from typer.testing import CliRunner

import kibitz
from kibitz import worlds
from kibitz.cli import Commands, mistakes, options

PROGRAM = [sys.executable, "-m", "kibitz"]
STUDENT = str(worlds.get("arithmetic").checkpoint("student"))


@pytest.fixture
def recipe(tmp_path, small_models) -> Path:
    """A run of one step on random models and a toy world."""
    tree = {
        "student": {"model": str(small_models / "student")},
        "teacher": {"model": str(small_models / "teacher")},
        "data": {"world": "arithmetic", "limit": 8},
        "rollout": {"prompts_per_step": 2, "max_tokens": 4},
        "eval": {"every": 0, "num_prompts": 2, "heatmaps": 0},
        "threads": 1,
        "steps": 1,
        "output": str(tmp_path / "run"),
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(tree), encoding="utf-8")
    return path


# ------------------------------------------------------------------ a path that is not what it should be

READERS = {
    "train": ["train", "PATH", "--quiet"],
    "check": ["check", "PATH", "--quiet"],
    "serve": ["serve", "PATH"],
    "eval": ["eval", "PATH", "--world", "arithmetic"],
    "eval --prompts": ["eval", STUDENT, "--prompts", "PATH"],
    "score --student": ["score", "--student", "PATH", "--prompt", "1+1"],
    "score --teacher": ["score", "--teacher", "PATH", "--prompt", "1+1"],
    "score --rollouts": ["score", "--rollouts", "PATH", "--out", "scores"],
    "export": ["export", "PATH", "--output", "copy"],
    "chat": ["chat", "PATH"],
    "report": ["report", "PATH"],
    "demo": ["demo", "--models", "PATH", "--output", "demo-run", "--quiet"],
    "reproduce": ["reproduce", "kl-direction", "--quick", "--student", "PATH", "--output", "results", "--quiet"],
}


@pytest.mark.parametrize("kind", ["missing", "missing.jsonl", "empty.jsonl", "binary.jsonl", "folder", "folder.yaml"])
@pytest.mark.parametrize("command", READERS)
def test_a_path_that_cannot_be_read(command, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / kind
    if kind.startswith("folder"):
        path.mkdir()
    elif kind == "empty.jsonl":
        path.touch()
    elif kind == "binary.jsonl":
        path.write_bytes(bytes(range(256)) * 8)
    assert_refused(kibitz_says(*(path if word == "PATH" else word for word in READERS[command])), kind)


WRITERS = {
    "train": ["train", "RECIPE", "output=PATH", "--quiet"],
    "demo": ["demo", "--output", "PATH", "--quiet"],
    "score --html": ["score", "--prompt", "1+1", "--response", "2", "--html", "PATH"],
    "score --out": ["score", "--rollouts", "ROLLOUTS", "--out", "PATH"],
    "export": ["export", STUDENT, "--output", "PATH"],
    "schema": ["schema", "--output", "PATH"],
    "worlds make": ["worlds", "make", "arithmetic", "--output", "PATH", "--quiet"],
    "reproduce": ["reproduce", "kl-direction", "--quick", "--output", "PATH", "--quiet"],
}


@pytest.mark.parametrize("command", WRITERS)
def test_a_path_that_cannot_be_written(command, recipe, tmp_path, monkeypatch):
    """Below a file there is room for nothing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    stored = tmp_path / "stored.jsonl"
    row = {"prompt_key": "a", "prompt_ids": [3, 4], "sample": 0, "response_ids": [5], "logp": [-1.0], "finished": True}
    stored.write_text(json.dumps(row) + "\n")
    places = {"PATH": tmp_path / "file" / "inside", "RECIPE": recipe, "ROLLOUTS": stored}
    words = [
        str(places.get(word, word)).replace("output=PATH", f"output={places['PATH']}") for word in WRITERS[command]
    ]
    assert_refused(kibitz_says(*words), "file")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk(tmp_path):
    assert_refused(kibitz_says("schema", "--output", "/dev/full"), "the disk is full")
    with Path("/dev/full").open("w") as full:
        said = subprocess.run([*PROGRAM, "worlds"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (said.returncode, said.stderr) == (2, f"error: {mistakes.FULL}\n")


def test_no_permission(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o500)
    assert_refused(kibitz_says("schema", "--output", tmp_path / "schema.json"), "permission", tmp_path)


# ------------------------------------------------------------------ a line that is not what it should be


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["trian"], ["'trian'", "'train'"]),
        (["worlds", "shw"], ["'shw'", "'show'"]),
        (["train"], ["missing argument", "`kibitz train --help`"]),
        (["train", "r.yaml", "--overwrit"], ["--overwrit", "--overwrite", "`kibitz train --help`"]),
        (["worlds", "show", "arithmetic", "--count", "many"], ["--count", "`kibitz worlds show --help`"]),
        (["score", "--temperature", "-1", "--prompt", "1"], ["--temperature", "`kibitz score --help`"]),
        (["worlds", "show", "arithmetic", "--split", "tset"], ["'tset'", "test"]),
        (["reproduce", "kl-directon"], ["kl-directon", "kl-direction"]),
        (["reproduce", "kl-direction", "--only", "odp"], ["'odp'", "opd"]),
        (["eval", STUDENT], ["--world", "--prompts"]),
        (["export", STUDENT], ["--output"]),
    ],
)  # fmt: skip
def test_a_mistyped_line(line, words):
    assert_refused(kibitz_says(*line), *words)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "CPU", "meta", "tpu"])
def test_a_device_that_is_not_there(recipe, device):
    assert_refused(kibitz_says("train", recipe, f"device={device}", "--quiet"), "device", device, "cpu")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("track=wandb", ["track", "write track.to=wandb"]),
        ("track.to=wnadb", ["track.to", "'wandb'"]),
        ("method=opd", ["write method.type=opd"]),
        ("student=here", ["write student.model=here"]),
        ("teacher=here", ["write teacher.model=here"]),
        ("eval=[]", ["eval: a section is needed"]),
    ],
)  # fmt: skip
def test_a_section_that_is_one_word(recipe, override, words):
    assert_refused(kibitz_says("train", recipe, override, "--quiet"), *words)


def test_half_a_character_in_the_data(recipe, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "1+\\ud800", "answer": "2"}\n')
    assert_refused(kibitz_says("eval", STUDENT, "--prompts", prompts), "line 1", "surrogate")
    prompts.write_text('{"prompt": "1", "x": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    assert_refused(kibitz_says("eval", STUDENT, "--prompts", prompts), "line 1", "deep")


# ------------------------------------------------------------------ a model that is not what it should be


def edited(**values: object):
    def edit(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return edit


def of_bytes(content: bytes):
    return lambda path: path.write_bytes(content)


def with_nan(path: Path) -> None:
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


def template(text: str):
    return of_bytes(text.encode())


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
FAULTS = {
    "NaN": ("model.safetensors", with_nan, ["NaN"]),
    "weights that are none": ("model.safetensors", of_bytes(b"x" * 100), ["not a model"]),
    "weights without a byte": ("model.safetensors", of_bytes(b""), ["not a model"]),
    "broken config": ("config.json", of_bytes(b"{"), ["config.json is not JSON"]),
    "deep config": ("config.json", of_bytes(b"[" * 100_000), ["config.json is not JSON"]),
    "config of something else": ("config.json", of_bytes(b"[1]"), ["not a model"]),
    "broken tokenizer": ("tokenizer.json", of_bytes(b"{"), ["tokenizer.json is not JSON"]),
    "deep tokenizer": ("tokenizer.json", of_bytes(b"[" * 100_000), ["tokenizer.json is not JSON"]),
    "broken tokenizer config": ("tokenizer_config.json", of_bytes(b"no"), ["tokenizer_config.json is not JSON"]),
    "no tokenizer": (
        "tokenizer.json",
        lambda path: [p.unlink() for p in path.parent.glob("*token*")],
        ["no tokenizer"],
    ),
    "an end that is a word": ("config.json", edited(eos_token_id="x"), ["eos_token_id"]),
    "a size that is a word": ("config.json", edited(hidden_size="x"), ["hidden_size"]),
    "a template that refuses": ("chat_template.jinja", template("{{ raise_exception('no thanks') }}"), ["no thanks"]),
    "a template that is none": ("chat_template.jinja", template("{% for x in"), ["chat template"]),
    "a template of wrong types": ("chat_template.jinja", template("{{ messages + 3 }}"), ["chat template"]),
    "a template that calls itself": (
        "chat_template.jinja",
        template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
        ["chat template", "without end"],
    ),
    "a template of gigabytes": ("chat_template.jinja", template("{{ 'x' * 10**10 }}"), ["chat template", "memory"]),
}
LOADERS = {
    "train": ["train", "RECIPE", "student.model=MODEL", "--quiet"],
    "check": ["check", "RECIPE", "student.model=MODEL", "--quiet"],
    "eval": ["eval", "MODEL", "--world", "arithmetic", "eval.num_prompts=2"],
    "score": ["score", "--student", "MODEL", "--prompt", "1+1"],
    "chat": ["chat", "MODEL"],
}


def assert_model_refused(loader: str, fault: str, recipe: Path, tmp_path: Path) -> None:
    name, break_it, words = FAULTS[fault]
    model = tmp_path / "model"
    shutil.copytree(STUDENT, model)
    break_it(model / name)
    line = [str(recipe) if word == "RECIPE" else word.replace("MODEL", str(model)) for word in LOADERS[loader]]
    assert_refused(kibitz_says(*line, input="1+1\n"), *words)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_model_that_cannot_be_loaded(fault, recipe, tmp_path):
    assert_model_refused("train", fault, recipe, tmp_path)


@pytest.mark.parametrize("fault", ["NaN", "broken tokenizer", "no tokenizer", "a template that refuses"])
@pytest.mark.parametrize("loader", [name for name in LOADERS if name != "train"])
def test_every_command_refuses_it(loader, fault, recipe, tmp_path):
    assert_model_refused(loader, fault, recipe, tmp_path)


@pytest.mark.slow
def test_a_template_that_loops_is_stopped(recipe, tmp_path, monkeypatch):
    monkeypatch.setitem(FAULTS, "loop", ("chat_template.jinja", template(LOOP), ["chat template", "come to an end"]))
    assert_model_refused("train", "loop", recipe, tmp_path)


@pytest.mark.parametrize("command", [["chat"], ["eval", "--world", "arithmetic"], ["export", "--output", "copy"]])
def test_a_name_that_is_a_place_is_refused_without_the_hub(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for name in ("runs/nothing", "mine/nothing", "./nothing", "/nothing", "a/b/c"):
        assert_refused(kibitz_says(command[0], name, *command[1:]), f"there is no model folder at {name}")


# ------------------------------------------------------------------ missing packages, memory, and what nobody foresaw


@pytest.mark.parametrize(("package", "extra"), mistakes.EXTRAS.items())
def test_a_missing_package_names_its_extra(package, extra):
    said = mistakes.sentence(ModuleNotFoundError(f"No module named '{package}'", name=f"{package}.inside"))
    assert said == f"the package {package} is missing: pip install 'kibitz[{extra}]'"


def test_the_extras_are_those_of_the_package():
    from importlib import metadata

    assert set(mistakes.EXTRAS.values()) <= set(metadata.metadata("kibitz").get_all("Provides-Extra"))


def test_memory_and_connections_are_named():
    assert mistakes.sentence(MemoryError()) == mistakes.OUT_OF_MEMORY
    assert mistakes.sentence(RuntimeError("DefaultCPUAllocator: can't allocate memory")) == mistakes.OUT_OF_MEMORY
    assert mistakes.sentence(ConnectionRefusedError("nobody listens at port 1")) == "nobody listens at port 1"


def broken(*args: str, error: type[Exception] = RuntimeError):
    """A command of kibitz that fails as no command should."""
    program = typer.Typer(cls=Commands, pretty_exceptions_enable=False)
    program.callback()(options)

    @program.command()
    def fall(ctx: typer.Context) -> None:
        with ctx.obj.bar():
            raise error("the sky\nis falling")

    @program.command()
    def stand() -> None: ...

    return CliRunner().invoke(program, ["fall", *args])


@pytest.mark.parametrize("error", [RuntimeError, ValueError, KeyError, AssertionError, ZeroDivisionError])
def test_an_error_that_nobody_foresaw_is_a_short_report(error):
    """A ValueError too, where it was not kibitz that raised it: Python's own say nothing about what a person did."""
    answer = broken("--quiet", error=error)
    assert (answer.exit_code, answer.stdout) == (1, "")
    first, second, third = answer.stderr.splitlines()
    assert first.startswith("error: kibitz fall failed while loading, which is a fault of kibitz: " + error.__name__)
    assert "the sky" in first
    assert f"kibitz {kibitz.__version__}, torch " in second
    assert "--debug" in third and "KIBITZ_DEBUG=1" in third
    assert "Traceback" not in answer.stderr


def test_debug_shows_the_traceback(monkeypatch):
    assert isinstance(broken("--debug").exception, RuntimeError)
    monkeypatch.setenv("KIBITZ_DEBUG", "1")
    assert isinstance(broken().exception, RuntimeError)


# ------------------------------------------------------------------ Ctrl-C, and a reader that goes away


@pytest.mark.skipif(os.name != "posix", reason="signals are sent the POSIX way")
def test_ctrl_c_while_chat_waits():
    running = subprocess.Popen(
        [*PROGRAM, "chat", STUDENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert running.stdin is not None and running.stdout is not None
    running.stdin.write("1+1\n")
    running.stdin.flush()
    running.stdout.readline()  # it has answered, so that it waits now
    running.stdout.readline()
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=600)
    assert (running.returncode, said) == (130, "error: stopped\n")


@pytest.mark.skipif(os.name != "posix", reason="pipes of the shell")
@pytest.mark.parametrize(
    "line", ["worlds show arithmetic --count 5000", "schema", "worlds show arithmetic --count 5000 --json"]
)
def test_a_reader_that_goes_away_is_nobodys_mistake(line):
    with subprocess.Popen([*PROGRAM, *line.split()], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None and running.stderr is not None
        running.stdout.read(10)
        running.stdout.close()
        assert running.stderr.read() == b""


@pytest.mark.skipif(os.name != "posix", reason="closing a stream the shell's way")
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-"])
def test_streams_may_be_closed(closed):
    said = subprocess.run(f"{sys.executable} -m kibitz worlds {closed}", shell=True, capture_output=True, text=True)
    assert (said.returncode, said.stderr) == (0, "")
