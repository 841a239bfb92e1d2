"""ResourceClaim JSON → Claim: what the scheduler decided, and whose fault it is if that cannot be read."""

from __future__ import annotations

from typing import Any

import pytest
from gpuslice.core import claims
from gpuslice.core.model import ClaimRef, ClaimUid, DeviceRef, PoolName, Settings
from gpuslice.errors import ClaimError

REF = ClaimRef("default", "one", ClaimUid("uid-1"))
DRIVER = "gpuslice.dev"
HEAD = {"apiVersion": "gpuslice.dev/v1alpha1", "kind": "SliceConfig"}


def a_result(request: str = "gpu", device: str = "gpu", **more: object) -> dict[str, object]:
    return {"request": request, "driver": DRIVER, "pool": "n/p", "device": device, **more}


def a_config(parameters: object, source: str = "FromClaim", *requests: str, driver: str = DRIVER) -> dict[str, object]:
    return {"source": source, "requests": list(requests), "opaque": {"driver": driver, "parameters": parameters}}


def a_body(*results: dict[str, object], config: tuple[dict[str, object], ...] = ()) -> dict[str, Any]:
    devices = {"results": list(results), "config": list(config)}
    return {"metadata": {"uid": REF.uid}, "status": {"allocation": {"devices": devices}}}


def settings(*config: dict[str, object], request: str = "gpu") -> Settings:
    return claims.parse(a_body(a_result(request), config=config), REF, DRIVER).allocations[0].settings


@pytest.mark.contract(22)
def test_results_of_other_drivers_are_not_ours() -> None:
    claim = claims.parse(a_body(a_result(), {**a_result(), "driver": "other"}), REF, DRIVER)

    assert [a.device for a in claim.allocations] == [DeviceRef(PoolName("n/p"), "gpu")]


@pytest.mark.contract(24)
def test_a_subrequest_goes_by_its_base_name() -> None:
    assert claims.parse(a_body(a_result("gpu/big")), REF, DRIVER).allocations[0].request == "gpu"


def test_shares_and_consumed_capacity_are_kept_in_whole_units() -> None:
    body = a_body(a_result(shareID="s-1", consumedCapacity={"memory": "9Gi", "smPercent": "25"}))

    (allocation,) = claims.parse(body, REF, DRIVER).allocations

    assert allocation.share_id == "s-1"
    assert allocation.consumed == {"memory": 9 * 2**30, "smPercent": 25}


@pytest.mark.contract(19)
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"metadata": {"uid": "uid-2"}}, "has UID uid-2, but the pod asks for UID uid-1"),
        ({"status": {}}, "is not allocated"),
        ({"status": {"allocation": {"devices": {"results": "x"}}}}, "not a list of objects"),
        ({"status": {"allocation": {"devices": {"results": [{"driver": DRIVER}]}}}}, "has no request"),
        (
            {"status": {"allocation": {"devices": {"results": [a_result(consumedCapacity={"memory": "9GB"})]}}}},
            "not a quantity",
        ),
        ({"metadata": "x"}, "not an object"),
    ],
)
def test_a_claim_that_cannot_be_served_is_refused_with_a_sentence(change: dict[str, object], says: str) -> None:
    with pytest.raises(ClaimError, match=says):
        claims.parse({**a_body(a_result()), **change}, REF, DRIVER)


@pytest.mark.contract(23)
def test_claim_configs_override_class_configs_whatever_their_order_in_the_list() -> None:
    config = (
        a_config({**HEAD, "enforcement": "preferred"}, "FromClaim"),
        a_config({**HEAD, "enforcement": "required"}, "FromClass"),
    )

    assert settings(*config) == Settings("preferred")


@pytest.mark.contract(23)
def test_a_config_field_that_nobody_overrides_stays() -> None:
    assert settings(a_config({**HEAD, "enforcement": "required"}, "FromClass"), a_config(HEAD)) == Settings("required")


@pytest.mark.contract(23)
@pytest.mark.parametrize(
    ("requests", "applies"),
    [((), True), (("gpu",), True), (("gpu/big",), True), (("gpu/small",), False), (("b",), False)],
)
def test_a_config_applies_to_the_requests_it_names_by_full_or_base_name(
    requests: tuple[str, ...], applies: bool
) -> None:
    config = a_config({**HEAD, "enforcement": "required"}, "FromClaim", *requests)

    assert settings(config, request="gpu/big") == (Settings("required") if applies else Settings())


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ("x", r"config\[0\].opaque.parameters must be an object of kind SliceConfig .*not str"),
        ({}, "must have apiVersion: gpuslice.dev/v1alpha1 and kind: SliceConfig"),
        ({**HEAD, "kind": "GpuConfig"}, "must have apiVersion"),
        ({**HEAD, "enforcement": "maybe"}, r"enforcement is 'maybe' and must be one of: required, preferred"),
        ({**HEAD, "enforcement": True}, "enforcement is True"),
        ({**HEAD, "sharing": {}}, "unknown key sharing; known keys"),
    ],
)
def test_a_wrong_config_names_its_place_and_the_remedy(parameters: object, says: str) -> None:
    with pytest.raises(ClaimError, match=says):
        settings(a_config(parameters))


def test_a_claim_holds_a_device_only_while_uid_and_allocation_say_so() -> None:
    body, mine = a_body(a_result()), [DeviceRef(PoolName("n/p"), "gpu")]

    assert claims.is_held(body, REF.uid, mine, DRIVER)
    assert not claims.is_held(body, ClaimUid("uid-2"), mine, DRIVER)
    assert not claims.is_held(body, REF.uid, [DeviceRef(PoolName("n/p"), "mig-1g-19-0")], DRIVER)
    assert not claims.is_held({**body, "status": {}}, REF.uid, mine, DRIVER)
    assert not claims.is_held(body, REF.uid, mine, "other")
