"""The error of a measurement that cannot be made."""

from __future__ import annotations


class ScaleError(Exception):
    """One sentence with the reason and the remedy."""
