"""The part of CEL that our selectors use, as Kubernetes evaluates it for a device. Everything else is refused.

A few replacements turn an expression into Python. A name that the device does not have is an error, as in CEL. A comparison
of two types is an error, too; CEL says that it is never true.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from gpuslice.config import DRIVER_NAME
from gpuslice.standin.resource_slices import amount

Body = Mapping[str, Any]

_PYTHON = (
    (re.compile(r"&&"), " and "),
    (re.compile(r"device\.driver\b"), "driver"),
    (re.compile(r"device\.(attributes|capacity)\['([\w./-]+)'\]\.(\w+)"), r"\1('\2')['\3']"),
    (re.compile(r"'(\w+)' in device\.(attributes|capacity)\['([\w./-]+)'\]"), r"('\1' in \2('\3'))"),
)
_KNOWN = re.compile(
    r"""(attributes\('[\w./-]+'\)|capacity\('[\w./-]+'\)|\['\w+'\]|(quantity|semver)\('[\w.]+'\)|'[^'"\\]*'|driver
    |\.(compareTo|isGreaterThan|isLessThan|startsWith)|==|>=|<=|\[|\]|\(|\)|,|\bin\b|\band\b|\d+|\s)*""",
    re.VERBOSE,
)


class CelText(str):
    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return str(self) == str(_same(other, str))

    def startsWith(self, other: str) -> bool:
        return self.startswith(other)


class CelNumber(int):
    __hash__ = int.__hash__

    def __eq__(self, other: object) -> bool:
        return bool(int(self) == _same(other, int))


class Comparable:
    """A quantity or a version. CEL compares them only by methods."""

    def __init__(self, value: Any, kind: str) -> None:
        self.value, self.kind = value, kind

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise TypeError(f"a {self.kind} is compared by compareTo")

    def compareTo(self, other: Comparable) -> int:
        assert self.kind == other.kind, f"a {self.kind} beside a {other.kind}"
        return int(self.value > other.value) - int(self.value < other.value)

    def isGreaterThan(self, other: Comparable) -> bool:
        return self.compareTo(other) > 0

    def isLessThan(self, other: Comparable) -> bool:
        return self.compareTo(other) < 0


def _same(value: object, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"CEL has no operator for {kind.__name__} and {value!r}")
    return value


def quantity(text: str) -> Comparable:
    return Comparable(amount(text), "quantity")


def semver(text: str) -> Comparable:
    assert re.fullmatch(r"(0|[1-9]\d*)(\.(0|[1-9]\d*)){2}", text), f"{text!r} is no version of three numbers"
    return Comparable(tuple(map(int, text.split("."))), "version")


_MAKE: Mapping[str, Callable[[Any], object]] = {"string": CelText, "int": CelNumber, "bool": bool, "version": semver}


def selected(expression: str) -> Callable[[Body], bool]:
    """A selector as a function of one of our devices. KeyError for a name that the device does not have."""
    text = expression
    for pattern, replacement in _PYTHON:
        text = pattern.sub(replacement, text)
    assert _KNOWN.fullmatch(text), f"this test cannot read {expression!r}"
    program = compile(text.strip(), "CEL", "eval")

    def check(device: Body) -> bool:
        names = {
            "attributes": lambda domain: _domain(device["attributes"], domain, _attribute),
            "capacity": lambda domain: _domain(device["capacity"], domain, lambda body: quantity(body["value"])),
            "driver": CelText(DRIVER_NAME),
            "quantity": quantity,
            "semver": semver,
        }
        answer = eval(program, {"__builtins__": {}}, names)
        assert isinstance(answer, bool), f"{expression!r} is no condition"
        return answer

    return check


def _attribute(body: Body) -> object:
    ((kind, value),) = body.items()
    return _MAKE[kind](value)


def _domain(bodies: Body, domain: str, make: Callable[[Any], object]) -> dict[str, object]:
    """The names below this domain. A name without a domain is the driver's."""
    split = {name: name.rpartition("/") for name in bodies}
    return {short: make(bodies[name]) for name, (own, _, short) in split.items() if (own or DRIVER_NAME) == domain}
