"""A process that grades: it answers one question after another, and says `stopped` where an answer takes too long.

Standard input holds a question a line, as JSON; standard output gets its answer. The first process imports what the kind of
question needs and forks; the second one answers. A limit of CPU time is the kernel's, a timer whose signal ends the process,
because nothing in Python interrupts the power of two large numbers; then the first process says so and forks again, which
takes milliseconds where importing takes seconds.
"""

import json
import logging
import os
import re
import resource
import signal
import sys

MEMORY_BYTES, TEMPLATE_BYTES = 4 << 30, 1 << 30
MAX_BOXES, MAX_BOX = 8, 20_000


def search(pattern, text, whole):
    """Return whether the pattern is found in the text; with `whole`, whether it matches all of it."""
    return bool((re.fullmatch if whole else re.search)(pattern, text))


def constraint(name, text, options):
    import forms

    return forms.CONSTRAINTS[name](text, **options)


def gold(answer):
    """Return whether an answer is a mathematical expression."""
    return any(not isinstance(part, str) for part in parsed_gold(answer))


def mathematics(answer, text):
    """Return whether the last expression of a text equals the answer. If the answer is several values, they may stand in
    several boxes."""
    from math_verify import parse, verify

    wanted = parsed_gold(answer)
    several = any(type(part).__name__ in ("FiniteSet", "Tuple") for part in wanted)
    try:
        boxed = verify(wanted, parse(last_box(text), parsing_timeout=0), timeout_seconds=0)
        return boxed or (several and verify(wanted, parse(text, parsing_timeout=0), timeout_seconds=0))
    except Exception:  # a text that the parser chokes on is no expression
        return False


def parsed_gold(answer):
    from math_verify import parse

    return parse(f"${answer}$", parsing_timeout=0) or parse(answer, parsing_timeout=0)


def last_box(text):
    """The last complete `\\boxed{...}` of a text; the whole text if it ends with none. math-verify makes one set of boxes
    that stand near each other, so that a student who corrects itself would never be right."""
    end = len(text)
    for _ in range(MAX_BOXES):
        start = text.rfind("\\boxed", 0, end)
        if start < 0:
            return text
        brace = text.find("{", start, start + 10)
        if brace < 0 and start + 7 < len(text):
            return text[start:]  # such as \\boxed 5
        if brace >= 0 and (size := closed(text[brace : brace + MAX_BOX])):
            percent = re.match(r"\s{0,9}\\?%", text[brace + size : brace + size + 12])
            return "\\boxed" + text[brace : brace + size] + (percent[0] if percent else "")
        end = start
    return text


def closed(text):
    """The size of the group in braces that the text begins with; 0 if it is not closed."""
    depth = 0
    for place, sign in enumerate(text):
        depth += (sign == "{") - (sign == "}")
        if depth == 0:
            return place + 1
    return 0


def template(text, conversations, special):
    """Return the most characters that a chat template writes for one of the conversations, each of which may be refused; 0 if
    it is no template. Whoever renders it says what is wrong with it: here it is only measured."""
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = frozenset({"generation"})  # pyright: ignore[reportAssignmentType]  # transformers' own

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    extensions = [Generation, "jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = lambda value, **options: json.dumps(value)
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": lambda form: form}
    longest = 0
    for messages, opened in conversations:
        try:
            written = environment.from_string(text).render(messages=messages, add_generation_prompt=opened, **special)
        except MemoryError:
            raise
        except Exception:
            continue
        longest = max(longest, len(written))
    return longest


def family(name, options):
    import tasks

    return tasks.family(name, options)


def problems(**question):
    import tasks

    return tasks.problems(**question)


def verify(**question):
    import tasks

    return tasks.verify(**question)


def unreadable(names, options):
    import instructions

    return instructions.unreadable(names, options)


def followed(names, options, text):
    import instructions

    return instructions.followed(names, options, text)


QUESTIONS = {
    **{"search": search, "constraint": constraint, "gold": gold, "mathematics": mathematics, "template": template},
    **{"family": family, "problems": problems, "verify": verify, "unreadable": unreadable, "followed": followed},
}


def answer_all(wait, out):
    """Answer until there are no more questions."""
    while line := wait.readline():
        question = json.loads(line)
        seconds, ask = question.pop("seconds", None), question.pop("ask", None)
        if ask is None:
            reply = {"value": None}
        else:
            signal.setitimer(signal.ITIMER_PROF, seconds)
            try:
                reply = {"value": QUESTIONS[ask](**question)}
            except (MemoryError, RecursionError):
                reply = {"value": None}
            except Exception as error:
                reply = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
            signal.setitimer(signal.ITIMER_PROF, 0)
        write(out, reply)


def write(out, reply):
    line = json.dumps(reply).encode() + b"\n"
    while line:
        line = line[os.write(out, line) :]


def no_walls():
    """What only compares takes no code from a text."""


def main(kind):
    sys.path.append(os.path.dirname(os.path.abspath(__file__)))
    out = os.dup(1)
    os.dup2(2, 1)
    logging.disable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    walls = no_walls
    if kind == "tasks":
        import tasks

        walls = tasks.walls()
    elif kind == "mathematics":
        for text in ("1", "\\\\frac{1}{2}", "x^2+1"):  # what every text needs is loaded before the fork
            mathematics(text, text)
    elif kind == "template":
        template("", [], {})
    elif kind == "ifeval":
        import instructions

        instructions.checkers()
    else:
        import forms  # noqa: F401
    memory = TEMPLATE_BYTES if kind == "template" else MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    wait = os.fdopen(0, "rb")
    while True:
        child = os.fork()
        if child == 0:
            walls()
            answer_all(wait, out)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
            return
        write(out, {"stopped": True})


if __name__ == "__main__":
    main(sys.argv[1])
