"""The recipe that a diagnosis suggests: each line with the reason for it, and what the run would cost by the clock."""

from typing import Any

from kibitz.config import LocalTeacherConfig, Recipe, load
from kibitz.config.commented import commented
from kibitz.models.load import pick_device, pick_dtype
from kibitz.preflight import budget
from kibitz.preflight.shapes import shape_of
from kibitz.preflight.speed import speed_of
from kibitz.training.setup import Setup

STEPS = 100
GOOD_OVERLAP = 0.8
LR, LR_WIDTH, MOST_LR = 5e-5, 2048, 1e-3
OWN = ("student", "teacher", "data")
Line = tuple[str, Any, str]
"""A setting (`a.b`), its value, and why."""


def advise(
    setup: Setup, recipe: Recipe, numbers: dict[str, Any], clock: dict[str, float], price: float | None
) -> dict[str, Any]:
    """The recipe as text, its lines with their reasons, and its cost. What the person wrote stays as it is."""
    given = recipe.model_dump(mode="json", exclude_unset=True)
    lines = [line for line in _lines(setup, recipe, numbers) if not _has(given, line[0])]
    tree = _tree(given, lines)
    wanted = load(tree)
    head = ["What kibitz score suggests, and why. kibitz check looks at it before it costs anything."]
    head += [f"But: {doubt}" for doubt in _doubts(numbers)]
    text = commented(tree, {setting: why for setting, _, why in lines}, head)
    return {"recipe": text, "reasons": [list(line) for line in lines], "doubts": _doubts(numbers),
            "cost": _cost(setup, wanted, numbers, clock, price)}  # fmt: skip


def _has(tree: Any, setting: str) -> bool:
    for key in setting.split("."):
        if not isinstance(tree, dict) or key not in tree:
            return False
        tree = tree[key]
    return True


def _lines(setup: Setup, recipe: Recipe, numbers: dict[str, Any]) -> list[Line]:
    return [
        *_method(setup, recipe, numbers),
        *_rollout(setup.parts.recipe, numbers),
        *_optim(setup, recipe),
        *_rest(recipe),
    ]


def _method(setup: Setup, recipe: Recipe, numbers: dict[str, Any]) -> list[Line]:
    """Which method, and on which support, by the overlap of the likeliest tokens."""
    mass, kinds = numbers.get("overlap_mass"), setup.parts.teacher.kinds if setup.parts.teacher else ()
    if mass is not None and mass < GOOD_OVERLAP:
        low = f"the tokens that both find likely hold {mass:.0%} of the student's probability"
        if all(isinstance(one, LocalTeacherConfig) and one.tokenizer != "own" for one in recipe.teachers):
            return [
                (
                    "method.type",
                    "skd",
                    f"{low}: the teacher takes its text back to where its own advice is good (2410.11325)",
                )
            ]
        if all(one.writes() for one in recipe.teachers):
            return [("method.type", "sft", f"{low}: first learn from the teacher's text, then run kibitz score again"),
                    ("method.source", "teacher", "the teacher writes what is learnt")]  # fmt: skip
    held = "" if mass is None else f": the tokens that both find likely hold {mass:.1%} of the student's probability"
    lines: list[Line] = [("method.type", "opd", f"the teacher has something to say about the student's own text{held}")]
    if "dense" in kinds:
        lines.append(("method.divergence", "reverse_kl", "learn what the teacher would do, not all that it might do"))
        lines.append(
            ("method.support", "full", "the teacher is in this process: the whole vocabulary, exact, costs no more")
        )
    elif "named" in kinds or "top_k" in kinds:
        whose = "student" if "named" in kinds else "teacher"
        lines.append(("method.support", "top_k", "a server tells some tokens, and the rest is a tail"))
        lines.append(("method.top_k_of", whose, "those that it can be asked for"))
    else:
        lines.append(("method.support", "sampled", "the teacher tells the probability of the written token only"))
    return lines


