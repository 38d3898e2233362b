"""Every command on every page: it is run in a folder that has what pages speak of, or is excused with a reason.

All of them, those within sentences too, are compared with the real command line."""

import shutil
from pathlib import Path

import pytest
from support.commands import COMMAND, Command, commands, mistake, run
from support.newcomer import prepare
from support.pages import FENCE, PAGES, fences, page, spans

SHORTER = {
    "kibitz init": ("mine.yaml",),
    "kibitz demo": ("steps=2", "data.limit=64", "rollout.prompts_per_step=4", "eval.num_prompts=8"),
    "kibitz train runs/toy/recipe.yaml steps=6 --resume": ("steps=3",),
    "kibitz score --student S --teacher T --prompts": ("--num-prompts", "4", "rollout.max_tokens=16"),
    "kibitz score --world": ("--num-prompts", "8"),
    "kibitz train runs/diagnosis/recipe.yaml": (
        "steps=1",
        "data.limit=8",
        "rollout.prompts_per_step=4",
        "eval.num_prompts=4",
    ),
    "kibitz control rpd": ("steps=256", "ppo.num_steps=32", "eval.episodes=1", "eval.last=1", "eval.frames=0"),
    "kibitz control distil": (
        "method.iterations=1",
        "method.steps=50",
        "eval.episodes=1",
        "eval.last=1",
        "eval.frames=0",
    ),
    "kibitz control report": ("steps=256", "ppo.num_steps=32", "eval.episodes=1", "eval.last=1", "eval.frames=0"),
}
"""How a command begins, and what is written behind it here, so that it takes seconds and replaces no file that is there."""

SIZED = "needs a GPU and models of the hub; tests/config/test_recipes.py trains every recipe with random ones"
REPRODUCED = "runs for minutes to hours; tests/experiments runs every experiment with --quick"
EXCUSED = {
    "python3 -m venv .venv": "makes an environment; tests/test_package.py makes one and installs into it",
    "kibitz check recipes/reasoning-opd.yaml --memory 80 --teraflops 800 --price 2.50": "reads models of the hub; "
    "tests/config/test_recipes.py checks the recipe with random ones",
    "kibitz train recipes/reasoning-opd.yaml student.model=path-or-hub-name output=runs/mine": "the same",
    "python -c import torch; print(torch.cuda.get_device_name())": "needs a GPU",
    "kibitz check recipes/full-80gb.yaml --price 2.50": SIZED,
    "kibitz train recipes/full-80gb.yaml --resume": SIZED,
    "torchrun --standalone --nproc-per-node 8 -m kibitz train recipes/full-8x80gb.yaml --resume": SIZED,
    "kibitz reproduce methods --output runs/mine": REPRODUCED,
    "kibitz reproduce methods-navigation --output runs/mine": REPRODUCED,
    "kibitz reproduce methods --only opd,grpo": REPRODUCED,
    "kibitz reproduce methods --quick": REPRODUCED,
    "kibitz reproduce methods --student S --teacher T --prompts p.jsonl optim.lr=5e-5 rollout.max_tokens=1024": REPRODUCED,
    "torchrun --nnodes 2 --node-rank 0 --nproc-per-node 8 --master-addr 10.0.0.1 --master-port 29500 -m kibitz train recipe.yaml "
    "--resume": "needs two machines; tests/parallel starts two processes of one",
    "srun torchrun --nnodes $SLURM_NNODES --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint $(scontrol show hostnames "
    "$SLURM_JOB_NODELIST | head -1):29500 -m kibitz train recipe.yaml --resume": "needs Slurm",
    "kibitz export runs/lora --merge --output merged --push OWNER/NAME": "uploads; tests/cli does it to a stub",
    "kibitz eval runs/lora --tasks gsm8k,ifeval": "fetches benchmarks from the hub; the page's own task runs",
    "kibitz eval Qwen/Qwen3-1.7B --tasks gsm8k --url http://127.0.0.1:8000 eval.num_prompts=200": "needs a server of that "
    "model; tests/evaluate/test_harness.py has a stub",
}
"""Commands that are not run here, each with the reason."""

EXCUSED_PROGRAMS = {
    "make": "its targets are compared with the Makefile",
    "pip": "installs; its extras are compared with pyproject.toml",
    ".": "changes the shell that reads it",
    "ssh": "needs another machine",
    "vllm": "stands in an environment of its own; tests/engines/test_vllm.py starts it where there is one",
}

