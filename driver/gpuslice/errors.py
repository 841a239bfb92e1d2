"""Who can fix it: one small tree of errors, raised where the fact is known, caught where it can be answered.

Every text is one sentence that names the thing, the limit and the remedy, because users read it in the events of a pod.
"""

from __future__ import annotations

from collections.abc import Sequence


class DriverError(Exception):
    """The driver refuses something, or fails at it. The text is one sentence for a person."""


class ClaimError(DriverError):
    """The claim cannot be served as written. Only its author (or the scheduler) can change that."""


class ConfigError(DriverError):
    """A flag, an environment variable or a policy file is wrong. The process does not start with it."""


class RemovalError(DriverError):
    """The removal of the driver from the cluster stops. A person has to act, and then starts it again."""


class DeviceError(DriverError):
    """The hardware refused a call. `code` keeps the NVML return value (nvml.h, `nvmlReturn_t`), 0 if NVML was not called."""

    def __init__(self, text: str, code: int = 0) -> None:
        super().__init__(text)
        self.code = code


class HungError(DeviceError):
    """A call on this GPU takes so long that the GPU counts as hung. No other job waits for it."""

    @classmethod
    def overdue(cls, call: str, gpus: Sequence[str], limit_s: float) -> HungError:
        """The error for a call beyond its time limit. `call` begins the sentence. `gpus`: empty if it concerns no GPU."""
        counts = f", so GPU {', '.join(gpus)} counts as hung until it does" if gpus else ""
        return cls(
            f"{call} has not returned for {limit_s:g} s{counts}; look at the "
            "kernel log of the node, and reset the GPU or restart the node if it stays hung"
        )


class ApiError(DriverError):
    """The API server refused a request or did not answer it. `status` is the HTTP status, 0 without an answer."""

    def __init__(self, text: str, status: int = 0) -> None:
        super().__init__(text)
        self.status = status


class LastingApiError(ApiError):
    """An answer that stays the same until a person changes the API server, or until this process starts again."""


class DisruptionError(ApiError):
    """A PodDisruptionBudget does not let this pod be evicted now. A later try may succeed."""


class NotFoundError(ApiError):
    """HTTP 404: the object does not exist."""


class ConflictError(ApiError):
    """HTTP 409: another program changed the object first, or the object already exists."""


class ExpiredError(ApiError):
    """HTTP 410: the resource version of a watch is too old. List again."""


class StateError(DriverError):
    """A record of the driver is unreadable or contradicts the node. The driver never guesses its meaning."""
