"""The protocol of two confined processes: one holds the tests of a program, the other the program.

The tests run with an interpreter, builtins and expected values of their own, and call the program's names as if they were
there. Lines of JSON go both ways, one at a time: `ask` for something to be done, then its `value` or what it `raised`. Plain
data, and the standard library's values in `MADE`, are copied. Everything else stays where it is; the other side gets a
`Remote`. A program may tamper with its own end of the line, so the other end believes nothing but the data that it gives.
"""

import builtins
import collections
import datetime
import decimal
import fractions
import importlib
import json
import operator
import os
from collections.abc import Callable
from typing import Any, NoReturn

from remote import OPERATORS, Remote

MAX_BYTES = 1 << 22
"""Of one message."""

TYPES = (bool, bytearray, bytes, complex, dict, float, frozenset, int, list, object, range, set, str, tuple, type(None))
MADE = {
    "range": (range, lambda v: [v.start, v.stop, v.step]),
    "fraction": (fractions.Fraction, lambda v: [v.numerator, v.denominator]),
    "decimal": (decimal.Decimal, lambda v: [str(v)]),
    "deque": (collections.deque, lambda v: [list(v), v.maxlen]),
    "counter": (collections.Counter, lambda v: [dict(v)]),
    "ordered": (collections.OrderedDict, lambda v: [list(v.items())]),
    "date": (datetime.date, lambda v: [v.year, v.month, v.day]),
    "time": (datetime.time, lambda v: [v.hour, v.minute, v.second, v.microsecond]),
    "datetime": (
        datetime.datetime,
        lambda v: [v.year, v.month, v.day, v.hour, v.minute, v.second, v.microsecond],
    ),
    "timedelta": (datetime.timedelta, lambda v: [v.days, v.seconds, v.microseconds]),
}
"""Values that are copied though they are not plain: how to make each, and of what."""


def call(function, *arguments, **named):
    return function(*arguments, **named)


FOR_THE_PROGRAM = {
    "call": call,
    "get": getattr,
    "set": setattr,
    "item": operator.getitem,
    "set item": operator.setitem,
    "delete item": operator.delitem,
    "iter": iter,
    "next": next,
    "len": len,
    "bool": bool,
    "str": str,
    "repr": repr,
    "eq": operator.eq,
    "is a": isinstance,
    "enter": lambda value: type(value).__enter__(value),
    "exit": lambda value: type(value).__exit__(value, None, None, None),
    "content": lambda value: content(value),
    "float": float,
    "int": int,
    **OPERATORS,
}


def public(act):
    """Reads and writes what is not private of an object whose class the tests define."""

    def checked(value, name, *rest):
        if not isinstance(name, str) or name.startswith("_") or type(value).__module__ != "tests":
            raise AttributeError(name)
        return act(value, name, *rest)

    return checked


FOR_THE_TESTS = {"call": call, "bool": bool, "get": public(getattr), "set": public(setattr)}
"""What a program may do with the functions and objects that the tests gave it."""


def content(value: Any):
    """A list, tuple, set or dict for an object of a class made from one; TypeError for any other."""
    kind: Any = next((kind for kind in (list, tuple, set, frozenset) if isinstance(value, kind)), None)
    if kind is not None:
        return kind(kind.__iter__(value))
    if isinstance(value, dict):
        return dict(dict.items(value))
    raise TypeError("no plain data")


