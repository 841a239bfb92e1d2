"""Signals that end a command of hack/ like Ctrl-C, so that it undoes what it started."""

from __future__ import annotations

import signal


def interrupt_on(*numbers: signal.Signals) -> None:
    """From now on, raise KeyboardInterrupt in the main thread for these signals."""
    for number in numbers:
        signal.signal(number, _interrupt)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
