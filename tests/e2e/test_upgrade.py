"""An upgrade of the cluster under a running driver: partitions come with the release that keeps counters, and claims stay."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hack.lib.cluster.binaries import Binaries
from hack.lib.cluster.versions import VERSIONS
from tests.kit.cluster.bodies import exactly, made_from, pod, profile, template
from tests.kit.cluster.live import Cluster
from tests.kit.cluster.trouble import hack_cluster

SINCE, UNTIL = (1, 35), (1, 35)
_STEPS = tuple(version for version in reversed(VERSIONS) if not version.startswith("1.35."))
_MISSING = [version for version in _STEPS if Binaries(version).missing()]
_WITHIN_S = 150.0  # the driver looks at the version about once a minute, and a kubelet's start wipes the slices


@pytest.fixture
def old(cluster: Cluster) -> Iterator[Cluster]:
    """A cluster of the old release. Other tests of this release cannot use it afterwards."""
    try:
        yield cluster
    finally:
        cluster.spoiled = "it was upgraded"


@pytest.mark.timeout(900, func_only=True)
@pytest.mark.skipif(bool(_MISSING), reason=f"not built: {_MISSING}; run hack/cluster build --version for each")
def test_partitions_come_with_the_upgrade_and_the_claims_of_before_stay(old: Cluster) -> None:
    old.create(template("whole", exactly("gpu")), pod("before", made_from("whole")))
    old.runs("before")
    driver, told, held = old.process("driver"), old.environment("before"), old.allocated()["before"]
    (record,) = old.records()

    for number, version in enumerate(_STEPS):
        hack_cluster("upgrade", "--version", version)

        free = old.until(
            "resourceslices", shows="{.spec.devices[*].name}", wanted=lambda names: "mig-" in names, within_s=_WITHIN_S
        )
        assert "gpu" in free.split()
        part = f"part-{number}"
        old.create(template(part, exactly("mig", where=profile("1g.10gb"))), pod(part, made_from(part)))
        old.runs(part)
        assert old.process("driver") == driver, "the driver was started again"
        assert record in old.records()
        assert (old.environment("before"), old.allocated()["before"]) == (told, held)
        waits = f"waits-{number}"
        old.create(template(waits, exactly("gpu")), pod(waits, made_from(waits)))
        old.has_to_wait(waits)  # one card is held as a whole, the other one has a partition
        old.delete(waits)

    old.delete("before", *(f"part-{number}" for number in range(len(_STEPS))))
    old.nothing_stays()
    card = held[0].rpartition("/")[0]
    old.until(
        "resourceslices",
        shows="{.spec.pool.name} {.spec.devices[*].name}",
        wanted=lambda text: text.startswith(f"{card} ") and "mig-" in text,
        within_s=_WITHIN_S,
    )
