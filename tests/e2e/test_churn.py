"""Many pods that come and go, in all modes, faster than the node is done with them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest

from tests.kit.cluster.bodies import Body, attribute, exactly, made_from, pod, profile, template
from tests.kit.cluster.live import Cluster

_CARDS = (0, 1)


def templates() -> Iterator[Body]:
    """Each kind of request, for each card: what a round asks of a card does not lie in the way of the other's."""
    for card in _CARDS:
        here = f"{attribute('index')} == {card}"
        kinds = {
            "whole": exactly("gpu", where=here),
            "small": exactly("mig", where=f"{here} && {profile('1g.10gb')}"),
            "large": exactly("mig", where=f"{here} && {profile('3g.40gb')}"),
            "mps": exactly("mps", where=here, capacity={"memory": "9Gi", "smPercent": "20"}),
            "turns": exactly("timeslice", where=here, capacity={"memory": "9Gi"}),
            "any": exactly("slice", where=here, capacity={"memory": "9Gi"}),
        }
        yield from (template(f"{kind}-{card}", request) for kind, request in kinds.items())


# What fits on one card, so that the pods of a round all run in the end, when those of the rounds before have left. Partitions
# of one size: small ones that come while others leave may lie so that no large one fits beside them.
_CARDFULS = (("whole",), 3 * ("small",), ("large", "large"), ("mps", "mps"), ("turns", "turns"), ("any",))
_FORCE = ("--force", "--grace-period=0")
_SOFTLY = ("--grace-period=1",)


def delete(cluster: Cluster, pods: Sequence[str], how: tuple[str, ...]) -> None:
    if pods:
        cluster.kubectl("delete", "pod", *pods, *how, "--wait=false")


def log(cluster: Cluster) -> list[str]:
    return (cluster.folder / "log" / "driver.log").read_text().splitlines()


def a_round(cluster: Cluster, dice: random.Random, number: int, fates: Sequence[str]) -> None:
    """Two cards full of pods; each meets its fate, and nobody waits until it is gone."""
    wanted = [f"{kind}-{card}" for card in _CARDS for kind in dice.choice(_CARDFULS)]
    pods = {f"r{number}-{n}-{name}": (name, dice.choice(fates)) for n, name in enumerate(wanted)}

    def meeting(fate: str) -> list[str]:
        return [name for name, (_, met) in pods.items() if met == fate]

    cluster.create(*(pod(name, made_from(chosen)) for name, (chosen, _) in pods.items()))
    delete(cluster, meeting("force at the start"), _FORCE)
    delete(cluster, meeting("at the start"), _SOFTLY)
    running = [*meeting("later"), *meeting("force later")]
    if running:
        cluster.runs(*running)
    delete(cluster, meeting("force later"), _FORCE)
    delete(cluster, meeting("later"), _SOFTLY)


@pytest.mark.timeout(600, func_only=True)
def test_fifty_rounds_of_rough_treatment_leave_nothing(cluster: Cluster) -> None:
    before = len(log(cluster))
    dice = random.Random(50)
    cluster.create(*templates())

    for number in range(50):
        a_round(cluster, dice, number, ("later", "later", "force later", "at the start", "force at the start"))

    cluster.clear()
    assert cluster.get("resourceclaims") == []
    errors = [line for line in log(cluster)[before:] if " ERROR " in line or "Traceback" in line]
    # Of pods that were deleted by force the kubelet learns late, and still wants their claims prepared.
    taken_away = ("does not exist in the API server", "is not allocated")
    assert [line for line in errors if not any(words in line for words in taken_away)] == []


@pytest.mark.timeout(300, func_only=True)
def test_where_pods_leave_in_order_no_prepare_fails(cluster: Cluster) -> None:
    dice = random.Random(8)
    cluster.create(*templates())
    before = cluster.prepares()

    for number in range(8):
        a_round(cluster, dice, number, ("later",))

    cluster.clear()
    after = cluster.prepares()
    assert after["false"] - before["false"] > 8
    assert after["true"] == before["true"]
