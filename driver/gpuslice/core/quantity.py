"""Kubernetes quantities in whole numbers, as far as devices need them (apimachinery, `resource.Quantity`)."""

from __future__ import annotations

import re
from decimal import ROUND_UP, Decimal

_SUFFIX: dict[str, Decimal | int] = {
    "": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15, "E": 10**18,
    "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50, "Ei": 2**60,
    "m": Decimal("1e-3"), "u": Decimal("1e-6"), "n": Decimal("1e-9"),
}  # fmt: skip
_EXPONENT = 30  # a number with a million digits takes minutes of processor time
_GIB_BELOW = 256  # a smaller number without a unit hardly means MiB
_QUANTITY = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+))(?:([eE][+-]?\d+)|([numkMGTPE]|[KMGTPE]i)?)")


def parse(text: str) -> int:
    """The value in whole units (bytes for memory), rounded up like `Quantity.Value()`. ValueError if it is no quantity."""
    match = _QUANTITY.fullmatch(text)
    if match is None or (match[3] or "") not in _SUFFIX:
        raise ValueError(f"{text!r} is not a Kubernetes quantity; write a number with a suffix such as Mi or Gi")
    if match[2] and abs(int(match[2][1:])) > _EXPONENT:
        raise ValueError(f"{text!r} has an exponent beyond {_EXPONENT}, which no quantity needs; write a smaller one")
    value = Decimal(match[1] + (match[2] or "")) * Decimal(_SUFFIX[match[3] or ""])
    return int(value.to_integral_value(rounding=ROUND_UP))


def mebibytes(count: int) -> str:
    """Canonical text of a number of MiB: "9984Mi", "10Gi", "0"."""
    for suffix, size in (("Ti", 2**20), ("Gi", 2**10)):
        if count and count % size == 0:
            return f"{count // size}{suffix}"
    return f"{count}Mi" if count else "0"


def without_unit(text: str) -> str:
    """The amount that the author of less than 1 MiB probably meant: "5120" → "5120Mi", "8" → "8Gi". "" for any other text."""
    try:
        value = parse(text)
    except ValueError:
        return ""
    match = _QUANTITY.fullmatch(text)
    if match is None or not 0 < value < 2**20:
        return ""
    return f"{match[1]}{'Gi' if not match[3] and value < _GIB_BELOW else 'Mi'}"
