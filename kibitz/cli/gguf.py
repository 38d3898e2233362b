"""`kibitz import`: a GGUF file becomes a model folder."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from kibitz.cli.output import Output, harmless


def import_model(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE.gguf", help="A model as llama.cpp and Ollama keep it.")],
    output: Annotated[Path, typer.Option(help="The folder to write, for student.model or teacher.model.")],
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16; auto: the file's own, or bfloat16 if it is quantized.")
    ] = "auto",
) -> None:
    """Write a GGUF file as a Hugging Face folder: weights as floats, tokenizer, chat template and the tokens that end a response.

    The folder is read again and asked one question, and the answer is shown. Needs kibitz[gguf]."""
    if dtype not in (known := ("auto", "float32", "bfloat16", "float16")):
        raise ValueError(f"--dtype {dtype} is none of {', '.join(known)}")
    if output.exists():
        raise ValueError(f"{output} is there already: write --output ANOTHER")
    from kibitz.models.gguf import read_gguf, reread
    from kibitz.training.checkpoint import write_folder

    out: Output = ctx.obj
    out.say(f"reading {file}, which takes about a minute for each 150 million parameters")
    found = read_gguf(file, dtype)
    write_folder(output, found.save)
    said = reread(output, found.notes).sentence()
    config = found.model.config
    tree = {
        "folder": output,
        "architecture": config.model_type,
        "parameters": found.model.num_parameters(),
        "dtype": str(config.dtype).removeprefix("torch."),
        "stop_ids": found.model.generation_config.eos_token_id,
        "chat_template": found.tokenizer.chat_template is not None,
        "notes": list(found.notes),
        "said": said,
    }

    def for_a_person(console: Console) -> None:
        about = f"{tree['architecture']}, {tree['parameters']:,} parameters in {tree['dtype']}"
        console.print(Text(harmless(f"model      {output} ({about})")), soft_wrap=True)
        console.print(Text(harmless(f"it says    {said}")), soft_wrap=True)
        for note in found.notes:
            console.print(Text(harmless(f"look       {note}"), style="yellow"), soft_wrap=True)

    out.result(tree, for_a_person)
