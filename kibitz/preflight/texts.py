"""Checks of text alone, no weights: do student and teacher read the same conversation, and does it end for both?"""

from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from transformers import AutoConfig, GenerationConfig

from kibitz.config import ModelConfig, Recipe
from kibitz.data import encode_prompt
from kibitz.models import lora
from kibitz.models.load import end_ids
from kibitz.models.progress import no_progress_bars
from kibitz.preflight.finding import Finding
from kibitz.preflight.shapes import Shape
from kibitz.report.formats import many
from kibitz.teachers.alignment import Aligner
from kibitz.types import Prompt

PROBE = [{"role": "user", "content": "What is 2+2?"}]


def tokenizers(student: Any, teacher: Any) -> Finding:
    """Check that both models have the same vocabulary. They may pad it differently: logits are cut to the tokenizer's size."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    numbers = {"student_tokens": len(ours), "teacher_tokens": len(theirs)}
    if ours == theirs:
        return Finding("tokenizer", "green", f"both read the same {len(ours):,} tokens", numbers)
    shared = sum(theirs.get(token) == number for token, number in ours.items())
    text = (
        f"of the student's {len(ours):,} tokens {shared:,} are the teacher's too ({len(theirs):,} in all): token ids mean "
        "different text to the two"
    )
    return Finding("tokenizer", "red", text, numbers | {"shared": shared})


def aligned(student: Any, teacher: Any, prompts: Sequence[Prompt]) -> Finding:
    """Report the share of the prompts' tokens at which the models can be compared, if the teacher has its own tokenizer."""
    aligner, tokens, heard = Aligner(student, teacher), 0, 0
    for prompt in prompts[:16]:
        ids = student(prompt.text, add_special_tokens=False)["input_ids"]
        tokens += len(ids)
        heard += sum(span.num_student for span in aligner.align(ids, finished=False).spans if span.comparable)
    share = heard / max(1, tokens)
    text = f"the teacher reads text in its own tokens, aligned by bytes: {share:.0%} of the prompts' tokens can be compared"
    return Finding("tokenizer", "green" if share > 0.9 else "amber", text, {"heard": share})


def ends(student: Any, teacher: Any, student_stop: set[int], teacher_stop: set[int]) -> Finding:
    """Check that the tokens that end the teacher's answers also end the student's rollouts. Otherwise responses grow without end,
    because the teacher pushes the student towards a token after which it goes on."""

    def names(tokenizer: Any, ids: set[int]) -> str:
        return ", ".join(repr(tokenizer.decode([i])) for i in sorted(ids))

    missing = teacher_stop - student_stop
    numbers = {"student": sorted(student_stop), "teacher": sorted(teacher_stop)}
    if not missing:
        return Finding("end of a response", "green", f"rollouts end at {names(student, student_stop)}", numbers)
    text = (
        f"the teacher also ends its answers with {names(teacher, missing)}, and the student's rollouts continue after it: "
        f"write rollout.stop: [{names(teacher, missing)}]"
    )
    return Finding("end of a response", "amber" if teacher_stop & student_stop else "red", text, numbers)


@no_progress_bars()
def stop_tokens(config: ModelConfig, tokenizer: Any, stop: list[str]) -> set[int]:
    """Return the ids of all tokens that end a model's response, from its files alone."""
    folder = lora.base_or_self(config.model)
    try:
        settings: Any = GenerationConfig.from_pretrained(lora.settings_of(config.model))
    except OSError:  # a folder without generation settings: transformers then takes the model's own
        settings = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    return set(end_ids(tokenizer, settings, stop))


def first_token(student: Any, teacher: Any, prompts: Sequence[Prompt]) -> Finding:
    """Check that prompts begin with at most one BOS, and that both tokenizers add it or neither does."""
    doubled = [p.text for p in prompts if student.bos_token_id is not None and p.ids[:2] == (student.bos_token_id,) * 2]
    if doubled:
        text = f"{len(doubled)} prompts begin with two {student.bos_token!r}: the chat template and the tokenizer each add one"
        return Finding("beginning of a prompt", "red", text)
    begins = [
        bool(ids) and ids[0] == t.bos_token_id for t in (student, teacher) if (ids := t("a")["input_ids"]) is not None
    ]
    if len(set(begins)) > 1:
        who = "student" if begins[0] else "teacher"
        text = f"only the {who}'s tokenizer begins plain text with BOS; both models read the prompt as the student renders it"
        return Finding("beginning of a prompt", "amber", text)
    return Finding("beginning of a prompt", "green", "prompts begin the same way for both models")


