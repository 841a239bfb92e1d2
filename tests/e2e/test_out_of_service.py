"""An operator takes one card out of service by a DeviceTaintRule on its pool, and brings it back."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

import yaml

from tests.kit.cluster.bodies import attribute, exactly, made_from, pod, profile, template
from tests.kit.cluster.live import EXAMPLES, Cluster
from tests.kit.cluster.trouble import wait_cleared, wait_deleted

SINCE = (1, 37)  # the API of the rule is on by default, in v1
_FILE = EXAMPLES / "operator/card-out-of-service.yaml"
_RULE = "devicetaintrule/card-out-of-service"
_POOL = yaml.safe_load(_FILE.read_text(encoding="utf-8"))["spec"]["deviceSelector"]["pool"]
_SMALL = profile("1g.10gb")


@contextlib.contextmanager
def the_rule(cluster: Cluster) -> Iterator[None]:
    """While this lasts the rule of the example is there; it begins with `effect: None`."""
    cluster.kubectl("apply", "-f", str(_FILE))
    try:
        yield
    finally:
        cluster.kubectl("delete", _RULE)


def _to(cluster: Cluster, effect: str) -> None:
    cluster.kubectl("patch", _RULE, "--type=merge", "--patch", json.dumps({"spec": {"taint": {"effect": effect}}}))


def _start(cluster: Cluster, *names: str) -> None:
    cluster.create(*(pod(name, made_from(name.partition("-")[0])) for name in names))


def _templates(cluster: Cluster) -> None:
    """Partitions of the card of the rule ("here"), of the other card ("there"), and of any."""
    cluster.create(
        template("here", exactly("mig", where=f"{_SMALL} && {attribute('index')} == 0")),
        template("there", exactly("mig", where=f"{_SMALL} && {attribute('index')} == 1")),
        template("any", exactly("mig", where=_SMALL)),
    )


def test_a_rule_without_effect_counts_the_pods_that_would_be_evicted(cluster: Cluster) -> None:
    _templates(cluster)
    _start(cluster, "here-1", "here-2", "there-1")
    cluster.runs("here-1", "here-2", "there-1")

    with the_rule(cluster):
        said = cluster.until(
            _RULE, shows="{.status.conditions[?(@.type=='EvictionInProgress')].message}", wanted=lambda text: bool(text)
        )
        _start(cluster, "here-3")

        cluster.runs("here-1", "here-2", "here-3", "there-1")
    assert "2 pods would be evicted" in said


def test_without_new_claims_the_pods_of_the_card_run_on(cluster: Cluster) -> None:
    _templates(cluster)
    _start(cluster, "here-1")
    cluster.runs("here-1")

    with the_rule(cluster):
        _to(cluster, "NoSchedule")
        _start(cluster, "here-2")

        assert "cannot allocate all claims" in cluster.has_to_wait("here-2")
        cluster.runs("here-1")
    cluster.runs("here-2")


def test_pods_of_a_card_out_of_service_are_evicted_and_new_ones_get_the_other_card_until_the_rule_goes(
    cluster: Cluster,
) -> None:
    _templates(cluster)
    _start(cluster, "here-1", "there-1")
    cluster.runs("here-1", "there-1")

    with the_rule(cluster):
        _to(cluster, "NoExecute")
        wait_deleted(cluster, "here-1")
        _start(cluster, "any-1", "here-2")
        cluster.runs("any-1", "there-1")
        cluster.has_to_wait("here-2")

        held = cluster.allocated()
        assert not any(device.startswith(f"{_POOL}/") for devices in held.values() for device in devices)
        assert {partition.uuid for partition in cluster.node.look(cluster.node.cards[0].uuid).partitions} == set()
        assert len(cluster.records()) == len(cluster.cdi_files()) == 2

    cluster.runs("here-2")
    assert cluster.allocated()["here-2"][0].startswith(f"{_POOL}/")
    cluster.delete("here-2", "any-1", "there-1")
    wait_cleared(cluster)