class Line:
    """One end, which does `operations` for the other. `broken` is called with a reason when the other end is gone or makes
    no sense, and does not return."""

    def __init__(self, channel, operations, broken: Callable[[str], NoReturn], holds_tests):
        self.inward, self.outward = channel
        self.operations, self.broken, self.holds_tests = operations, broken, holds_tests
        self.rest = b""
        self.given, self.numbers = [], {}  # our objects that the other end knows, and their numbers
        self.remotes, self.errors = {}, {}  # by the other end's number

    def ask(self, what, *parts, **named):
        values = [*parts, *named.values()]
        self.send({"ask": what, "parts": [self.encode(value) for value in values], "names": list(named)})
        while "ask" in (message := self.receive()):
            self.answer(message)
        try:
            raised = message.get("raised")
            error = None if raised is None else self.error_class(raised["class"])(self.decode(raised["text"]))
            for place, changed in message.get("changed", ()):
                change(values[place], self.decode(changed))
            value = None if error else self.decode(message["value"])
        except Exception:
            self.broken("it sent what is no data")
        if self.holds_tests and what != "next" and isinstance(error, StopIteration):
            raise RuntimeError("StopIteration")  # as in a generator: it would end the test's own `all(map(f, x))`
        if error is not None:
            raise error
        return value

    def answer(self, message):
        """Do what was asked. Arguments that were changed in place are sent back with the value."""
        try:
            sent = message["parts"]
            parts, names = [self.decode(part) for part in sent], message["names"]
            first = len(parts) - len(names)
        except Exception:
            self.broken("it sent what is no data")
        reply = {}
        try:
            named = dict(zip(names, parts[first:], strict=True))
            reply["value"] = self.encode(self.operations[message["ask"]](*parts[:first], **named))
        except Exception as error:
            reply["raised"] = {"class": self.encode_error(type(error)), "text": self.encode(text_of(error))}
        if message["ask"] == "call":
            now = [(i, self.encode(part)) for i, part in enumerate(parts) if isinstance(part, CHANGING)]
            reply["changed"] = [(i, part) for i, part in now if part != sent[i]]
        self.send(reply)

    # -------------------------------------------------------------- bytes

    def send(self, message):
        try:
            line = json.dumps(message).encode() + b"\n"
        except RecursionError:
            self.broken("it sent what is nested too deep")
        try:
            while line:
                line = line[os.write(self.outward, line) :]
        except OSError:
            self.broken("it left early")

    def receive(self):
        parts, size = [self.rest], len(self.rest)
        while b"\n" not in parts[-1]:
            try:
                block = os.read(self.inward, 1 << 16)
            except OSError:
                block = b""
            size += len(block)
            if not block or size > MAX_BYTES:
                self.broken("it left early" if not block else f"it sent more than {MAX_BYTES} bytes")
            parts.append(block)
        line, _, self.rest = b"".join(parts).partition(b"\n")
        try:
            message = json.loads(line)
            assert isinstance(message, dict)
        except Exception:
            self.broken("it sent what is no data")
        return message

    # -------------------------------------------------------------- values

    def encode(self, value: Any):
        kind: Any = type(value)
        if value is None or kind in (bool, float, str):
            return value
        if isinstance(value, int) and kind is not bool:
            return int(value) if -(1 << 60) < value < 1 << 60 and kind is int else {"int": hex(int.__index__(value))}
        if isinstance(value, float):
            return float.__float__(value)
        if isinstance(value, str):
            return str.__str__(value)
        if kind in (list, tuple, set, frozenset):
            parts: Any = value
            return {kind.__name__: [self.encode(part) for part in parts]}
        if kind in (dict, collections.defaultdict):
            return {"dict": [[self.encode(key), self.encode(part)] for key, part in value.items()]}
        if kind in (bytes, bytearray):
            return {kind.__name__: value.hex()}
        if kind is complex:
            return {"complex": [value.real, value.imag]}
        for name, (made, arguments) in MADE.items():
            if kind is made and getattr(value, "tzinfo", None) is None:
                return {"made": name, "of": [self.encode(part) for part in arguments(value)]}
        if isinstance(value, tuple) and hasattr(kind, "_fields"):
            return {"record": kind.__name__, "fields": list(kind._fields), "of": [self.encode(part) for part in value]}
        if kind is Remote:
            return {"yours": value._kibitz[1]}
        return self.encode_object(value)

    def encode_object(self, value):
        """Encode a value that is not copied. Python's own types and, towards the program, functions are called by their names."""
        name = getattr(value, "__name__", None) if getattr(value, "__module__", None) == "builtins" else None
        known = value in TYPES or is_error(value) if isinstance(value, type) else self.holds_tests
        if isinstance(name, str) and known and getattr(builtins, name, None) is value:
            return {"builtin": name}
        if is_error(value):
            return self.encode_error(value)
        return {"mine": self.number(value)}

    def number(self, value):
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.given)
            self.given.append(value)
        return self.numbers[id(value)]

    def encode_error(self, kind):
        if kind.__module__ == "builtins":
            return {"builtin": kind.__name__}
        base = next(base for base in kind.__bases__ if issubclass(base, BaseException))
        return {"error": self.number(kind), "name": kind.__name__, "base": self.encode_error(base)}

    def decode(self, data):
        match data:
            case {"list": parts} | {"tuple": parts} | {"set": parts} | {"frozenset": parts}:
                kind = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[next(iter(data))]
                return kind([self.decode(part) for part in parts])
            case {"dict": pairs}:
                return {self.decode(key): self.decode(part) for key, part in pairs}
            case {"int": text}:
                return int(text, 16)
            case {"bytes": text}:
                return bytes.fromhex(text)
            case {"bytearray": text}:
                return bytearray.fromhex(text)
            case {"complex": [real, imaginary]}:
                return complex(real, imaginary)
            case {"made": name, "of": parts}:
                return MADE[name][0](*map(self.decode, parts))
            case {"record": str(name), "fields": fields, "of": parts}:
                return collections.namedtuple(name, fields)(*map(self.decode, parts))
            case {"mine": int(number)}:
                return self.remotes.setdefault(number, Remote(self, number))
            case {"yours": int(number)} if number >= 0:
                return self.given[number]
            case {"builtin": str(name)}:
                value = getattr(builtins, name)
                assert not self.holds_tests or value in TYPES or is_error(value)
                return value
            case {"error": _}:
                return self.error_class(data)
            case None | bool() | int() | float() | str():
                return data
        raise ValueError("no data")

    def error_class(self, data):
        """The exception that stands here for one of the other side's."""
        if "builtin" in data:
            value = getattr(builtins, data["builtin"])
            return value if is_error(value) and issubclass(value, Exception) and plain_error(value) else RuntimeError
        number = data["error"]
        if number not in self.errors:
            self.errors[number] = type(str(data["name"]), (self.error_class(data["base"]),), {})
        return self.errors[number]


