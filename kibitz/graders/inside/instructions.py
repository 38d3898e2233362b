"""The checkers of IFEval (arXiv:2311.07911) as lm-evaluation-harness has them, for `bounded.py`."""

import difflib
import functools
import json

SAMPLE = "A first sentence. And a second one."
NO_SENTENCES = (
    "counts sentences or words by a table of nltk that is not on this machine: python -m nltk.downloader punkt_tab"
)


@functools.cache
def checkers():
    """Name -> class. langdetect draws by chance; here it draws the same for the same text, and has its tables loaded."""
    import langdetect
    from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT

    langdetect.DetectorFactory.set_seed(langdetect.DetectorFactory, 0)  # pyright: ignore[reportArgumentType]
    langdetect.detect(SAMPLE)
    return INSTRUCTION_DICT


def instruction(name, options):
    """The checker of an instruction with its options; options that are null are not given."""
    checker = checkers()[name](name)
    checker.build_description(**{option: value for option, value in options.items() if value is not None})
    return checker


def unreadable(names, options):
    """What is wrong with the instructions of a row, as a sentence; nothing if each can be checked."""
    for name, given in zip(names, options, strict=True):
        if name not in checkers():
            near = difflib.get_close_matches(name, checkers(), n=1, cutoff=0.0)[0]
            return f"IFEval has no instruction {name!r}; did you mean {near!r}?"
        if wrong := _wrong(name, given):
            return f"the instruction {name} with {json.dumps(given)} {wrong}"
    return None


def _wrong(name, options):
    wanted = checkers()[name](name).get_instruction_args_keys()
    if missing := [option for option in wanted if options.get(option) is None]:
        return f"lacks {', '.join(missing)}, and a value drawn by chance would be checked in its place"
    try:
        instruction(name, options).check_following(SAMPLE)
    except LookupError as error:
        return NO_SENTENCES if "nltk" in str(error) else f"is refused: {error}"
    except Exception as error:
        return f"is refused: {str(error)[:200] or type(error).__name__}"
    return None


def followed(names, options, text):
    """Whether a text follows each of the instructions. A checker that a text makes stumble was not followed."""
    found = []
    for name, given in zip(names, options, strict=True):
        try:
            found.append(bool(text.strip()) and bool(instruction(name, given).check_following(text)))
        except Exception:
            found.append(False)
    return found