def chat_template(recipe: Recipe, student: Any, teacher: Any, messages: Sequence[dict[str, str]] = PROBE) -> Finding:
    """Compare the two chat templates on the same conversation. The teacher was trained on its own."""
    if teacher.chat_template is None:
        return Finding("chat template", "green", "the teacher has no chat template: it reads the student's prompt")
    if student.chat_template is None:
        return Finding(
            "chat template",
            "amber",
            "the teacher has a chat template and the student none, so the teacher reads bare text that it was not trained "
            "on: give the student the teacher's template (tokenizer.chat_template), as Thinking Machines' base students have",
        )
    ours, theirs = (_rendered(t, messages, recipe.data.template) for t in (student, teacher))
    if ours == theirs:
        return Finding("chat template", "green", "both models' templates render a conversation alike")
    lines = [a.splitlines() for a in (ours, theirs)]
    most = max(map(len, lines))
    pairs = zip(*(side + [""] * (most - len(side)) for side in lines), strict=True)
    return Finding(
        "chat template",
        "amber",
        "the models render a conversation differently, and the teacher reads the student's rendering: give the student the "
        "teacher's template, or set data.template so that they agree",
        differences=tuple(pairs),
    )


def thinking(recipe: Recipe, student: Any, messages: Sequence[dict[str, str]] = PROBE) -> Finding:
    """Report whether the chat template's thinking mode is on. Its default is easily overlooked."""
    template = student.chat_template or ""
    if "enable_thinking" not in template:
        return Finding("thinking mode", "green", "the student's template has none to choose")
    chosen = recipe.data.template.get("enable_thinking")
    if chosen is not None:
        return Finding(
            "thinking mode", "green", f"data.template.enable_thinking={str(chosen).lower()}, as the recipe says"
        )
    by_mode = {
        mode: _rendered(student, messages, {**recipe.data.template, "enable_thinking": mode}) for mode in (True, False)
    }
    default = _rendered(student, messages, recipe.data.template) == by_mode[True]
    return Finding(
        "thinking mode",
        "amber",
        f"the template has a thinking mode, and the recipe leaves it at its default, {'on' if default else 'off'}: write "
        "data.template.enable_thinking=true or false",
        {"default": default},
        tuple(zip(*_padded(by_mode[True], by_mode[False]), strict=True)),
    )


def _padded(one: str, other: str) -> tuple[list[str], list[str]]:
    sides = one.splitlines(), other.splitlines()
    most = max(map(len, sides))
    return sides[0] + [""] * (most - len(sides[0])), sides[1] + [""] * (most - len(sides[1]))


def _rendered(tokenizer: Any, messages: Sequence[dict[str, str]], template: dict[str, Any]) -> str:
    ids = encode_prompt(tokenizer, list(messages), template)
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def lengths(recipe: Recipe, prompt_lengths: Sequence[int], rooms: Sequence[int | None]) -> Finding:
    """Compare the lengths of prompts and responses, in tokens, with the models' maximum positions."""
    sizes, longest, limit = prompt_lengths, max(prompt_lengths), recipe.rollout.max_tokens
    numbers = {"prompts": len(sizes), "median": median(sizes), "longest": longest, "max_tokens": limit}
    room = min((r for r in rooms if r is not None), default=None)
    text = f"{many(len(sizes), 'prompt')} of {median(sizes):.0f} tokens (longest {longest:,}), responses of at most {limit:,}"
    if room is None or longest + limit <= room:
        return Finding(
            "lengths", "green", f"{text}; {'no limit known' if room is None else f'{room:,} positions'}", numbers
        )
    remedy = f"write rollout.max_tokens={room - longest}" if longest < room else "leave out long prompts"
    return Finding("lengths", "red", f"{text}, and a model has {room:,} positions: {remedy}", numbers | {"room": room})


def attention(shapes: Sequence[tuple[str, Shape]]) -> Iterator[Finding]:
    """Models whose attention keeps the scores of every pair of tokens, with what keeps none."""
    for role, shape in shapes:
        if shape.squares:
            written = shape.squares / shape.num_layers
            remedy = f": write {role}.attention=flex_attention" if shape.model._supports_flex_attn else ""
            yield Finding(
                "attention", "amber",
                f"the {role}'s attention is eager, for which transformers has no sdpa (soft caps): {written:.3g} bytes a "
                f"layer for each pair of tokens in a text{remedy}",
                {"bytes_per_pair": shape.squares},
            )  # fmt: skip
