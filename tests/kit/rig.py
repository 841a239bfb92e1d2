"""A node in a folder: simulated GPUs, records, CDI files, and the transaction on them. Tests restart it, kill it and
read it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gpuslice.checkpoint import Checkpoint
from gpuslice.core.inventory import Inventory
from gpuslice.core.model import Allocation, Claim, ClaimRef, ClaimUid, DeviceRef, Gpu, Partition, PoolName, Settings
from gpuslice.core.policy.rules import Policy
from gpuslice.core.record import Busy, PreparedClaim
from gpuslice.mps.client import MpsClient
from gpuslice.nvml.api import ComputeMode, Nvml
from gpuslice.nvml.session import Session
from gpuslice.nvml.sim.nvml import SimNvml
from gpuslice.plugin.cdi_writer import CdiWriter
from gpuslice.plugin.prepare import Preparer, Scope
from gpuslice.plugin.steps import StepExecutor
from gpuslice.system.host import SimHost

NODE = "node-1"
KIND = "gpuslice.dev/claim"


def a_ref(name: str = "one", uid: str = "") -> ClaimRef:
    return ClaimRef("default", name, ClaimUid(uid or f"uid-{name}"))


def a_claim(
    name: str, *devices: DeviceRef, admin: bool = False, uid: str = "", enforcement: str | None = None
) -> Claim:
    """A claim with these devices, one request for each: gpu-0, gpu-1 …"""
    return Claim(
        a_ref(name, uid),
        tuple(
            Allocation(request=f"gpu-{number}", device=device, admin=admin, settings=Settings(enforcement))
            for number, device in enumerate(devices)
        ),
    )


def a_share(
    name: str, device: DeviceRef, charged: Mapping[str, int] | None = None, settings: Settings | None = None
) -> Claim:
    """A claim with one share of a device, and the amount that the scheduler charged for it (memory in bytes)."""
    allocation = Allocation(
        request="gpu-0",
        device=device,
        share_id=f"share-{name}",
        consumed=charged or {},
        settings=settings or Settings(),
    )
    return Claim(a_ref(name), (allocation,))


@dataclass
class Rig:
    """One driver's transaction on a node. `restarted` is a new process on the same node."""

    folder: Path
    spec: str = "h100x2"
    policy: Policy = field(default_factory=Policy.default)
    static: bool = False
    nvml: SimNvml = field(init=False)
    mps: MpsClient = field(init=False)
    checkpoint: Checkpoint = field(init=False)
    preparer: Preparer = field(init=False)

    def __post_init__(self) -> None:
        self.nvml = SimNvml(self.folder / "node", self.spec, latency="zero")
        self.gpus: tuple[Gpu, ...] = self.nvml.gpus()
        self.inventory = Inventory.of(self.gpus, self.policy, NODE, static=self.static)
        self.build(Session(lambda: self.nvml))

    def build(self, nvml: Nvml) -> None:
        """Build the transaction again over `nvml`, like the start of a process."""
        host = SimHost(self.folder / "node")
        self.checkpoint = Checkpoint(self.folder / "claims", host.boot_id())
        self.mps = MpsClient(self.folder / "mps")
        self.cdi_writer = CdiWriter(
            host=host, nvml=nvml, mps=self.mps, inventory=self.inventory, folder=self.folder / "cdi", kind=KIND
        )
        self.preparer = Preparer(
            nvml=nvml,
            checkpoint=self.checkpoint,
            inventory=self.inventory,
            steps=StepExecutor(nvml, self.mps),
            cdi_writer=self.cdi_writer,
            locks=self.folder / "locks",
        )

    def restart(self) -> Rig:
        self.nvml.close()
        return Rig(self.folder, self.spec, self.policy, self.static)

    # ------------------------------------------------------------ asking

    def device(self, name: str, gpu: int = 0) -> DeviceRef:
        return DeviceRef(PoolName(self.inventory.pools[gpu].name), name)

    def ask(self, claim: Claim) -> PreparedClaim | Busy:
        """A prepare in the same way as the service runs it."""
        answer = self.preparer.prepare(claim, self.preparer.scope(claim.ref.uid, claim))
        assert not isinstance(answer, Scope), "nobody else works on this node"
        return answer

    def prepare(self, claim: Claim) -> PreparedClaim:
        answer = self.ask(claim)
        assert isinstance(answer, PreparedClaim), answer
        return answer

    def busy(self, claim: Claim) -> Sequence[ClaimRef]:
        answer = self.ask(claim)
        assert isinstance(answer, Busy), answer
        return answer.holders

    def unprepare(self, claim: Claim | ClaimRef) -> None:
        ref = claim.ref if isinstance(claim, Claim) else claim
        assert self.preparer.unprepare(ref.uid, self.preparer.scope(ref.uid)) is None

    def recover(self) -> None:
        for uid in self.preparer.unfinished():
            assert self.preparer.recover(uid, self.preparer.scope(uid)) is None

    # ------------------------------------------------------------ looking

    def partitions(self, gpu: int = 0) -> tuple[Partition, ...]:
        return self.nvml.look(self.gpus[gpu].uuid).partitions

    def mig(self, gpu: int = 0) -> bool:
        return self.nvml.look(self.gpus[gpu].uuid).mig

    def cdi(self, claim: Claim) -> Mapping[str, object]:
        body: Mapping[str, object] = json.loads(
            (self.folder / "cdi" / f"gpuslice.dev-claim_{claim.ref.uid}.json").read_text()
        )
        return body

    def cdi_files(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "cdi").iterdir())

    def records(self) -> set[ClaimUid]:
        return set(self.checkpoint.records())

    def assert_agreed(self) -> None:
        """Check that node, records and CDI files agree: nothing incomplete, nothing without a record, nothing missing."""
        records = self.checkpoint.records()
        assert all(record.prepared is not None for record in records.values())
        made = {done.uuid for record in records.values() for done in record.done if done.uuid is not None}
        there = {partition.uuid for gpu in range(len(self.gpus)) for partition in self.partitions(gpu)}
        assert there == made
        files = {f"gpuslice.dev-claim_{uid}.json" for uid, r in records.items() if r.prepared and r.prepared.devices}
        assert set(self.cdi_files()) == files

    def figures(self, gpu: int = 0) -> tuple[ComputeMode, int]:
        """Compute mode and time slice of a card have their values of a start."""
        uuid = self.gpus[gpu].uuid
        return self.nvml.compute_mode(uuid), 0 if self.mig(gpu) else self.nvml.time_slice(uuid)

    def assert_take_turns(self, mine: Claim, theirs: Claim) -> None:
        """Neither claim can be prepared beside the other, and each can after the other. At the end nothing is left."""
        self.prepare(mine)
        assert self.busy(theirs) == (mine.ref,)
        self.unprepare(mine)
        self.prepare(theirs)
        assert self.busy(mine) == (theirs.ref,)
        self.unprepare(theirs)
        self.prepare(mine)
        self.unprepare(mine)
        self.assert_empty()

    def assert_empty(self) -> None:
        self.assert_agreed()
        assert self.records() == set()
        assert all(self.figures(gpu) == (ComputeMode.DEFAULT, 0) for gpu in range(len(self.gpus)))
        locks = {path.name for path in (self.folder / "locks").iterdir()}
        assert locks <= {"claims.lock", *(f"gpu-{gpu.uuid}.lock" for gpu in self.gpus)}
