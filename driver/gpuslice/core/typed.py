"""Typed reading of JSON on disk: a value of a wrong type, or outside any sensible range, is a ValueError with its path.

Lenient if a version may differ (`Fields` ignores keys that no caller reads), strict in everything that is read, because a
wrong value would fail later, in the work for another claim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

MOST = 2**31 - 1  # the largest count of NVML and of the kernel
_LONGEST = 512  # more than any name of Kubernetes (253), CDI name or sentence of NVML (96)


class Fields:
    """One object. A method without "optional" in its name needs the key. An optional one returns None for a missing key
    or null."""

    def __init__(self, body: object, path: str) -> None:
        if not isinstance(body, Mapping):
            _refuse(path, body, "an object")
        self._body, self._path = body, path

    def fail(self, what: str) -> NoReturn:
        raise ValueError(f"{self._path or 'it'} {what}")

    def text(self, key: str) -> str:
        return self._text(key, self._needed(key))

    def optional_text(self, key: str, *, empty: bool = False) -> str | None:
        value = self._body.get(key)
        return None if value is None or (empty and value == "") else self.text(key)

    def number(self, key: str, least: int = 0, most: int = MOST) -> int:
        value = self._needed(key)
        if type(value) is not int or not least <= value <= most:  # bool is an int for isinstance
            _refuse(self._at(key), value, f"a whole number from {least} to {most}")
        return value

    def optional_number(self, key: str, least: int = 0, most: int = MOST) -> int | None:
        return None if self._body.get(key) is None else self.number(key, least, most)

    def flag(self, key: str, default: bool | None = None) -> bool:
        value = self._needed(key) if default is None else self._body.get(key, default)
        if not isinstance(value, bool):
            _refuse(self._at(key), value, "true or false")
        return value

    def value(self, key: str) -> object:
        return self._needed(key)

    def part(self, key: str) -> Fields:
        return Fields(self._needed(key), self._at(key))

    def optional_part(self, key: str) -> Fields | None:
        return None if self._body.get(key) is None else self.part(key)

    def parts(self, key: str) -> list[Fields]:
        return [Fields(item, f"{self._at(key)}[{number}]") for number, item in enumerate(self._list(key))]

    def optional_parts(self, key: str) -> list[Fields] | None:
        return None if self._body.get(key) is None else self.parts(key)

    def texts(self, key: str) -> tuple[str, ...]:
        return tuple(self._text(f"{key}[{number}]", item) for number, item in enumerate(self._list(key)))

    def numbers(self, key: str, most: int) -> dict[str, int]:
        """An object whose values are numbers. {} if it is missing."""
        figures = Fields(self._body.get(key, {}), self._at(key))
        return {str(name): figures.number(name, 0, most) for name in figures._body}

    def _list(self, key: str) -> list[object]:
        value = self._needed(key)
        if not isinstance(value, list):
            _refuse(self._at(key), value, "a list")
        return value

    def _text(self, key: str, value: object) -> str:
        if not isinstance(value, str) or not 0 < len(value) <= _LONGEST or not value.isprintable():
            _refuse(self._at(key), value, f"a printable text of 1 to {_LONGEST} characters")
        return value

    def _needed(self, key: str) -> object:
        if key not in self._body:
            self.fail(f"has no {key}")
        return self._body[key]

    def _at(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path else key


def _refuse(path: str, value: object, wanted: str) -> NoReturn:
    """Name only the type of a value that may be large or nested."""
    found = repr(value) if isinstance(value, int | float) and abs(value) < 10**18 else type(value).__name__
    raise ValueError(f"{path or 'it'} is {'null' if value is None else found} and must be {wanted}")
