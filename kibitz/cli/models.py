"""`kibitz eval`, `score` and `export`: what a model can do, how a teacher scores one text, and a model for others."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from kibitz.cli.output import Output
from kibitz.cli.places import resolved


def evaluate(
    ctx: typer.Context,
    model: Annotated[
        str, typer.Argument(help="A run folder (its last checkpoint is used), a model folder, or a hub name.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[A.B=VALUE]...", help="Settings, such as eval.samples=8 rollout.max_tokens=64."),
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="Also measure the reverse KL to this model.")] = None,
    world: Annotated[str | None, typer.Option(help="Evaluate on a toy world; `kibitz worlds` lists them.")] = None,
    prompts: Annotated[str | None, typer.Option(help="Evaluate on a JSONL or parquet file, or a hub data set.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Run benchmarks of lm-evaluation-harness instead, such as gsm8k,ifeval.")
    ] = None,
    url: Annotated[str | None, typer.Option(help="With --tasks: a vLLM server that serves MODEL.")] = None,
    task_folder: Annotated[Path | None, typer.Option(help="With --tasks: a folder with your own tasks.")] = None,
) -> None:
    """Measure a model: accuracy at temperature 1 and greedy, pass@k, reverse KL to a teacher, response length."""
    from kibitz import config, worlds

    if tasks is not None and not (world or prompts or teacher):
        _benchmarks(ctx, resolved(model), tasks.split(","), overrides or [], url=url, folder=task_folder)
        return
    if tasks or url or task_folder:
        raise ValueError(
            "--tasks brings its own prompts: leave out --world, --prompts and --teacher; --url and --task-folder go with it"
        )
    if (world is None) == (prompts is None):
        raise ValueError("write what to evaluate on: either --world NAME or --prompts FILE")
    recipe = config.load(
        {
            "student": {"model": model},
            "data": {"world": world, "split": "dev"} if world else {"prompts": prompts},
            "rollout": {"max_tokens": worlds.get(world).longest_response} if world else {},
            "method": {"type": "grpo"},  # of the methods the one that needs neither teacher nor demonstrations
        },
        overrides or [],
    )
    limit = recipe.data.limit or recipe.eval.num_prompts
    data = recipe.data.model_copy(update={"limit": min(limit, recipe.eval.num_prompts)})

    from kibitz.evaluate.evaluate import evaluate_model

    row = evaluate_model(
        resolved(model), teacher=teacher, data=data, eval=recipe.eval, rollout=recipe.rollout, device=recipe.device
    )

    def for_a_person(console: Console) -> None:
        from kibitz.cli import show

        show.evaluation(console, row)

    ctx.obj.result({"model": model, **row}, for_a_person)


def _benchmarks(ctx: typer.Context, model: str, tasks: list[str], overrides: list[str], **options: Any) -> None:
    """Read the two overrides that lm-eval knows: the number of rows of each task, and the limit of a response in tokens."""
    from kibitz import config

    settings = ("eval.num_prompts", "rollout.max_tokens")
    if unknown := [override for override in overrides if override.partition("=")[0] not in settings]:
        raise ValueError(f"--tasks brings its own settings but for {' and '.join(settings)}: leave out {unknown[0]}")
    base = {"student": {"model": model}, "data": {"world": "arithmetic"}, "method": {"type": "grpo"}}
    recipe = config.load(base, overrides)
    limit = recipe.eval.num_prompts if "num_prompts" in recipe.eval.model_fields_set else None
    longest = recipe.rollout.max_tokens if "max_tokens" in recipe.rollout.model_fields_set else None

    from kibitz.evaluate.harness import run_tasks

    found = run_tasks(model, tasks, limit=limit, max_tokens=longest, **options)

    def for_a_person(console: Console) -> None:
        for task, row in found.items():
            for name, value in row.items():
                console.print(f"{task:<20} {name:<40} {value:.4g}", markup=False)

    ctx.obj.result({"model": model, "tasks": found}, for_a_person)


def score(
    ctx: typer.Context,
    prompt: Annotated[list[str] | None, typer.Option(help="Prompt for the student. May be repeated.")] = None,
    response: Annotated[
        list[str] | None, typer.Option(help="Text to score, one for each prompt. Default: the student writes it.")
    ] = None,
    student: Annotated[str | None, typer.Option(help="Run folder, model folder or hub name. Default: a toy.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Folder or hub name. Default: the toy's teacher.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write the token heat-map to this HTML file.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Token limit of the student's own response.")] = None,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Temperature of the student's own response; 0 is greedy.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the student's own response.")] = 0,
    rollouts: Annotated[
        Path | None,
        typer.Option(
            help="Score all of this file instead of prompts: a stored.jsonl, which rollout.store=true writes."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the scores of --rollouts, or for a diagnosis (runs/diagnosis).")
    ] = None,
    kind: Annotated[str, typer.Option(help="What to store: dense, top_k or sampled scores.")] = "dense",
    top_k: Annotated[int, typer.Option(min=1, help="Number of tokens K with --kind top_k.")] = 64,
    prompts: Annotated[
        str | None, typer.Option(help="A file or dataset: diagnose student and teacher on it, and write a recipe.")
    ] = None,
    world: Annotated[str | None, typer.Option(help="Diagnose on a toy world instead; see `kibitz worlds`.")] = None,
    num_prompts: Annotated[int, typer.Option(min=2, help="Number of prompts that a diagnosis answers.")] = 128,
    price: Annotated[
        float | None, typer.Option(min=0, help="Price of the machine for one hour, for the cost of the recipe.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[A.B=VALUE]...", help="With --prompts, kept in the recipe: rollout.max_tokens=512."),
    ] = None,
) -> None:
    """Let a teacher score every token of a response and mark where it first went wrong.

    With --prompts, diagnose without training: where student and teacher differ, what training could gain, and by which
    recipe. With --rollouts and --out, store the teacher's scores of a file of rollouts, for training without the teacher."""
    if prompts is not None or world is not None:
        if prompt or response or rollouts or html:
            raise ValueError("--prompts and --world diagnose: leave out --prompt, --response, --rollouts and --html")
        from kibitz.cli.diagnose import diagnose

        diagnose(ctx.obj, (student, teacher), (prompts, world), overrides or [], num_prompts, price, out)
    elif overrides:
        raise ValueError(f"{overrides[0]} changes a diagnosis: write --prompts FILE with it")
    elif rollouts is not None or out is not None:
        if rollouts is None or out is None:
            raise ValueError("--rollouts FILE and --out FOLDER belong together")
        if prompt or response:
            raise ValueError("write either --prompt, or --rollouts and --out")
        _keep_scores(ctx.obj, teacher or _shipped("teacher"), rollouts, out, kind, top_k)
    else:
        sampling = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        _score_texts(ctx.obj, (student, teacher), prompt or [], response or [], html, sampling)


