"""What keeps the measurement from being made."""

from __future__ import annotations


class ScaleError(Exception):
    """One sentence that says what is missing or went wrong, and what to do."""
