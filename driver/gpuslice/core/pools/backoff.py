"""How long to wait before the next try: after failures, and after changes by others. Callers pass the time in."""

from __future__ import annotations

from dataclasses import dataclass

CALM_S = 60.0  # a watch, or a quiet spell, of this length starts the waiting times anew


@dataclass(frozen=True, slots=True, kw_only=True)
class BackoffConfig:
    """Waiting times in seconds."""

    quiet_s: float = 0.5  # after a foreign change
    quiet_most_s: float = 15.0  # statement 59: wiped slices are back within about 30 s
    retry_s: float = 0.5  # full jitter, doubling
    retry_most_s: float = 30.0
    relist_s: float = 600.0
    watch_s: int = 300
    hopeless_s: float = 10.0  # how long the same refusal is borne that waiting does not change


DEFAULT_BACKOFF = BackoffConfig()


class Backoff:
    """The delay before each further try: random, with a maximum that doubles."""

    def __init__(self, config: BackoffConfig) -> None:
        self._config, self._most_s = config, config.retry_s

    def delay_s(self, chance: float) -> float:
        """chance: from 0 to 1, the caller's random number."""
        delay_s = chance * self._most_s
        self._most_s = min(self._most_s * 2, self._config.retry_most_s)
        return delay_s


class Repeats:
    """Which sentences are news. One that comes back within a minute is none, so that trouble which alternates is told once."""

    def __init__(self) -> None:
        self._seen: dict[str, float] = {}

    def is_news(self, text: str, now: float) -> bool:
        self._seen = {other: at for other, at in self._seen.items() if now - at < CALM_S}
        news = text not in self._seen
        self._seen[text] = now
        return news


class Hopelessness:
    """Whether to stop waiting: only such answers that waiting does not change, for `hopeless_s`."""

    def __init__(self, config: BackoffConfig) -> None:
        self._limit_s = config.hopeless_s
        self._since: float | None = None

    def reached(self, now: float, *, lasting: bool) -> bool:
        """`lasting`: the answer just now is one that waiting does not change."""
        self._since = (now if self._since is None else self._since) if lasting else None
        return self._since is not None and now - self._since >= self._limit_s

    def shorten(self, delay_s: float, now: float) -> float:
        """The delay before the next try, which does not sleep over the moment when this is reached."""
        left_s = 0.0 if self._since is None else self._since + self._limit_s - now
        return min(delay_s, left_s) if left_s > 0 else delay_s


class Debounce:
    """When to answer foreign changes: after a moment of quiet, which doubles each time that our answer does not last."""

    def __init__(self, config: BackoffConfig) -> None:
        self._config, self._quiet_s = config, config.quiet_s
        self._answered: float | None = None
        self._since: float | None = None

    def due(self, now: float) -> float:
        """The time to answer, given one more change now; a stream of changes cannot put it off for ever."""
        if self._answered is not None:
            lasted = now - self._answered > CALM_S
            self._quiet_s = self._config.quiet_s if lasted else min(self._quiet_s * 2, self._config.quiet_most_s)
            self._answered = None
        self._since = now if self._since is None else self._since
        return min(now + self._quiet_s, self._since + 5 * self._quiet_s)

    def record_answer(self, now: float, *, wrote: bool) -> None:
        """The foreign changes up to now are answered; `wrote`: the answer changed something."""
        self._since = None
        if wrote:
            self._answered = now
