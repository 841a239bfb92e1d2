"""Strict readers for the plain values of a policy document. Each error names the path and the remedy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NoReturn, TypeVar

from gpuslice.errors import ConfigError

_T = TypeVar("_T")


def fail(path: str, what: str) -> NoReturn:
    raise ConfigError(f"policy: {path} {what}")


def mapping(value: object, path: str, known: Sequence[str]) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        fail(path, f"must be a mapping with the keys {', '.join(known)}, not {_kind(value)}")
    for key in value:
        if key not in known:
            fail(path, f"has the unknown key {key!r}; known keys: {', '.join(known)}")
    return value


def optional(body: Mapping[str, object], key: str, path: str, read: Callable[[object, str], _T]) -> _T | None:
    """The result of `read` for this key, or None if the body does not have the key."""
    return read(body[key], f"{path}.{key}") if key in body else None


def sequence(value: object, path: str) -> Sequence[object]:
    if not isinstance(value, list | tuple):
        fail(path, f"must be a list, not {_kind(value)}; write it in brackets or with dashes")
    if not value:
        fail(path, "is an empty list, so nothing would be left; name a value, or remove the key")
    return value


def text(value: object, path: str) -> str:
    if not isinstance(value, str) or not value:
        fail(path, f"must be a text, not {_kind(value)}; write it in quotes")
    return value


def number(value: object, path: str) -> int:
    if isinstance(value, str) and value.isdecimal():
        fail(path, f"is the text {value!r} and must be a number; write {int(value)} without quotes")
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        fail(path, f"must be a whole number from 0 on, not {_kind(value)}")
    return value


def positive(value: object, path: str) -> int:
    if number(value, path) == 0:
        fail(path, "is 0, which has no effect; write a number from 1 on, or remove it")
    return number(value, path)


def unique(values: Iterable[_T], path: str) -> list[_T]:
    found = list(values)
    for i, value in enumerate(found):
        if value in found[:i]:
            fail(path, f"names {value} twice; name it once")
    return found


def _kind(value: object) -> str:
    if value is None:
        return "nothing"
    names = {bool: "true or false", str: "a text", list: "a list", dict: "a mapping"}
    return names.get(type(value), repr(value)) if value != "" else "an empty text"
