"""Eight cards, and eight pods at the same moment."""

from __future__ import annotations

from tests.kit.cluster.bodies import exactly, made_from, pod, profile, template
from tests.kit.cluster.live import Cluster

CARDS, INSTALLED = "h100x8", True
_NAMES = [f"pod-{n}" for n in range(8)]


def test_eight_pods_at_once_have_eight_cards(cluster: Cluster) -> None:
    cluster.create(template("t", exactly("gpu")))
    before = cluster.prepares()

    cluster.create(*(pod(name, made_from("t")) for name in _NAMES))

    cluster.runs(*_NAMES)
    uuids = [cluster.environment(name)["GPUSLICE_GPU_UUID"] for name in _NAMES]
    assert sorted(uuids) == sorted(card.uuid for card in cluster.node.cards)
    assert cluster.prepares()["true"] == before["true"]


def test_eight_pods_take_the_cards_over_from_eight_others(cluster: Cluster) -> None:
    cluster.create(template("t", exactly("gpu")), template("next", exactly("mig", where=profile("7g.80gb"))))
    cluster.create(*(pod(name, made_from("t")) for name in _NAMES))
    cluster.runs(*_NAMES)
    successors = [f"next-{n}" for n in range(8)]
    cluster.create(*(pod(name, made_from("next")) for name in successors))
    for name in successors:
        cluster.has_to_wait(name)

    cluster.delete(*_NAMES)

    cluster.runs(*successors)
    assert len(cluster.partitions()) == len(cluster.records()) == 8
    assert len({device for devices in cluster.allocated().values() for device in devices}) == 8


def test_all_cards_for_one_pod_are_all_or_none(cluster: Cluster) -> None:
    every = exactly("gpu", "gpus")
    every["exactly"] |= {"allocationMode": "All"}
    cluster.create(template("all", every), template("part", exactly("mig", where=profile("1g.10gb"))))
    cluster.create(pod("part", made_from("part")))
    cluster.runs("part")
    cluster.create(pod("all", made_from("all")))
    assert "cannot allocate all claims" in cluster.has_to_wait("all")

    cluster.delete("part")

    cluster.runs("all")
    uuids = {value for key, value in cluster.environment("all").items() if key.endswith("_UUID")}
    assert uuids == {card.uuid for card in cluster.node.cards}


def test_every_mode_at_once_on_cards_of_its_own(cluster: Cluster) -> None:
    modes = {"gpu": 2, "mps": 2, "timeslice": 2, "mig": 4}
    cluster.create(*(template(mode, exactly(mode)) for mode in modes))
    pods = {f"{mode}-{n}": mode for mode, count in modes.items() for n in range(count)}

    cluster.create(*(pod(name, made_from(mode)) for name, mode in pods.items()))

    cluster.runs(*pods)
    held = {name: cluster.allocated()[name][0].rpartition("/")[0] for name in pods}
    of_mode = {mode: {held[name] for name in pods if pods[name] == mode} for mode in modes}
    assert {mode: len(cards) for mode, cards in of_mode.items()} == {"gpu": 2, "mps": 1, "timeslice": 1, "mig": 1}
    assert len(set.union(*of_mode.values())) == 5
