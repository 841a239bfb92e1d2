"""The last two steps of a prepare: the devices of the claim, and the CDI file that gives the devices to containers."""

from __future__ import annotations

import json
import logging
from collections.abc import Container, Mapping
from dataclasses import replace
from pathlib import Path

from gpuslice.core import cdi, plan, share
from gpuslice.core.inventory import Inventory
from gpuslice.core.model import ClaimUid, GpuUuid, LiveGpu, MigProfile, Monitor, Mps, Partition
from gpuslice.core.record import Grant, PreparedClaim, PreparedDevice, Record
from gpuslice.core.share import Share
from gpuslice.errors import DeviceError, StateError
from gpuslice.mps.api import MpsDaemons
from gpuslice.nvml.api import Code, Nvml
from gpuslice.system import files, refusals
from gpuslice.system.files import Identity
from gpuslice.system.host import Host
from gpuslice.system.spares import Spares

log = logging.getLogger(__name__)

_MODE = 0o644


class CdiWriter:
    def __init__(
        self, *, host: Host, nvml: Nvml, mps: MpsDaemons, inventory: Inventory, folder: Path, kind: str
    ) -> None:
        """`folder`: the runtime's folder of transient specs. `kind`: "<vendor>/<class>"."""
        self._host = host
        self._nvml = nvml
        self._mps = mps
        self._inventory = inventory
        self._folder = files.ensure_folder(folder, 0o755)
        self._kind = kind
        self._intact: dict[ClaimUid, Identity | None] = {}  # the files that this process has written or compared
        # Readable by all users, because a runtime may run as another user than the driver.
        self.spares = Spares(self._folder, _MODE)

    def inject(self, record: Record, live: Mapping[GpuUuid, LiveGpu]) -> Record:
        """Write the claim's CDI file. Returns the record of the ready claim."""
        prepared = plan.prepared_claim(record, live, self._kind)
        if prepared.devices:
            self._write(record.plan.ref.uid, self._text(record, prepared, live))
        return replace(record, prepared=prepared)

    def ensure(self, record: Record, live: Mapping[GpuUuid, LiveGpu]) -> None:
        """Make the file of a finished record a plain file with the same text and mode as before, if it is not one now."""
        uid = record.plan.ref.uid
        if record.prepared is None or self._is_intact(record):
            return
        text = self._text(record, record.prepared, live)
        if files.holds(self._path(uid), text, _MODE):
            self._intact[uid] = Identity.at(self._path(uid))
            return
        files.ensure_folder(self._folder, 0o755)
        log.warning("writing the CDI file again, because it was gone or changed claim=%s", record.plan.ref)
        self._write(uid, text)

    def doubtful(self, records: Mapping[ClaimUid, Record]) -> tuple[ClaimUid, ...]:
        """Finished claims whose file may have changed. Takes one stat(2) for each claim."""
        return tuple(uid for uid, record in records.items() if record.prepared and not self._is_intact(record))

    def _is_intact(self, record: Record) -> bool:
        if record.prepared is None or not record.prepared.devices:
            return True
        uid = record.plan.ref.uid
        there = Identity.at(self._path(uid))
        return there is not None and there == self._intact.get(uid)

    def remove(self, uid: ClaimUid) -> None:
        self._intact.pop(uid, None)
        files.remove(self._path(uid))

    def sweep(self, known: Container[ClaimUid]) -> tuple[ClaimUid, ...]:
        """Claims with a file of ours but no record: the rest of a manual clean-up."""
        before, after = cdi.file_name(self._kind, "0").split("0.", 1)
        with refusals.translated("read", self._folder):
            names = [path.name for path in self._folder.glob(f"{before}*.{after}")]
        uids = (ClaimUid(name.removeprefix(before).removesuffix(f".{after}")) for name in names)
        return tuple(sorted(uid for uid in uids if uid not in known))

    def _path(self, uid: ClaimUid) -> Path:
        return self._folder / cdi.file_name(self._kind, uid)

    def _text(self, record: Record, prepared: PreparedClaim, live: Mapping[GpuUuid, LiveGpu]) -> str:
        grants, uid = record.plan.grants, record.plan.ref.uid
        if len(grants) != len(prepared.devices):
            raise StateError(
                f"the record of claim {record.plan.ref} has {len(grants)} grants and {len(prepared.devices)} devices; delete "
                "the pod to have it prepared again"
            )
        labels = cdi.labels([device.request for device in prepared.devices])
        devices = [
            cdi.CdiDevice(cdi.device_name(uid, number), self._edits(grant, device, label, live))
            for number, (grant, device, label) in enumerate(zip(grants, prepared.devices, labels, strict=True))
        ]
        return json.dumps(cdi.spec(uid, self._kind, devices, self._host.common()), separators=(",", ":"))

    def _write(self, uid: ClaimUid, text: str) -> None:
        files.write_atomic(self._path(uid), text, _MODE, spares=self.spares)
        self._intact[uid] = Identity.at(self._path(uid))

    def _edits(
        self, grant: Grant, device: PreparedDevice, label: str, live: Mapping[GpuUuid, LiveGpu]
    ) -> cdi.ContainerEdits:
        partition = live[grant.gpu].at(grant.slot) if grant.slot is not None else None
        nodes = self._nodes(grant, partition)
        part = share.of(grant)
        client = self._client(grant, part)
        env = cdi.limit_env(
            label,
            device=device.device,
            uuid=device.uuid,
            enforcement=share.enforcement(grant.sharing),
            memory_mib=self._memory_mib(grant) if part is None else part.memory_mib,
            percent=0 if part is None else part.percent,
            profile=self._profile_name(grant),
        )
        return replace(client, nodes=nodes, env={**client.env, **env})

    def _nodes(self, grant: Grant, partition: Partition | None) -> tuple[cdi.DeviceNode, ...]:
        """Device nodes of the card or the partition. None for a monitored card that is lost or never had a device node."""
        try:
            # The minor is read now, because a switch of MIG mode may have changed it.
            minor = self._nvml.minor(grant.gpu)
        except DeviceError as e:
            if (
                isinstance(grant.sharing, Monitor)
                and partition is None
                and e.code in (Code.GPU_IS_LOST, Code.NOT_SUPPORTED)
            ):
                return ()
            raise
        return self._host.nodes(minor) if partition is None else self._host.nodes(minor, partition.gi, partition.ci)

    def _client(self, grant: Grant, part: Share | None) -> cdi.ContainerEdits:
        if not isinstance(grant.sharing, Mps) or part is None:
            return cdi.ContainerEdits()
        key = share.daemon_key(grant.gpu, grant.slot)
        return cdi.mps_client(
            str(self._mps.pipe(key)), str(self._mps.shm(key)), memory_mib=part.memory_mib, percent=part.percent
        )

    def _profile(self, grant: Grant) -> MigProfile | None:
        pool = self._inventory.pool(grant.gpu)
        return None if pool is None or grant.slot is None else pool.gpu.profile(grant.slot.profile)

    def _profile_name(self, grant: Grant) -> str:
        profile = self._profile(grant)
        return "" if profile is None else profile.name

    def _memory_mib(self, grant: Grant) -> int | None:
        profile, pool = self._profile(grant), self._inventory.pool(grant.gpu)
        if profile is not None:
            return profile.memory_mib
        return None if pool is None else pool.memory_mib
