"""Publishers, pools and an API server that shows the pools, for the tests of publishing."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gpuslice.checkpoint import Checkpoint
from gpuslice.core.inventory import Inventory
from gpuslice.core.model import PoolName
from gpuslice.core.pools.backoff import DEFAULT_BACKOFF, BackoffConfig
from gpuslice.core.pools.pool import PoolSlices
from gpuslice.kube import Kube
from gpuslice.publishing.controller import SliceController
from gpuslice.publishing.node_health import NodeHealth
from gpuslice.publishing.publisher import Publisher
from gpuslice.standin.apiserver import StandInApiServer
from gpuslice.system.threads import ThreadWatch

from tests.kit.rig import Rig

DRIVER, NODE = "gpuslice.dev", "n1"
FAST = BackoffConfig(
    quiet_s=0.02,
    quiet_most_s=0.1,
    retry_s=0.02,
    retry_most_s=0.1,
    spread_s=0.1,
    version_s=0.2,
    confirm_s=0.05,
    missing_most_s=0.4,
)
TAINT = {"key": "gpuslice.dev/xid", "value": "79", "effect": "NoSchedule"}


@contextmanager
def an_api_server(folder: Path, version: str = "1.37", dropping: tuple[str, ...] = ()) -> Iterator[StandInApiServer]:
    """An API server with our node."""
    with StandInApiServer(folder, version, dropping=dropping) as server:
        server.add_node(NODE)
        yield server


@contextmanager
def a_publisher(
    server: StandInApiServer, backoff: BackoffConfig = FAST, *, registered: bool = False
) -> Iterator[Publisher]:
    """`registered`: a kubelet has registered before its start."""
    kube = Kube(server.kubeconfig)
    publisher = Publisher(kube, DRIVER, NODE, backoff=backoff)
    if registered:
        publisher.catch_up()
    publisher.start()
    try:
        yield publisher
    finally:
        publisher.stop()
        kube.close()


@contextmanager
def a_controller(
    server: StandInApiServer,
    rig: Rig,
    folder: Path,
    on_taints_changed: Callable[[], object] = lambda: None,
    checkpoint: Checkpoint | None = None,
    threads: ThreadWatch | None = None,
    backoff: BackoffConfig = DEFAULT_BACKOFF,
    kubelet_s: float = 0.0,
) -> Iterator[SliceController]:
    """A controller that runs over this node. Its shapes are in `folder`."""
    kube, checkpoint = Kube(server.kubeconfig), checkpoint or rig.checkpoint
    controller = SliceController(
        kube=kube,
        driver=DRIVER,
        node=NODE,
        dynamic=Inventory.of(rig.gpus, rig.policy, NODE),
        static=Inventory.of(rig.gpus, rig.policy, NODE, static=True),
        health=NodeHealth(nvml=rig.nvml, mps=rig.mps, checkpoint=checkpoint, hung=dict),
        checkpoint=checkpoint,
        folder=folder,
        on_taints_changed=on_taints_changed,
        threads=threads,
        backoff=backoff,
        kubelet_s=kubelet_s,
    )
    controller.start()
    try:
        yield controller
    finally:
        controller.stop()
        kube.close()


def a_pool(*names: str, pool: str = "n1/a", **fields: object) -> PoolSlices:
    """A slice of counters and a slice of devices that consume them."""
    uses = [{"counterSet": "card", "counters": {"m": {"value": "1"}}}]
    devices = [{"name": name, "consumesCounters": uses, **fields} for name in names]
    counters = {"sharedCounters": [{"name": "card", "counters": {"m": {"value": "2"}}}]}
    return PoolSlices(PoolName(pool), (counters, {"devices": devices}))


def plain(*names: str, pool: str = "n1/a", **fields: object) -> PoolSlices:
    """One slice of devices without counters."""
    return PoolSlices(PoolName(pool), ({"devices": [{"name": name, **fields} for name in names]},))


def publish_and_wait(publisher: Publisher, *pools: PoolSlices) -> None:
    publisher.publish(pools)
    assert publisher.published.wait(10), publisher.status


def shown(server: StandInApiServer) -> list[str]:
    """Devices that the API shows, with their pools."""
    bodies = server.all("resourceslices")
    return sorted(f"{b['spec']['pool']['name']}/{d['name']}" for b in bodies for d in b["spec"].get("devices", []))


def asked(server: StandInApiServer, part: str) -> int:
    return sum(part in request.target for request in server.requests)


def wipe(server: StandInApiServer) -> None:
    """Delete the slices like the kubelet at its start, in one request: nobody deletes or creates one in between."""
    with server.store.changed:
        for body in server.all("resourceslices"):
            server.delete("resourceslices", body["metadata"]["name"])


def look_again(server: StandInApiServer) -> None:
    """Refuse all watches until the publisher has listed and compared a few more times."""
    lists = asked(server, "limit=")
    server.away()
    server.fail(410, times=5, path="watch=true")
    server.back()
    server.wait(lambda: asked(server, "limit=") > lists + 3)


class _Logged(logging.Handler):
    """Sets an event at a line of the log."""

    def __init__(self, words: str) -> None:
        super().__init__()
        self._words, self.seen = words, threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if self._words in record.getMessage():
            self.seen.set()


@contextmanager
def a_line(words: str) -> Iterator[threading.Event]:
    """An event that a log line with these words sets."""
    handler, logger = _Logged(words), logging.getLogger("gpuslice.publishing")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield handler.seen
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)
