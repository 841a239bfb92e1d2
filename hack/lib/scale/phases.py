"""What a fleet of drivers costs a real API server: at its start, after an outage, and when its pools change their shape.

The nodes are only objects. For each node, the product's own controller and publisher run over simulated cards.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpuslice.core.inventory import Inventory
from gpuslice.core.policy.rules import Policy

from hack.lib.api import CLAIMS, ApiServer, Body, RequestError
from hack.lib.scale import control
from hack.lib.scale.errors import ScaleError
from hack.lib.scale.figures import Phase, Stamp, Usage, report, spent, usage
from hack.lib.scale.fleet import CARDS, DRIVER, FleetNode, cards, create_nodes
from hack.lib.scale.publishers import Publishers, publishers

NODES = 200
_LOOK_S = 1.0  # between two looks at the fleet, because it sends no events
LIMIT_S = 600.0  # the longest time of a phase
_HOLD_S = 35.0  # long enough for a look of each driver at its node while claims hold pools
_HELD = 4  # claims hold a pool on one of this many nodes
_CARD = 1  # the card whose pool they hold
_BEFORE, _AFTER = ({"modes": ["gpu", "mig"]}, {"modes": ["gpu"]})

Say = Callable[[str], None]


class _EndlessError(ScaleError):
    """A phase that did not end within the limit. Its figures until then count."""


def measure(*, nodes: int, claims: int, outage_s: int, limit_s: float, tree: Path, say: Say) -> dict[str, Any]:
    """The report. It ends with the first phase that takes longer than `limit_s`."""
    with control.running(), tempfile.TemporaryDirectory(prefix="gpuslice-fleet-") as folder:
        path = control.kubeconfig()
        with contextlib.closing(ApiServer.of_kubeconfig(path)) as api:
            made = create_nodes(api, nodes)
            say(f"{claims} claims of others")
            api_claims(api, (_claim(f"other-{number}", "another/pool") for number in range(claims)))
            with publishers(path, Path(folder), nodes, tree) as fleet:
                run = _Run(api, fleet, nodes, limit_s, say)
                try:
                    run.start()
                    run.outage(outage_s)
                    run.change(made)
                except _EndlessError as e:
                    say(str(e))
    size = {"nodes": nodes, "cards": CARDS, "claims": claims, "outage_s": outage_s, "tree": str(tree)}
    return report(run.phases, size)


@dataclass
class _Run:
    api: ApiServer
    fleet: Publishers
    nodes: int
    limit_s: float
    say: Say
    phases: list[Phase] = field(default_factory=list)
    _done: float = 0.0

    def start(self) -> None:
        with self._phase("start"):
            self.fleet.order("start", policy=_policy(_BEFORE))
            self._until("all is published", lambda: self.fleet.published == self.nodes)

    def outage(self, outage_s: int) -> None:
        """End the API server for a while. Each node loses a card meanwhile, so that there is something to publish.

        The phase ends when all nodes have published and listed again. Each node lists after a restart of its only API
        server.
        """
        control.end_api_server()
        self.fleet.order("lose a card")
        time.sleep(outage_s)
        self.fleet.order("look")
        self.fleet.stamps.clear()
        with self._phase("after an outage", anew=True):
            control.start_api_server()
            self.api.close()
            self._until("all is published", lambda: self.fleet.published == self.nodes)
            self._until("all nodes have listed", self._listed, mark=False)

    def change(self, made: Sequence[FleetNode]) -> None:
        """Change to a policy without partitions. Claims that are allocated and never prepared hold a pool of some nodes."""
        inventory = Inventory.of(cards(), Policy.parse(_policy(_BEFORE)), "node")
        card = inventory.pools[_CARD].name.partition("/")[2]
        holders = [(f"holder-{node.name}", f"{node.name}/{card}") for node in made[::_HELD]]
        api_claims(self.api, (_claim(*holder) for holder in holders))
        self.fleet.order("look")
        self.fleet.stamps.clear()
        with self._phase("pools change, some held"):
            self.fleet.order("start", policy=_policy(_AFTER))
            self._until(
                "no other pool waits",
                lambda: self.fleet.published == self.nodes and self.fleet.counters == len(holders),
            )
            time.sleep(_HOLD_S)
            self.fleet.order("look")
            if self.fleet.counters != len(holders):
                raise ScaleError(f"{len(holders)} claims hold pools, but {self.fleet.counters} kept their shape")
        with self._phase("the holders leave"):
            for name, _ in holders:
                self.api.ask("DELETE", f"{CLAIMS}/{name}")
            self._until(
                "all pools have changed", lambda: self.fleet.published == self.nodes and not self.fleet.counters
            )

    @contextlib.contextmanager
    def _phase(self, name: str, *, anew: bool = False) -> Iterator[None]:
        """`anew`: the API server starts in this phase, so its figures begin at zero."""
        self.say(name)
        used, before = (0.0, Usage()) if anew else self._figures()
        began = time.time()
        endless = None
        try:
            yield
        except _EndlessError as e:
            endless = e
        lasted_s = time.time() - began
        now, after = self._figures()
        self.phases.append(
            Phase(
                name=name,
                began=began,
                took_s=None if endless else self._done - began,
                lasted_s=lasted_s,
                cpu_s=now - used,
                stamps=tuple(self.fleet.stamps),
                usage=spent(before, after),
            )
        )
        self.fleet.stamps.clear()
        if endless:
            raise endless

    def _figures(self) -> tuple[float, Usage]:
        return control.cpu_s(control.api_server_pid()), usage(self.api.text("/metrics"))

    def _until(self, what: str, done: Callable[[], bool], *, mark: bool = True) -> None:
        """`mark`: this moment ends the measured time of the phase. The phase itself may go on."""
        end = time.monotonic() + self.limit_s
        while True:
            self.fleet.order("look")
            if done():
                self._done = time.time() if mark else self._done
                return
            if time.monotonic() > end:
                raise _EndlessError(
                    f"it took longer than {self.limit_s:.0f} s until {what}: {self.fleet.published} of {self.nodes} nodes "
                    f"have published, {self.fleet.counters} pools have counters"
                )
            time.sleep(_LOOK_S)

    def _listed(self) -> bool:
        return len(listing(self.fleet.stamps)) == self.nodes


def listing(stamps: Sequence[Stamp]) -> set[int]:
    """The nodes that have listed their slices."""
    return {stamp.node for stamp in stamps if (stamp.verb, stamp.resource) == ("list", "resourceslices")}


def api_claims(api: ApiServer, claims: Iterator[Body]) -> None:
    """Create allocated claims, as the scheduler leaves them."""
    bodies = list(claims)
    api.create(CLAIMS, ({key: body[key] for key in ("metadata", "spec")} for body in bodies))
    try:
        api.merge((f"{CLAIMS}/{body['metadata']['name']}/status", {"status": body["status"]}) for body in bodies)
    except RequestError as e:
        raise ScaleError(f"the API server does not take an allocation: {e}") from e


def _claim(name: str, pool: str) -> Body:
    result = {"request": "r", "driver": DRIVER, "pool": pool, "device": "gpu"}
    return {
        "metadata": {"name": name},
        "spec": {"devices": {"requests": [{"name": "r", "exactly": {"deviceClassName": "gpu.gpuslice.dev"}}]}},
        "status": {"allocation": {"devices": {"results": [result]}}},
    }


def _policy(rules: Body) -> Body:
    return {"apiVersion": "gpuslice.dev/v1alpha1", "kind": "Policy", "default": rules}
