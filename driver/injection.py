"""The last two steps of a prepare: what the claim turned out to be, and the CDI file that gives it to containers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from driver import files
from driver.core import cdi, plan
from driver.core.inventory import Inventory
from driver.core.model import ClaimUid, GpuUuid, Grant, LiveGpu, PreparedClaim, PreparedDevice, Record
from driver.host import Host
from driver.nvml.api import Nvml


class Injector:
    def __init__(self, *, host: Host, nvml: Nvml, inventory: Inventory, folder: Path, kind: str) -> None:
        """`folder` is where the container runtime looks for transient specs; `kind` is "<vendor>/<class>"."""
        self._host = host
        self._nvml = nvml
        self._inventory = inventory
        self._folder = files.ensure_folder(folder, 0o755)
        self._kind = kind

    def inject(self, record: Record, live: Mapping[GpuUuid, LiveGpu]) -> Record:
        """Write the claim's CDI file; the record as it is when the claim is ready."""
        prepared = plan.settle(record, live, self._kind)
        self._write(record, prepared, live)
        return replace(record, prepared=prepared)

    def ensure(self, record: Record, live: Mapping[GpuUuid, LiveGpu]) -> None:
        """Write the file of a finished record again if somebody removed it; same text, same names."""
        if record.prepared is not None and not self._path(record.plan.ref.uid).exists():
            self._write(record, record.prepared, live)

    def remove(self, uid: ClaimUid) -> None:
        files.remove(self._path(uid))

    def sweep(self, known: Mapping[ClaimUid, Record]) -> tuple[ClaimUid, ...]:
        """Claims that have a file of ours but no record: what somebody's manual clean-up left."""
        before, after = cdi.file_name(self._kind, "0").split("0.", 1)
        names = (path.name for path in self._folder.glob(f"{before}*.{after}"))
        uids = (ClaimUid(name.removeprefix(before).removesuffix(f".{after}")) for name in names)
        return tuple(sorted(uid for uid in uids if uid not in known))

    def _path(self, uid: ClaimUid) -> Path:
        return self._folder / cdi.file_name(self._kind, uid)

    def _write(self, record: Record, prepared: PreparedClaim, live: Mapping[GpuUuid, LiveGpu]) -> None:
        if not prepared.devices:
            return
        labels = cdi.labels([device.request for device in prepared.devices])
        devices = [
            cdi.CdiDevice(cdi.device_name(record.plan.ref.uid, number), self._edits(grant, device, label, live))
            for number, (grant, device, label) in enumerate(
                zip(record.plan.grants, prepared.devices, labels, strict=True)
            )
        ]
        body = cdi.spec(record.plan.ref.uid, self._kind, devices, self._host.common())
        # Readable by all: a runtime need not run as the user that the driver runs as.
        files.write_atomic(self._path(record.plan.ref.uid), json.dumps(body, separators=(",", ":")), 0o644)

    def _edits(
        self, grant: Grant, device: PreparedDevice, label: str, live: Mapping[GpuUuid, LiveGpu]
    ) -> cdi.Injection:
        pool = self._inventory.pool(grant.gpu)
        profile = pool.gpu.profile(grant.slot.profile) if pool is not None and grant.slot is not None else None
        partition = live[grant.gpu].at(grant.slot) if grant.slot is not None else None
        # The minor is asked for now: a switch of MIG mode may have changed it.
        minor = self._nvml.minor(grant.gpu)
        nodes = self._host.nodes(minor) if partition is None else self._host.nodes(minor, partition.gi, partition.ci)
        whole = None if pool is None else pool.memory_mib
        env = cdi.budget(
            label,
            device=device.device,
            uuid=device.uuid,
            memory_mib=whole if profile is None else profile.memory_mib,
            profile="" if profile is None else profile.name,
        )
        return cdi.Injection(nodes=nodes, env=env)
