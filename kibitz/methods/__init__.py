"""Methods: who writes the tokens, what each token is told, which loss. One small file each.

| method | who writes | what a token is told | loss |
|---|---|---|---|
| sft | the data, the teacher, or the student | the token | cross-entropy |
| opd | the student | the teacher's distribution there | reverse KL, or another divergence |
| gkd | the student in a share of the steps, else the data or the teacher | the teacher's distribution there | JSD, or another |
| skd | the student; the teacher replaces what is not in its top K | the teacher's distribution there | forward KL, or another |
| minillm | student and teacher, mixed token by token | log-ratios, the teacher's distribution | policy gradient, reverse KL |
| distillm2 | teacher and student | the teacher's distribution there | skewed KL; on the student's text, reverse KL |
| grpo | the student, a group per prompt | reward minus the group's mean | clipped policy gradient |
| kdrl | the student, a group per prompt | reward minus the group's mean, and the teacher's word | clipped policy gradient, k2 |
| ammd | the student; for other prompts the teacher or the data | learnt values of all tokens | the policies' gap in value |
| gad | at first the teacher or the data, then the student | a judge's score minus the group's mean | clipped policy gradient |
"""

from collections.abc import Callable
from typing import Any

from kibitz.config import MethodConfig, register_method
from kibitz.methods import ammd, distillm2, gad, gkd, grpo, kdrl, minillm, opd, sft, skd
from kibitz.methods.parts import Method, Parts, policy_loss, scorer, teacher_engine, token_loss
from kibitz.methods.reference import anchored
from kibitz.methods.replay import replayed
from kibitz.methods.weights import weighted
from kibitz.types import Stateful

__all__ = ["METHODS", "Method", "Parts", "build", "policy_loss", "register", "scorer", "teacher_engine", "token_loss"]

# Each takes the section that `METHOD_CONFIGS` has under the same name.
METHODS: dict[str, Callable[[Any, Parts], Method]] = {
    "sft": sft.build,
    "opd": opd.build,
    "gkd": gkd.build,
    "skd": skd.build,
    "minillm": minillm.build,
    "distillm2": distillm2.build,
    "grpo": grpo.build,
    "kdrl": kdrl.build,
    "ammd": ammd.build,
    "gad": gad.build,
}


def build(parts: Parts) -> Method:
    """The method that a recipe names, with the recipe's token weights, its reference and its gold responses."""
    config = parts.recipe.method
    method = METHODS[config.type](config, parts)
    if isinstance(method, Stateful):
        parts.stateful["method"] = method
    return replayed(anchored(weighted(method, parts), parts), parts)


def register(name: str, config: type[MethodConfig], build: Callable[[Any, Parts], Method]) -> None:
    """Add a method from outside the package: its name, its section of the recipe, and `build(config, parts)`, which makes it
    from that section."""
    register_method(name, config)
    METHODS[name] = build
