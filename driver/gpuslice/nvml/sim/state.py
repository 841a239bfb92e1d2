"""The simulated node on disk: one file for each GPU. Writes take the lock of the file, reads do not.

    node.json       the node's spec and the seed of its UUIDs; written once
    boot_id         a UUID, new at each reboot
    gpu<N>.json     the state of card N; gpu<N>.lock guards changes, gpu<N>.turn is the queue of NVML calls
    cues/ events/   see faults.py

A card's file has a line for each of its states, and the last whole line counts. A new line costs a tenth of a new file,
and simulated hardware must take little of the driver's time. A file that has become long is replaced.

Two processes may use one folder. A reader trusts its cache as long as inode, mtime and size of the file stay the same. The
kernel's clock is too coarse for a replaced file (an inode is used again within a tick), so a replacement gets a larger mtime.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from gpuslice.core import journal
from gpuslice.core.model import LiveGpu, MigUuid, Partition, Placement
from gpuslice.errors import ConfigError, StateError
from gpuslice.nvml.api import ComputeMode, GpuProcess
from gpuslice.nvml.sim.spec import NodeSpec, from_body
from gpuslice.system.files import Version, append, ensure_folder, locked, write_atomic

_LONGEST = 64 * 1024  # bytes of a file that another line is added to


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuState:
    """The present state of one card. `lost`: the card fell off the bus; every call fails until a reset or a reboot."""

    live: LiveGpu
    compute_mode: ComputeMode = ComputeMode.DEFAULT
    time_slice: int = 0
    processes: tuple[GpuProcess, ...] = ()
    lost: bool = False

    def partition(self, gi: int) -> Partition | None:
        return next((p for p in self.live.partitions if p.gi == gi), None)

    def with_partitions(self, partitions: tuple[Partition, ...]) -> GpuState:
        return replace(self, live=replace(self.live, partitions=tuple(sorted(partitions, key=lambda p: p.gi))))

    def with_mig(self, on: bool, *, pending: bool | None = None) -> GpuState:
        return replace(self, live=replace(self.live, mig=on, mig_pending=on if pending is None else pending))


Mutation = Callable[[GpuState], GpuState]


class StateFolder:
    """The folder of one node. `spec` None: use the existing node. A spec that differs from the existing node is refused."""

    def __init__(self, folder: Path, spec: NodeSpec | None) -> None:
        self.path = ensure_folder(folder)
        self._parts: dict[str, Path] = {}
        with locked(folder / "node.lock"):
            if not (folder / "node.json").exists():
                self._create(spec)
            self.spec, self.seed = self._open()
        if spec is not None and spec != self.spec:
            raise ConfigError(
                f"folder {folder} holds another simulated node than --simulate names; "
                f"use another folder, or remove this folder to make a new node"
            )
        self._cache: dict[int, tuple[Version, GpuState]] = {}

    def _create(self, spec: NodeSpec | None) -> None:
        if spec is None:
            raise ConfigError(f"folder {self.path} holds no simulated node; name the cards of one, as in h100x8")
        ensure_folder(self.path / "cues")
        ensure_folder(self.path / "events")
        for index, card in enumerate(spec.cards):
            live = LiveGpu(mig=card.mig, mig_pending=card.mig)
            write_atomic(self._file(index), f"{_encode(GpuState(live=live))}\n")
        write_atomic(self.path / "boot_id", f"{uuid.uuid4()}\n", mode=0o644)
        # Last, because its presence shows that the node is complete.
        body = {"format": 1, "seed": str(uuid.uuid4()), "node": spec.json()}
        write_atomic(self.path / "node.json", json.dumps(body, indent=1) + "\n")

    def _open(self) -> tuple[NodeSpec, uuid.UUID]:
        path = self.path / "node.json"
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
            return from_body(str(path), body["node"]), uuid.UUID(body["seed"])
        except (OSError, ValueError, LookupError, TypeError) as e:
            raise StateError(f"{path} is not a simulated node ({e}); remove its folder to make a new node") from e

    def _file(self, index: int) -> Path:
        return self._part(f"gpu{index}.json")

    def _part(self, name: str) -> Path:
        """A file of the folder. Cached: each call on a GPU needs some of them, and a Path costs as much as the use of
        its file."""
        path = self._parts.get(name)
        if path is None:
            path = self._parts[name] = self.path / name
        return path

    def read(self, index: int) -> GpuState:
        """The card's state, from the cache if the file is unchanged."""
        path = self._file(index)
        try:
            key = Version.of(os.stat(path))  # noqa: PTH116  twice as fast as Path.stat; `look` needs nothing else
            held = self._cache.get(index)
            if held is not None and held[0] == key:
                return held[1]
            state = _decode(json.loads(_last(path.read_bytes())))
        except (OSError, ValueError, LookupError, TypeError) as e:
            raise StateError(
                f"{path} does not describe a simulated GPU ({e}); remove its folder to make a new node"
            ) from e
        self._cache[index] = (key, state)
        return state

    def change(self, index: int, change: Mutation) -> GpuState:
        """Apply `change` to the card's state under its lock and return the result. After an error, the state is unchanged."""
        path = self._file(index)
        with locked(self._part(f"gpu{index}.lock")):
            state = change(self.read(index))
            before = self._cache[index][0]
            if before.size < _LONGEST:
                version = append(path, journal.entry(_encode(state)))
            else:
                version = write_atomic(path, f"{_encode(state)}\n", mtime_ns=max(time.time_ns(), before.mtime_ns + 1))
            self._cache[index] = (version, state)
            return state

    @contextmanager
    def turn(self, index: int | None) -> Iterator[None]:
        """Wait for this card's turn, or with None for the whole node's turn. The queue includes all processes."""
        with locked(self._part("node.turn" if index is None else f"gpu{index}.turn")):
            yield

    def boot_id(self) -> str:
        return (self.path / "boot_id").read_text(encoding="utf-8").strip()

    def new_boot(self) -> None:
        write_atomic(self.path / "boot_id", f"{uuid.uuid4()}\n", mode=0o644)


