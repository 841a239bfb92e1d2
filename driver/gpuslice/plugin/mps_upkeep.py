"""Keeps the MPS daemons of this node running while the driver runs."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from gpuslice.errors import DriverError
from gpuslice.mps.api import MpsDaemons

log = logging.getLogger(__name__)

_PERIOD_S, _LONGEST_PAUSE_S = 2.0, 60.0

_State = tuple[str, frozenset[str]]  # the identity of the supervisor process, and the problems of its daemons
_AWAY: _State = ("", frozenset())


class MpsUpkeep:
    """Starts the MPS daemons of all records again after a daemon or the supervisor was lost. Until then it logs each problem,
    and NodeHealth taints the devices."""

    def __init__(
        self, mps: MpsDaemons, ensure_daemons: Callable[[], Awaitable[None]], changed: Callable[[], object]
    ) -> None:
        self._mps = mps
        self._ensure_daemons = ensure_daemons
        self._changed = changed  # called when the taints may have changed

    async def run(self) -> str:
        """Run until cancelled. While a problem stays, the pause before each try doubles, because each try holds the card, and
        a daemon that hangs at its start takes ten seconds."""
        known, pause_s, due, pending = _AWAY, _PERIOD_S, 0.0, False
        while True:
            now = await asyncio.to_thread(self._read_state)
            if now != known:
                for problem in sorted(now[1] - known[1]):
                    log.warning("an MPS daemon has a problem: %s", problem)
                self._changed()
                pause_s, due = _PERIOD_S, 0.0
            pending = pending or now[0] != known[0] or bool(now[1])
            known = now
            if pending and now != _AWAY and time.monotonic() >= due:
                pause_s, due = min(2 * pause_s, _LONGEST_PAUSE_S), time.monotonic() + pause_s
                pending = not await self._try_ensure()
            await asyncio.sleep(_PERIOD_S)

    async def _try_ensure(self) -> bool:
        try:
            await self._ensure_daemons()
        except DriverError as e:  # the daemon's problem has its own log line and taint
            log.debug("cannot start the MPS daemons of all claims yet; the driver tries again: %s", e)
            return False
        return True

    def _read_state(self) -> _State:
        """The state of the supervisor and its daemons. `_AWAY` if no supervisor answers."""
        try:
            incarnation, daemons = self._mps.seen()
            return incarnation, frozenset(daemon.problem for daemon in daemons if daemon.problem)
        except DriverError:
            return _AWAY
