"""Who is at fault: one small tree of errors, raised where the fact is known, caught where it can be answered.

Every text is one sentence that names the thing, the limit and the remedy, for it reaches a pod's events as it is.
"""

from __future__ import annotations

from collections.abc import Sequence


class DriverError(Exception):
    """Anything this driver refuses or fails at with a sentence for a person."""


class ClaimError(DriverError):
    """The claim cannot be served as written; only its author (or the scheduler) can change that."""


class ConfigError(DriverError):
    """A flag, an environment variable or a policy file is wrong; the process does not start with it."""


class DeviceError(DriverError):
    """The hardware said no; `code` keeps the NVML return value (nvml.h, `nvmlReturn_t`), 0 where NVML was not asked."""

    def __init__(self, text: str, code: int = 0) -> None:
        super().__init__(text)
        self.code = code


class HungError(DeviceError):
    """A call on this GPU has not come back for so long that nobody else should wait for it."""

    @classmethod
    def overdue(cls, call: str, gpus: Sequence[str], limit_s: float) -> HungError:
        """`call` begins the sentence."""
        return cls(
            f"{call} has not come back for {limit_s:g} s, so GPU {', '.join(gpus)} counts as hung until it does; look at the "
            "kernel log of the node, reset the GPU or restart the node if it stays so"
        )


class ApiError(DriverError):
    """The API server said no, or nothing; `status` is the HTTP status, 0 where there was no answer."""

    def __init__(self, text: str, status: int = 0) -> None:
        super().__init__(text)
        self.status = status


class LastingApiError(ApiError):
    """An answer that stays the same until a person changes the API server, or what we know of it since our start."""


class NotFoundError(ApiError):
    """HTTP 404: the object is not there."""


class ConflictError(ApiError):
    """HTTP 409: somebody else wrote first, or the object already exists."""


class ExpiredError(ApiError):
    """HTTP 410: the resource version of a watch is too old; list again."""


class StateError(DriverError):
    """A record of ours is unreadable or contradicts the node; never guessed at."""
