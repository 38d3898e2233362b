"""Experiments: a question, the arms that answer it, and what came out, each number from a run that anybody can repeat.

    kibitz reproduce methods

An experiment is data: a recipe and the changes that make each arm of it. All of them run through `kibitz.train` and are
measured by `kibitz.evaluate`, on the toy worlds or, by naming other checkpoints, on real models.
"""

import difflib

from kibitz.experiments.claims import (
    assistant,
    capacity,
    cost,
    distil_back,
    episode_length,
    forking,
    kl_direction,
    lora,
    one_prompt,
    pipeline,
    self_sft,
    sft_law,
    teacher_noise,
    temperature,
    weak_start,
)
from kibitz.experiments.claims.methods import METHODS, NAVIGATION
from kibitz.experiments.design import Arm, Claim, Experiment, Subject

__all__ = ["Arm", "Claim", "EXPERIMENTS", "Experiment", "Subject", "get"]

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        METHODS,
        NAVIGATION,
        sft_law.EXPERIMENT,
        cost.EXPERIMENT,
        cost.SLIPS,
        cost.UNDERTRAINED,
        episode_length.EXPERIMENT,
        distil_back.EXPERIMENT,
        one_prompt.EXPERIMENT,
        assistant.EXPERIMENT,
        self_sft.EXPERIMENT,
        lora.EXPERIMENT,
        kl_direction.EXPERIMENT,
        forking.EXPERIMENT,
        capacity.EXPERIMENT,
        teacher_noise.EXPERIMENT,
        weak_start.EXPERIMENT,
        temperature.EXPERIMENT,
        pipeline.EXPERIMENT,
    )
}


def get(name: str) -> Experiment:
    """The experiment of that name."""
    if name in EXPERIMENTS:
        return EXPERIMENTS[name]
    nearest = difflib.get_close_matches(name, EXPERIMENTS, n=1, cutoff=0.0)[0]
    raise ValueError(
        f"there is no experiment {name!r}; did you mean {nearest!r}? The experiments are: {', '.join(EXPERIMENTS)}"
    )