def _rollout(recipe: Recipe, numbers: dict[str, Any]) -> list[Line]:
    most, cut = numbers["most_tokens"], numbers["cut_off"]
    if cut > 0.02:
        limit, why = (
            recipe.rollout.max_tokens * 2,
            f"{cut:.0%} of the answers were cut off at {recipe.rollout.max_tokens}",
        )
        limit, why = (
            (recipe.rollout.max_tokens, f"{why}: see whether they would ever end") if cut > 0.3 else (limit, why)
        )
    else:
        limit = -(-(most * 3 // 2) // 8) * 8
        why = f"99% of the answers end within {most} tokens; half as much again for those that grow"
    return [
        ("rollout.prompts_per_step", 64, "Thinking Machines' default"),
        ("rollout.samples_per_prompt", 1, "a new prompt tells more than a second answer to the same"),
        ("rollout.max_tokens", limit, why),
    ]


def _optim(setup: Setup, recipe: Recipe) -> list[Line]:
    width = setup.parts.student.model.config.get_text_config().hidden_size
    rate = min(MOST_LR, LR * max(1.0, LR_WIDTH / width))
    why = f"{LR:g} is right for widths of {LR_WIDTH}, and the rate falls with the width (2203.03466); this student's is {width}"
    if recipe.student.lora is not None:
        rate, why = min(MOST_LR, 10 * rate), f"{why}; an adapter takes 10 x that of all weights"
    return [("optim.lr", float(f"{rate:.2g}"), why), ("optim.warmup_steps", 10, "AdamW's first steps are its wildest")]


def _rest(recipe: Recipe) -> list[Line]:
    lines: list[Line] = [
        ("steps", STEPS, "published runs take 50 to 150; the curves of kibitz watch say when it is enough")
    ]
    if recipe.data.world is not None or recipe.eval.prompts is not None:
        lines.append(("eval.every", 20, "five looks at held-out prompts"))
    lines.append(("output", "runs/suggested", "the folder of the run"))
    return lines


def _doubts(numbers: dict[str, Any]) -> list[str]:
    """Reasons not to train at all, as sentences."""
    found, ours, theirs = [], numbers.get("accuracy"), numbers.get("teacher_accuracy")
    if numbers.get("reverse_kl", 1.0) < 1e-4:
        found.append("The two hardly differ anywhere: there is nothing to learn. Are they the same model?")
    if ours and theirs and theirs["high"] < ours["low"]:
        found.append("The teacher is right less often than the student: choose another, or look at its template.")
    elif ours and theirs and theirs["low"] <= ours["high"]:
        found.append(
            "It is not sure that the teacher is right more often than the student: ask more prompts by --num-prompts."
        )
    if numbers.get("mended") is not None and numbers["mended"] < 0.2:
        found.append(
            f"From where they differ, the teacher finishes {numbers['mended']:.0%} of the student's wrong answers right: it "
            "comments on text that it could not save either."
        )
    return found


# ------------------------------------------------------------------ text and cost


def _tree(given: dict[str, Any], lines: list[Line]) -> dict[str, Any]:
    """The person's settings with the suggested ones, in the order in which a recipe is read."""
    tree: dict[str, Any] = {key: given[key] for key in OWN if key in given}
    for key, value in given.items():
        tree.setdefault(key, dict(value) if isinstance(value, dict) else value)
    for setting, value, _ in lines:
        *parents, last = setting.split(".")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = value
    return tree


def _cost(
    setup: Setup, recipe: Recipe, numbers: dict[str, Any], clock: dict[str, float], price: float | None
) -> dict[str, Any]:
    """Tokens, FLOPs, seconds and money of the run, for answers as long as the student's own: by the clock of the diagnosis,
    with three readings for forward and backward; without evaluations."""
    rollouts = recipe.steps * recipe.rollout.prompts_per_step * recipe.rollout.samples_per_prompt
    seconds = rollouts * (clock["writing"] + 3 * clock["reading"])
    found = {
        "rollouts": rollouts,
        "tokens": rollouts * numbers["response_tokens"],
        "seconds": seconds,
        "money": None if price is None else price * seconds / 3600,
        "device": str(setup.parts.student.device),
    }
    return found | {"flops": _flops(setup, recipe, numbers)}


def _flops(setup: Setup, recipe: Recipe, numbers: dict[str, Any]) -> float | None:
    device = pick_device(recipe.device)
    local = [one for one in recipe.teachers if isinstance(one, LocalTeacherConfig)]
    try:
        student, *teachers = [shape_of(one, pick_dtype(one.dtype, device)) for one in (recipe.student, *local)]
    except ValueError:
        return None
    mean = recipe.model_copy(
        update={"rollout": recipe.rollout.model_copy(update={"max_tokens": max(1, round(numbers["response_tokens"]))})}
    )
    lengths = [len(prompt.ids) for prompt in setup.stream.prompts]
    return sum(budget.cost(mean, student, teachers, lengths, speed_of(device, 1e12), None).flops.values())
