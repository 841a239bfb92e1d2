"""What an installed driver leaves on a cluster: in the API, and as files, mounts and processes of the node."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

from hack.lib.cluster.installed import NAMESPACE
from tests.kit.cluster.bodies import Body
from tests.kit.cluster.live import Cluster

WITHIN_S = 60.0
_GLANCE_S = 1.0  # pause of a poll, because no event says that nothing is left
_NOT_OURS = {"events", "events.events.k8s.io", "componentstatuses", "bindings"}


def nothing_within(cluster: Cluster, within_s: float = WITHIN_S) -> float:
    """Return after how many seconds nothing is left. AssertionError with all that is left after `within_s`."""
    began = time.monotonic()
    while found := left(cluster):
        assert time.monotonic() - began < within_s, f"left after {within_s:.0f} s: {found}"
        time.sleep(_GLANCE_S)
    return time.monotonic() - began


def left(cluster: Cluster) -> list[str]:
    return sorted((*_objects(cluster), *_files(cluster), *_mounts(cluster), *_processes(cluster)))


def _objects(cluster: Cluster) -> Iterator[str]:
    """Every object of the API that says our name. The namespace was made by the user, and the node keeps the image."""
    kinds = set(cluster.kubectl("api-resources", "--verbs=list", "--output=name").split()) - _NOT_OURS
    listed: Body = json.loads(cluster.kubectl("get", ",".join(sorted(kinds)), "--all-namespaces", "--output=json"))
    for item in listed["items"]:
        if item["kind"] == "Node":
            item["status"].pop("images", None)
        meta = item["metadata"]
        if "gpuslice" in json.dumps(item).replace(NAMESPACE, "") and (item["kind"], meta["name"]) != (
            "Namespace",
            NAMESPACE,
        ):
            yield f"{item['kind']} {meta.get('namespace', '')}/{meta['name']}"


def _files(cluster: Cluster) -> Iterator[str]:
    node = Path(f"/proc/{cluster.outlives}/root")
    folders = (
        cluster.folder / "kubelet" / "plugins",
        cluster.folder / "kubelet" / "plugins_registry",
        cluster.folder / "cdi",
        node / "run",
        node / "var/run/cdi",
    )
    for folder in folders:
        for path in folder.iterdir() if folder.is_dir() else ():
            if "gpuslice" in path.name:
                yield f"file {path}"


def _mounts(cluster: Cluster) -> Iterator[str]:
    for line in Path(f"/proc/{cluster.outlives}/mountinfo").read_text().splitlines():
        place = line.split()[4]
        if "gpuslice.dev" in place or "/run/gpuslice" in place:
            yield f"mount {place}"


def _processes(cluster: Cluster) -> Iterator[str]:
    """The processes of the driver's programs and of MPS, among those of the node."""
    inside = Path(f"/proc/{cluster.outlives}/ns/pid").stat().st_ino
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            space = (folder / "ns" / "pid_for_children").stat().st_ino
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue  # it has ended
        ours = {"gpuslice"} & {Path(word).name for word in words[:4]} or "mps" in words[0]
        if ours and (space == inside or _below(folder, inside)):
            yield f"process {' '.join(words)[:80]}"


def _below(folder: Path, inside: int) -> bool:
    """Whether a process of a container is one of this cluster: some parent of it has the cluster's process ids."""
    pid = folder.name
    while pid not in ("0", "1"):
        try:
            if Path(f"/proc/{pid}/ns/pid").stat().st_ino == inside:
                return True
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return False
        pid = next(line.split()[1] for line in status.splitlines() if line.startswith("PPid:"))
    return False