def _score_texts(
    out: Output,
    models: tuple[str | None, str | None],
    prompts: list[str],
    responses: list[str],
    html: Path | None,
    sampling: dict[str, Any],
) -> None:
    """Print the scores of each response; where none is given, the student writes them by `sampling`."""
    if not prompts:
        raise ValueError("write --prompt TEXT, or --prompts FILE for a diagnosis, or --rollouts FILE and --out FOLDER")
    from kibitz.evaluate.annotate import score_texts
    from kibitz.report.terminal import print_rollout

    student, teacher = models
    rows = score_texts(
        resolved(student) if student else _shipped("student"),
        teacher or _shipped("teacher"),
        _pairs(prompts, responses),
        **sampling,
    )
    if html is not None:
        _write_page(html, rows)

    def for_a_person(console: Console) -> None:
        for row in rows:
            print_rollout(row, console)

    out.result({"rollouts": rows, "html": html}, for_a_person)
    if html is not None:
        out.say(f"heat-map   {html}")


def _pairs(prompts: list[str], responses: list[str]) -> list[tuple[str, str | None]]:
    """Each prompt with its response; None where the student writes one."""
    if responses and len(responses) != len(prompts):
        raise ValueError(
            f"there are {len(prompts)} prompts and {len(responses)} responses: give each prompt its --response"
        )
    return list(zip(prompts, responses or [None] * len(prompts), strict=True))


