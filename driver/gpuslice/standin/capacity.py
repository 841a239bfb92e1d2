"""The part of a capacity that a share is charged, calculated as in the allocator of Kubernetes 1.37.1.

Source: k8s.io/dynamic-resource-allocation v0.37.1, structured/internal/incubating/consumable_capacity.go.
"""

from __future__ import annotations

from decimal import ROUND_UP, Decimal
from functools import cache

from gpuslice.core.json import ReadOnlyBody
from gpuslice.standin.resource_slices import amount, canonical

_NANO = Decimal("1e-9")  # apimachinery rounds a quantity up to a multiple of it
_MILLI = Decimal("1e-3")


class CapacityError(Exception):
    """A request that the arithmetic cannot hold. The scheduler ends its attempt for the whole pod, on all nodes."""


@cache
def exact(text: str) -> Decimal:
    """The value of a quantity."""
    value = amount(text)
    if value is None:
        raise ValueError(f"{text!r} is not a Kubernetes quantity")
    return value.quantize(_NANO, ROUND_UP) if value.as_tuple().exponent < -9 else value  # type: ignore[operator]


def whole(text: str) -> int:
    """The value in whole units, rounded up (apimachinery, `Quantity.Value`)."""
    return int(exact(text).to_integral_value(rounding=ROUND_UP))


def spelled(value: Decimal) -> str:
    """The canonical text of an amount."""
    if value != int(value):
        return canonical(f"{value.normalize():f}")
    return canonical(f"{int(value) // 1024}Ki") if value and value % 1024 == 0 else str(int(value))


def charged(wanted: str | None, entry: ReadOnlyBody, *, fractional: bool) -> Decimal | None:
    """The part of a capacity that a share takes. None if the policy does not allow the request.

    Without a request a share takes the default, or everything if there is no policy. `fractional`: the gate
    DRAFractionalCapacityRange is on, in 1.37 only with --min-compatibility-version=1.37 (pkg/features/kube_features.go).
    CapacityError as in the real allocator.
    """
    policy: ReadOnlyBody = entry.get("requestPolicy") or {}
    if wanted is None:
        return exact(policy.get("default") or entry["value"])
    value = exact(wanted)
    if values := policy.get("validValues"):
        return min((exact(text) for text in values if exact(text) >= value), default=None)
    if limits := policy.get("validRange"):
        value = _in_range(value, limits, wanted, fractional=fractional)
        if "max" in limits and value > exact(limits["max"]):
            return None
    return value


def _in_range(value: Decimal, limits: ReadOnlyBody, wanted: str, *, fractional: bool) -> Decimal:
    least = exact(limits["min"])
    if value < least:
        return least
    if "step" not in limits:
        return value if fractional else Decimal(whole(wanted))
    # The comment in the source says that thousandths count only for a range with a fraction. In its code they count
    # for every range that fits (`useMilli`).
    if fractional and value % _MILLI:
        raise CapacityError(
            f"capacity request cannot be represented: request {wanted} is not a representable milli value"
        )
    value = value if fractional else Decimal(whole(wanted))
    step = exact(limits["step"])
    steps = ((value - least) / step).to_integral_value(rounding=ROUND_UP)
    return least + steps * step