def _last(data: bytes) -> bytes:
    """The last state. 0.1.0 wrote one state without the end of its line, and whole."""
    return journal.last(data) if b"\n" in data else data


def _encode(state: GpuState) -> str:
    live = state.live
    body = {
        "mig": live.mig,
        "migPending": live.mig_pending,
        "computeMode": int(state.compute_mode),
        "timeSlice": state.time_slice,
        "lost": state.lost,
        "partitions": [
            {
                "profile": p.profile,
                "start": p.placement.start,
                "size": p.placement.size,
                "gi": p.gi,
                "ci": p.ci,
                "uuid": p.uuid,
            }
            for p in live.partitions
        ],
        "processes": [
            {"pid": p.pid, "name": p.name, "gi": p.gi, "ci": p.ci, "usedBytes": p.used_bytes} for p in state.processes
        ],
    }
    return json.dumps(body)


def _decode(body: Mapping[str, object]) -> GpuState:
    partitions = cast("list[dict[str, int]]", body["partitions"])
    processes = cast("list[dict[str, int]]", body["processes"])
    live = LiveGpu(
        mig=body["mig"] is True,
        mig_pending=body["migPending"] is True,
        partitions=tuple(_partition(p) for p in partitions),
    )
    return GpuState(
        live=live,
        compute_mode=ComputeMode(cast("int", body["computeMode"])),
        time_slice=cast("int", body.get("timeSlice", 0)),  # a node of an earlier release has no such key
        processes=tuple(
            GpuProcess(pid=p["pid"], name=str(p["name"]), gi=p["gi"], ci=p["ci"], used_bytes=p["usedBytes"])
            for p in processes
        ),
        lost=body["lost"] is True,
    )


def _partition(body: Mapping[str, int | str | None]) -> Partition:
    ci, uuid_ = body["ci"], body["uuid"]
    return Partition(
        profile=cast("int", body["profile"]),
        placement=Placement(cast("int", body["start"]), cast("int", body["size"])),
        gi=cast("int", body["gi"]),
        ci=cast("int | None", ci),
        uuid=None if uuid_ is None else MigUuid(str(uuid_)),
    )