def export(
    ctx: typer.Context,
    model: Annotated[
        str, typer.Argument(help="A run folder (its last checkpoint is used), or the folder of a model or adapter.")
    ],
    output: Annotated[Path, typer.Option(help="Folder to write, or with --gguf the file.")],
    merge: Annotated[bool, typer.Option("--merge", help="Merge a LoRA adapter into its base model.")] = False,
    gguf: Annotated[
        str | None,
        typer.Option(help="One file for llama.cpp and Ollama instead: float16, or q8_0 with 8-bit matrices."),
    ] = None,
    push: Annotated[str | None, typer.Option(help="Also upload it as OWNER/NAME, private unless --public.")] = None,
    public: Annotated[bool, typer.Option("--public", help="Make the upload of --push public.")] = False,
) -> None:
    """Export a checkpoint as a folder for transformers, peft or vLLM, without the training state and with a model card
    (README.md) that says how it was made; or as a GGUF file."""
    if public and push is None:
        raise ValueError("--public belongs to --push OWNER/NAME")
    if gguf is not None and (push is not None or merge):
        raise ValueError("--gguf writes one file, of a whole model: leave out --push and --merge")
    source, address = resolved(model), None
    if gguf is not None:
        from kibitz.models.gguf_export import export_gguf

        export_gguf(source, output, gguf)
    else:
        from kibitz.training.checkpoint import export as write

        write(source, output, merge, card_of(Path(source)))
    if push is not None:
        from kibitz.models.hub import push as upload

        ctx.obj.say(f"uploading {output}")
        address = upload(output, push, public)

    def for_a_person(console: Console) -> None:
        console.print(f"model      {output}", markup=False)
        if address is not None:
            console.print(f"hub        {address}", markup=False)

    ctx.obj.result({"model": source, "output": output, "merged": merge, "gguf": gguf, "pushed": address}, for_a_person)


def card_of(checkpoint: Path) -> str | None:
    """The model card of a checkpoint that lies in the folder of its run; of another model there is none to write."""
    from kibitz.report.card import model_card

    place = checkpoint.resolve()
    step = place.name.removeprefix("step-")
    run = place.parent.parent
    if place.parent.name != "checkpoints" or not step.isdecimal() or not (run / "recipe.yaml").is_file():
        return None
    return model_card(run, int(step))


def _keep_scores(output: Output, teacher: str, rollouts: Path, out: Path, kind: str, top_k: int) -> None:
    from kibitz.evaluate.annotate import store_scores
    from kibitz.teachers import ScoreRequest
    from kibitz.teachers.stored import KINDS

    if kind not in KINDS:
        raise ValueError(f"--kind {kind} is none of {', '.join(KINDS)}")
    total = 0
    for done, total in store_scores(teacher, rollouts, out, ScoreRequest(kind, top_k)):
        output.say(f"{done} of {total} rollouts")
    size = sum(path.stat().st_size for path in out.iterdir())
    tree = {"folder": out, "rollouts": total, "kind": kind, "bytes": size}
    output.result(
        tree,
        lambda console: console.print(f"scores of {total} rollouts, {size / 2**20:.1f} MiB, in {out}", markup=False),
    )


def _shipped(name: str) -> str:
    from kibitz import worlds

    return str(worlds.get("arithmetic").checkpoint(name))


def _write_page(path: Path, rows: list[dict]) -> None:
    from kibitz.report import rollout_page

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(rollout_page(rows), encoding="utf-8")