WHAT_TO_DO = (
    "A page shows a command that does not work as it stands. Mend the page. If the command takes minutes, shorten it in SHORTER "
    "of tests/test_commands.py; if it needs a file, write that in tests/support/newcomer.py; if it needs another machine, a hub "
    "or a GPU, excuse it in EXCUSED with the reason."
)


def shown(name: str) -> list[Command]:
    return [command for block in fences(page(name), "bash") for command in commands(block)]


WITH_COMMANDS = [name for name in PAGES if shown(name)]
QUOTING = "docs/evidence.md"
"""The page that quotes what models wrote, in which a word may look like a program."""
SLOW = {"docs/index.md", "docs/machines.md", "docs/students.md"}


def more(command: Command) -> tuple[str, ...]:
    """What is written behind a command here."""
    return next((words for start, words in SHORTER.items() if f"{command} ".startswith(f"{start} ")), ())


def is_excused(command: Command) -> bool:
    return str(command) in EXCUSED or command.program in EXCUSED_PROGRAMS


RUN = [
    pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
    for name in WITH_COMMANDS
    if not all(map(is_excused, shown(name)))
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("newcomer")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        return prepare(home)


@pytest.fixture
def here(prepared, tmp_path, monkeypatch) -> Path:
    home = tmp_path / "home"
    shutil.copytree(prepared, home, symlinks=True)
    monkeypatch.chdir(home)
    return home


@pytest.mark.parametrize("name", RUN)
def test_the_commands_of_a_page_run(name, here):
    """In their order, in one folder. What they say they write is there afterwards."""
    failed = []
    for command in shown(name):
        if is_excused(command):
            continue
        try:
            run(command, more(command))
        except (AssertionError, OSError) as error:
            failed.append(f"`{command}`: {error}")
            continue
        for option, value in zip(command.words, command.words[1:], strict=False):
            if option in ("--output", "--out") and not Path(value).exists():
                failed.append(f"`{command}` has not written {value}")
    assert not failed, "\n".join([name, *failed, WHAT_TO_DO])


# ------------------------------------------------------------------ without running


@pytest.mark.parametrize("name", PAGES)
def test_every_command_is_one_of_the_command_line(name):
    inside = [span for span in spans(page(name)) if COMMAND.match(span)]
    if name == QUOTING:
        inside = [span for span in inside if span.startswith("kibitz ")]
    inline = [command for span in inside for command in commands(span)]
    wrong = {str(command): said for command in (*shown(name), *inline) if (said := mistake(command))}
    assert wrong == {}


@pytest.mark.parametrize("name", PAGES)
def test_commands_stand_in_blocks_that_say_so(name):
    """What is no `bash` is not run: a block without a language may hold equations and trees of files."""
    lines = [line for block in fences(page(name), "") for line in block.splitlines() if COMMAND.match(line)]
    assert lines == [], "write ```bash above them"
    assert {match["language"] for match in FENCE.finditer(page(name))} <= {"", "bash", "python", "yaml"}


def test_every_excuse_is_needed():
    every = [command for name in WITH_COMMANDS for command in shown(name)]
    assert set(EXCUSED) <= {str(command) for command in every}, "take out what no page shows any more"
    assert set(EXCUSED_PROGRAMS) <= {command.program for command in every}
    assert set(SHORTER.values()) <= {more(command) for command in every}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("kibitz trian recipe.yaml", "no command trian"),
        ("kibitz train recipe.yaml --resme", "no option --resme"),
        ("kibitz control rdp x.yaml", "no command rdp"),
        ("kibitz control distil x.yaml --depth 3", "kibitz distil has no option --depth"),
        ("torchrun --nproc-per-node 2 -m kibitz train recipe.yaml --again", "no option --again"),
        ("make tests", "no target tests"),
        ("pip install 'kibitz[lora,nonsense]'", "no extra nonsense"),
        ("python benchmarks/nothing.py", "no file benchmarks/nothing.py"),
        ("python benchmarks/memory.py --fast", "no option --fast"),
        ("conda install kibitz", "`conda` is a program"),
    ],
)
def test_mistakes_are_found(line, said):
    (command,) = commands(line)
    assert said in mistake(command)


def test_a_line_is_taken_apart_as_a_shell_does():
    text = "kibitz a 'b c' \\\n  --d  # why\n\necho \"5+(2*3)\" | kibitz chat && kibitz recipes > r.yaml\n"
    assert [(command.words, command.reads and command.reads.words, command.file) for command in commands(text)] == [
        (("kibitz", "a", "b c", "--d"), None, None),
        (("kibitz", "chat"), ("echo", "5+(2*3)"), None),
        (("kibitz", "recipes"), None, "r.yaml"),
    ]
