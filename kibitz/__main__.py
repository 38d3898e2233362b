"""`python -m kibitz`, as torchrun wants it."""

from kibitz.cli import main

main()
