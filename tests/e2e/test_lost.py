"""A card that falls off the bus, as a user sees it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from tests.kit.cluster.bodies import attribute, exactly, inside, made_from, pod, profile, template
from tests.kit.cluster.live import Cluster

_POOL = "node1/0000-0a-00-0"
_ON_IT = f"{attribute('index')} == 0 && {profile('1g.10gb')}"


@contextlib.contextmanager
def lost(cluster: Cluster) -> Iterator[None]:
    """While this lasts the first card is away, and everybody can see it."""
    card = cluster.node.cards[0].uuid
    cluster.node.lose(card)
    try:
        _sees(cluster, tainted=True)
        yield
    finally:
        cluster.node.reset(card)
        _sees(cluster, tainted=False)


def _sees(cluster: Cluster, *, tainted: bool) -> None:
    """Return when the slices say so."""
    _have_it_look(cluster)
    shows = "{.spec.pool.name} {.spec.devices[0].name} {.spec.devices[*].taints[*].value}"

    def wanted(line: str) -> bool:
        pool, _, rest = line.partition(" ")
        device, _, values = rest.partition(" ")
        return pool == _POOL and bool(device) and ("lost" in values) == tainted

    cluster.until("resourceslices", shows=shows, wanted=wanted, within_s=60)


def _have_it_look(cluster: Cluster) -> None:
    """The driver looks at its cards every half minute, and at once when a claim leaves; this one is in nobody's way."""
    namespace = cluster.namespace(**{"resource.kubernetes.io/admin-access": "true"})
    request = exactly("monitor", where=f"{attribute('index')} == 1")
    request["exactly"]["adminAccess"] = True
    cluster.create(*inside(namespace, template("t", request), pod("look", made_from("t"))))
    cluster.runs("look", namespace=namespace)
    cluster.delete("look", namespace=namespace)


def test_a_card_that_is_lost_takes_no_pod_until_it_is_back(cluster: Cluster) -> None:
    cluster.create(template("t", exactly("gpu")))

    with lost(cluster):
        cluster.create(pod("one", made_from("t")))
        cluster.runs("one")
        assert cluster.environment("one")["GPUSLICE_GPU_UUID"] == cluster.node.cards[1].uuid
        cluster.create(pod("two", made_from("t")))
        assert "cannot allocate all claims" in cluster.has_to_wait("two")

    cluster.runs("two")
    assert cluster.environment("two")["GPUSLICE_GPU_UUID"] == cluster.node.cards[0].uuid


def test_a_pod_that_waits_for_a_card_waits_on_when_it_is_lost_and_runs_when_it_is_back(cluster: Cluster) -> None:
    only_there = f"{attribute('uuid')} == '{cluster.node.cards[0].uuid}'"
    cluster.create(template("t", exactly("gpu", where=only_there)), pod("one", made_from("t")))
    cluster.runs("one")
    cluster.create(pod("two", made_from("t")))
    cluster.has_to_wait("two")

    with lost(cluster):
        cluster.delete("one")
        assert "cannot allocate all claims" in cluster.has_to_wait("two")

    cluster.runs("two")


def test_a_pod_on_a_card_that_is_lost_can_be_deleted_and_leaves_nothing_when_the_card_is_back(cluster: Cluster) -> None:
    """Whoever wants to drain the node and reboot it has to be rid of its pods before."""
    cluster.create(template("t", exactly("mig", where=_ON_IT)), pod("one", made_from("t")))
    cluster.runs("one")

    with lost(cluster):
        cluster.delete("one")
        assert cluster.cdi_files() == []

    cluster.nothing_stays()
    cluster.create(pod("two", made_from("t")))
    cluster.runs("two")
