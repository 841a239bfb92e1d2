"""Quantities as apimachinery reads and spells them."""

from __future__ import annotations

import pytest
from gpuslice.core import quantity


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("5120", 5120),
        ("1k", 1000),
        ("1Ki", 1024),
        ("0.5Gi", 2**29),
        (".5Gi", 2**29),
        ("5e3", 5000),
        ("5E3", 5000),
        ("1E", 10**18),
        ("100m", 1),
        # An amount with a fraction, as the API returns it.
        ("8351241784524800u", 8351241785),
        ("1206302541806043136n", 1206302542),
        ("-1", -1),
    ],
)
def test_a_quantity_is_read_in_whole_units_rounded_up(text: str, value: int) -> None:
    assert quantity.parse(text) == value


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("5120", "5120Mi"),
        ("40960", "40960Mi"),
        ("8", "8Gi"),
        ("0.5", "0.5Gi"),
        ("512m", "512Mi"),  # thousandths of a byte
        ("512k", "512Mi"),
        ("512Ki", "512Mi"),
        ("1Mi", ""),
        ("1e6", "1Mi"),
        ("2000000", ""),
        ("0", ""),
        ("-5", ""),
        ("much", ""),
    ],
)
def test_an_amount_that_no_program_can_use_has_lost_its_unit(text: str, meant: str) -> None:
    assert quantity.without_unit(text) == meant


@pytest.mark.parametrize(
    "text", ["", "Gi", "1 Gi", "1GiB", "1g", "0x10", "1e", "1e1000000", "1E1000000", "1e-31", "+-1"]
)
def test_what_is_no_quantity_or_as_large_as_none_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="write a"):
        quantity.parse(text)
