"""Waiting times before the next try: after failures, and after changes by others. Callers pass the time as argument."""

from __future__ import annotations

from dataclasses import dataclass

CALM_S = 60.0  # after a watch or a quiet time of this length, waiting times start from the minimum again


@dataclass(frozen=True, slots=True, kw_only=True)
class BackoffConfig:
    """Waiting times in seconds."""

    quiet_s: float = 0.5  # after a foreign change
    quiet_most_s: float = 15.0  # statement 59: deleted slices are back within about 30 s
    retry_s: float = 0.5  # full jitter, doubling
    retry_most_s: float = 60.0
    spread_s: float = 60.0  # a fleet spreads its lists over this time when watches cannot go on; full jitter
    relist_s: float = 600.0  # between two lists, on average
    watch_s: int = 300  # the longest watch
    hopeless_s: float = 10.0  # how long the driver accepts a refusal that waiting does not change
    version_s: float = 60.0  # the longest time between two looks at the API server's version
    confirm_s: float = 5.0  # between a look with other features and the look that confirms them
    missing_most_s: float = 600.0  # the longest time between two probes for missing features


DEFAULT_BACKOFF = BackoffConfig()


def around(mean_s: float, chance: float) -> float:
    """Half to one and a half times `mean_s`, so that nodes with the same beginning do not stay in step.

    `chance`: a random number from 0 to 1.
    """
    return mean_s * (0.5 + chance)


class Backoff:
    """The delay before each further try. It is random, and its maximum doubles."""

    def __init__(self, config: BackoffConfig) -> None:
        self._config, self._most_s = config, config.retry_s

    def delay_s(self, chance: float) -> float:
        """`chance`: the caller's random number from 0 to 1."""
        delay_s = chance * self._most_s
        self._most_s = min(self._most_s * 2, self._config.retry_most_s)
        return delay_s


class Repeats:
    """Decides which sentences are new. A sentence that returns within a minute is not, so alternating problems log once."""

    def __init__(self) -> None:
        self._seen: dict[str, float] = {}

    def is_news(self, text: str, now: float) -> bool:
        self._seen = {other: at for other, at in self._seen.items() if now - at < CALM_S}
        news = text not in self._seen
        self._seen[text] = now
        return news


class Hopelessness:
    """Decides when to stop waiting: if for `hopeless_s` all answers are of a kind that waiting does not change."""

    def __init__(self, config: BackoffConfig) -> None:
        self._limit_s = config.hopeless_s
        self._since: float | None = None

    def reached(self, now: float, *, lasting: bool) -> bool:
        """`lasting`: waiting does not change the latest answer."""
        self._since = (now if self._since is None else self._since) if lasting else None
        return self._since is not None and now - self._since >= self._limit_s

    def shorten(self, delay_s: float, now: float) -> float:
        """The delay before the next try, cut so that it does not go past the end of `hopeless_s`."""
        left_s = 0.0 if self._since is None else self._since + self._limit_s - now
        return min(delay_s, left_s) if left_s > 0 else delay_s


class Debounce:
    """When to answer foreign changes: after a quiet time, which doubles each time that another change undoes our answer."""

    def __init__(self, config: BackoffConfig) -> None:
        self._config, self._quiet_s = config, config.quiet_s
        self._answered: float | None = None
        self._since: float | None = None

    def due(self, now: float) -> float:
        """The time of the answer after one more change now. A stream of changes cannot delay it for ever."""
        if self._answered is not None:
            lasted = now - self._answered > CALM_S
            self._quiet_s = self._config.quiet_s if lasted else min(self._quiet_s * 2, self._config.quiet_most_s)
            self._answered = None
        self._since = now if self._since is None else self._since
        return min(now + self._quiet_s, self._since + 5 * self._quiet_s)

    def record_answer(self, now: float, *, wrote: bool) -> None:
        """Record that the foreign changes up to now have an answer. `wrote`: the answer changed something."""
        self._since = None
        if wrote:
            self._answered = now
