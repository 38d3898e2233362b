"""Options that several commands have in common, said in the same words."""

from typing import Annotated

import typer

Resume = Annotated[bool, typer.Option("--resume", help="Continue the run from its last checkpoint.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete the run in the output folder and start again.")]