CHANGING = (list, dict, set, bytearray, collections.deque)


def change(value, new):
    """Give an argument the content that the call left in it."""
    if isinstance(value, (list, bytearray)):
        value[:] = new
    elif isinstance(value, (dict, set)):
        value.clear()
        value.update(new)
    elif isinstance(value, collections.deque):
        value.clear()
        value.extend(new)


def is_error(value):
    return isinstance(value, type) and issubclass(value, BaseException)


def plain_error(kind):
    """Return whether one text is enough to construct the error: those of Unicode need more."""
    return not issubclass(kind, (UnicodeError, BaseExceptionGroup)) or kind is UnicodeError


def text_of(error):
    """What the error is made of again. A KeyError quotes the key that it is made of."""
    try:
        key = error.args[0] if isinstance(error, KeyError) and len(error.args) == 1 else None
        return key if type(key) in (str, int) else str(error)[:500]
    except Exception:
        return ""


# ------------------------------------------------------------------ the two ends


def serve(run, channel):
    """The program's end: run it, then do what is asked until nobody asks."""
    names = run()
    operations = FOR_THE_PROGRAM | {"name": names.__getitem__}
    line = Line(channel, operations, lambda reason: os._exit(0), holds_tests=False)
    line.send({"value": None})
    while True:
        line.answer(line.receive())


def run_tests(tests, names, modules, channel, verdict):
    """The tests' end: statements one after another, up to the first that fails."""

    def leave(reason: str) -> NoReturn:
        os.write(verdict, json.dumps({"passed": not reason, "reason": reason}).encode())
        os._exit(0)

    now = "the program"
    line = Line(channel, FOR_THE_TESTS, lambda reason: leave(f"{now}: {reason}"), holds_tests=True)
    line.receive()
    namespace = {"__name__": "tests", "__builtins__": builtins}
    for name in names:
        try:
            namespace[name] = line.ask("name", name)
        except KeyError:
            continue  # a name that the tests make themselves, or one that is missed below
    for name in modules:
        namespace[name] = importlib.import_module(name)
    for test in tests:
        now = test[:200]
        try:
            exec(compile(test, "test", "exec"), namespace)
        except BaseException as error:
            leave(f"{now}: {type(error).__name__} {text_of(error)}".strip())
    leave("")
