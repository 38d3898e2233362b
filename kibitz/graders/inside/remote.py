"""An object of the other process, as the tests see it.

The rule that keeps a wrong program from passing: where it learns a value of the tests by an operator, as the 3.5 of
`f(2) - 3.5`, nothing that it says of the outcome counts as plain data. A test that meets that fails.
"""

import operator

BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift")
UNARY = ("neg", "pos", "abs", "invert")
ORDER = ("lt", "le", "gt", "ge")
OPERATORS = {name: getattr(operator, f"__{name}__") for name in (*BINARY, *UNARY, *ORDER)}
CONTAINERS = (list, tuple, set, frozenset, dict)


class Remote:
    """`_kibitz` is the line, the object's number on it, and whether it came from an operator and a value of ours."""

    __slots__ = ("_kibitz",)

    def __init__(self, line, number, mixed=False):
        object.__setattr__(self, "_kibitz", (line, number, mixed))

    def __call__(self, *arguments, **named):
        return ask("call", self, *arguments, **named)

    def __getattr__(self, name):
        if name.startswith("__") and name != "__name__":
            raise AttributeError(name)
        return ask("get", self, name)

    def __setattr__(self, name, value):
        ask("set", self, name, value)

    def __getitem__(self, key):
        return ask("item", self, key)

    def __setitem__(self, key, value):
        ask("set item", self, key, value)

    def __delitem__(self, key):
        ask("delete item", self, key)

    def __iter__(self):
        return ask("iter", self)

    def __next__(self):
        return ask("next", self)

    def __enter__(self):
        return ask("enter", self)

    def __exit__(self, *error):
        ask("exit", self)

    def __instancecheck__(self, value):
        return isinstance(value, Remote) and ask("is a", value, self) is True

    def __hash__(self):
        return hash(self._kibitz[1])

    def __eq__(self, other):
        """Two objects of the program are equal if it says so; one of them and data, if the data in it are equal."""
        if isinstance(other, Remote):
            return ask("eq", self, other) is True
        if self._kibitz[2] or not isinstance(other, CONTAINERS):
            return False
        try:
            content = ask("content", self)
        except Exception:
            return False
        return isinstance(content, CONTAINERS) and content == other

    def __len__(self):
        return spoken(self, "len")

    def __bool__(self):
        return spoken(self, "bool")

    def __str__(self):
        return spoken(self, "str")

    def __repr__(self):
        return spoken(self, "repr")

    def __float__(self):
        return spoken(self, "float")

    def __int__(self):
        return spoken(self, "int")


def ask(what, value, *rest, **named):
    return value._kibitz[0].ask(what, value, *rest, **named)


def spoken(value, what):
    if value._kibitz[2]:
        raise TypeError("an object of the program's that has met a value of the tests does not become data")
    return ask(what, value)


def operate(name, *operands):
    """An operator on operands of which one at least is remote."""
    line = next(operand._kibitz[0] for operand in operands if isinstance(operand, Remote))
    mixed = any(not isinstance(operand, Remote) or operand._kibitz[2] for operand in operands)
    if mixed and name in ORDER:
        return NotImplemented
    value = line.ask(name, *operands)
    if not mixed:
        return value
    if not isinstance(value, Remote):
        raise TypeError(f"{name} of an object of the program's and a value of the tests must be an object")
    return Remote(line, value._kibitz[1], mixed=True)


def methods():
    """The special methods of the operators, forward and backward."""
    for name in (*BINARY, *UNARY, *ORDER):
        yield f"__{name}__", lambda *operands, name=name: operate(name, *operands)
    for name in BINARY:
        yield f"__r{name}__", lambda value, other, name=name: operate(name, other, value)


for special, method in methods():
    setattr(Remote, special, method)
