"""Experiments: a question, the arms that answer it, and what came out, each number from a run that anybody can repeat.

    kibitz reproduce methods

An experiment is data: a recipe and the changes that make each arm of it. All of them run through `kibitz.train` and are
measured by `kibitz.evaluate`, on the toy worlds or, by naming other checkpoints, on real models. What they say about a
published claim is a verdict and numbers; the page around them is a Markdown file beside the experiment's.
"""

import difflib
from collections.abc import Iterator
from importlib import import_module
from pkgutil import iter_modules

from kibitz.experiments import claims
from kibitz.experiments.design import Arm, Experiment, Subject

__all__ = ["Arm", "EXPERIMENTS", "Experiment", "Subject", "get"]


def _found() -> Iterator[Experiment]:
    """Every experiment that a module of `claims` defines."""
    for module in sorted(iter_modules(claims.__path__), key=lambda module: module.name):
        everything = vars(import_module(f"{claims.__name__}.{module.name}"))
        yield from (one for name, one in everything.items() if isinstance(one, Experiment) and name.isupper())


EXPERIMENTS: dict[str, Experiment] = {experiment.name: experiment for experiment in _found()}


def get(name: str) -> Experiment:
    """The experiment of that name."""
    if name in EXPERIMENTS:
        return EXPERIMENTS[name]
    nearest = difflib.get_close_matches(name, EXPERIMENTS, n=1, cutoff=0.0)[0]
    raise ValueError(
        f"there is no experiment {name!r}; did you mean {nearest!r}? The experiments are: {', '.join(EXPERIMENTS)}"
    )
