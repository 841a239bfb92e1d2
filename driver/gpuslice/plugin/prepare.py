"""The transaction: prepare, unprepare, recover. `core.plan` decides; this module writes records, acts, and undoes records.

Order of a prepare: record of the plan → steps on the hardware, with each result saved at once → CDI file → finished
record. Order of an unprepare: CDI file → hardware → record. The process may die at any point. Then either the record is
finished and all its hardware exists, or the record lists the steps to undo. No hardware of ours exists without a record.

Everything here blocks and runs in worker threads. A claim's lock and its GPUs' locks are files, so they exclude a second
instance (rolling update) in the same way as a second thread. The order is always the same: first the claim, then the
GPUs in sorted order. No lock is held while waiting for another claim.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path

from gpuslice.checkpoint import Checkpoint
from gpuslice.core import plan, share, shared
from gpuslice.core.inventory import Inventory
from gpuslice.core.model import Claim, ClaimRef, ClaimUid, GpuUuid, LiveGpu, Monitor
from gpuslice.core.plan import Live
from gpuslice.core.record import Busy, Grant, Plan, PreparedClaim, Record
from gpuslice.errors import DeviceError, DriverError
from gpuslice.nvml.api import MPS_SERVER, Nvml
from gpuslice.plugin.cdi_writer import CdiWriter
from gpuslice.plugin.steps import StepExecutor
from gpuslice.system import files

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Scope:
    """The GPUs of a verb. They are found once, before the ticket; then the verb waits for them, locks them and works on them.

    `gpus`: in the one global order. `record`: the record of the claim at that moment. `grants`: the hardware for a new
    prepare. If a verb finds another record under its locks (another instance was at work), it changes nothing and returns
    the new scope.
    """

    gpus: tuple[GpuUuid, ...]
    record: Record | None = None
    grants: tuple[Grant, ...] = ()


class Preparer:
    def __init__(
        self,
        *,
        nvml: Nvml,
        checkpoint: Checkpoint,
        inventory: Inventory,
        steps: StepExecutor,
        cdi_writer: CdiWriter,
        locks: Path,
    ) -> None:
        self._nvml = nvml
        self._checkpoint = checkpoint
        self._inventory = inventory
        self._steps = steps
        self._cdi_writer = cdi_writer
        self._locks = files.ensure_folder(locks)

    # ------------------------------------------------------------ the kubelet's verbs

    def scope(self, uid: ClaimUid, claim: Claim | None = None) -> Scope:
        """The scope of a verb on this claim. With `claim`, the verb is a prepare.

        ClaimError if the driver cannot serve the claim with its allocation.
        """
        record = self._checkpoint.get(uid)
        if claim is None or (record is not None and plan.serves(record, claim)):
            return Scope(() if record is None else record.plan.gpus, record)
        return self._wanted(claim, record)

    def prepare(self, claim: Claim, scope: Scope) -> PreparedClaim | Busy | Scope:
        """Prepare the claim. Returns its devices (unchanged if they still exist) or the claims that block it."""
        uid = claim.ref.uid
        with self._locked(uid, scope):
            record = self._checkpoint.get(uid)
            if record != scope.record:
                return self.scope(uid, claim)
            if record is not None and plan.serves(record, claim) and (standing := self._standing(record)):
                return standing
            wanted = scope if scope.grants else self._wanted(claim, record)
            if not set(wanted.gpus) <= set(scope.gpus):
                return wanted
            if record is not None:
                self._undo_or_leave(record)
            return self._make(claim, wanted.grants)

    def unprepare(self, uid: ClaimUid, scope: Scope) -> Scope | None:
        """Undo everything that the claim holds. A claim that holds nothing is no error."""
        with self._locked(uid, scope):
            record = self._checkpoint.get(uid)
            if record != scope.record:
                return self.scope(uid)
            if record is not None:
                self._undo_or_leave(record)
            else:
                self._cdi_writer.remove(uid)
            return None

    def recover(self, uid: ClaimUid, scope: Scope) -> Scope | None:
        """Undo a claim that a killed process left unfinished, unless another instance has finished it."""
        with self._locked(uid, scope):
            record = self._checkpoint.get(uid)
            if record != scope.record:
                return self.scope(uid)
            if record is not None and record.prepared is None:
                log.warning("undoing a prepare that did not end claim=%s", record.plan.ref)
                self._undo(record)
            return None

    def mend(self, uid: ClaimUid, scope: Scope) -> Scope | None:
        """Make the claim's CDI file equal to its finished record. Without a record, remove the file."""
        with self._locked(uid, scope):
            record = self._checkpoint.get(uid)
            if record != scope.record:
                return self.scope(uid)
            if record is None:
                log.warning("removing a CDI file without a record claim=%s", uid)
                self._cdi_writer.remove(uid)
            elif record.prepared is not None:
                live = self._look_for(record.plan)
                if plan.stands(record, live):  # otherwise the next prepare makes the hardware and the file again
                    self._cdi_writer.ensure(record, live)
            return None

    def ensure_daemons(self, gpu: GpuUuid) -> None:
        """Make exactly the MPS daemons of a card run that its records need, because the supervisor may have lost some,
        or has started some that no claim uses any more. It tries all, and then raises the first error."""
        with files.locked(self._gpu_lock(gpu)):
            records = tuple(self._checkpoint.records().values())
            self._steps.stop_unwanted(gpu, records)
            self._steps.ensure_daemons(shared.daemons_of(records, gpu), records)

    def make_spares(self) -> None:
        """Make files for the next claim in advance. Called between claims."""
        for spares in (self._checkpoint.spares, self._cdi_writer.spares):
            spares.refill()

    # ------------------------------------------------------------ questions of other modules

    def records(self) -> Mapping[ClaimUid, Record]:
        return self._checkpoint.records()

    def with_daemons(self) -> tuple[GpuUuid, ...]:
        """The cards that have MPS daemons, or need some, sorted."""
        keys = self._steps.daemons()
        wanted = {step.gpu for step in shared.daemons_of(self._checkpoint.records().values())}
        running = {p.gpu.uuid for p in self._inventory.pools if any(share.is_on(key, p.gpu.uuid) for key in keys)}
        return tuple(sorted(wanted | running))

    def unfinished(self) -> tuple[ClaimUid, ...]:
        return tuple(uid for uid, record in self._checkpoint.records().items() if record.prepared is None)

    def to_mend(self) -> tuple[ClaimUid, ...]:
        """Claims whose CDI file may be wrong, including claims without a record."""
        strays = self._cdi_writer.sweep(self._checkpoint.uids())
        return (*strays, *self._cdi_writer.doubtful(self._checkpoint.records()))

    def blockers(self, claim: Claim, gone: Set[ClaimUid]) -> tuple[ClaimRef, ...]:
        """Claims that hold devices which this claim needs, except the claims in `gone`."""
        others = tuple(record for uid, record in self._others(claim.ref.uid).items() if uid not in gone)
        return plan.blockers(plan.grants(claim, self._inventory), others, self._inventory)

    def held_under_other_names(self, claim: Claim) -> frozenset[ClaimRef]:
        """Claims that hold a card of this claim from a pool of another name. The scheduler cannot know about them."""
        records = tuple(self._others(claim.ref.uid).values())
        wanted = {(g.gpu, g.allocation.device.pool) for g in plan.grants(claim, self._inventory)}
        return frozenset(ref for gpu, pool in wanted for ref, _ in shared.under_other_names(gpu, pool, records))

    def in_use(self, record: Record) -> bool:
        """Whether a process runs on the hardware of the record. An unreadable GPU counts as in use."""
        made = {(done.slot.gpu, done.gi) for done in record.done}
        partitioned = {done.slot.gpu for done in record.done}
        try:
            return any(
                (gpu, process.gi) in made if gpu in partitioned else True
                for gpu in record.plan.gpus
                for process in self._nvml.processes(gpu)
                if process.name != MPS_SERVER  # the MPS server stays after its clients
            )
        except DeviceError:
            return True

    # ------------------------------------------------------------ forward

    def _standing(self, record: Record) -> PreparedClaim | None:
        """The devices of a finished record, after a repair of its daemons and its CDI file. None if the hardware has
        changed."""
        live = self._look_for(record.plan)
        if not plan.stands(record, live):
            return None
        if daemons := shared.daemons_of([record]):
            self._steps.ensure_daemons(daemons, tuple(self._checkpoint.records().values()))
        self._cdi_writer.ensure(record, live)
        return record.prepared

    def _make(self, claim: Claim, wanted: tuple[Grant, ...]) -> PreparedClaim | Busy:
        live = self._look_for(Plan(claim.ref, wanted, ()))
        others = tuple(self._others(claim.ref.uid).values())
        decision = plan.make(claim.ref, wanted, self._inventory, others, live)
        return decision if isinstance(decision, Busy) else self._carry_out(decision, others, live)

    def _carry_out(self, decided: Plan, others: Sequence[Record], live: Live) -> PreparedClaim:
        record = Record(decided, shared.reusable(decided, others, live))
        self._checkpoint.put(record)
        try:
            for step in decided.steps:
                record = self._steps.do(step, record, others, self._checkpoint.put)
                for other in shared.repointed(record, others):
                    self._checkpoint.put(other)
                    # The CDI file of that claim names vanished hardware. The claim's next prepare writes the file again.
                    self._cdi_writer.remove(other.plan.ref.uid)
            finished = self._cdi_writer.inject(record, self._look_for(decided))
            self._checkpoint.put(finished)
        except DriverError:
            self._undo_failed(decided.ref.uid)
            raise
        assert finished.prepared is not None
        return finished.prepared

    # ------------------------------------------------------------ back

    def _undo(self, record: Record) -> None:
        """Undo all steps, then remove the record. If a card refuses, the steps of the other cards are still undone. Then the
        error is raised and the record stays."""
        for error in self._undo_steps(record).values():
            raise error
        self._checkpoint.drop(record.plan.ref.uid)

    def _undo_or_leave(self, record: Record) -> None:
        """Like `_undo`, but succeeds on a lost card: a reboot needs a drain first, so the pods must be able to end.

        Nothing runs on a lost card, and the card has a taint. The hardware that stays on the card gets a record of its
        own. When the card is back, `recover` undoes this record, or the next prepare that needs the place.
        """
        refused = self._undo_steps(record)
        for gpu, error in refused.items():
            if not self._is_lost(gpu):
                raise error
        left = {gpu: plan.leftover(record, gpu) for gpu in refused}
        for gpu, leftover in left.items():
            log.warning(
                "unprepared a claim except on a lost GPU; the rest is undone when the GPU is back claim=%s gpu=%s: %s",
                record.plan.ref,
                gpu,
                refused[gpu],
            )
            self._checkpoint.put(leftover)
        if record.plan.ref not in {leftover.plan.ref for leftover in left.values()}:
            self._checkpoint.drop(record.plan.ref.uid)

    def _undo_failed(self, uid: ClaimUid) -> None:
        """Undo a failed prepare. A failure here is only logged, because the record stays and the next call tries again."""
        try:
            record = self._checkpoint.get(uid)
            if record is not None:
                self._undo(record)
        except DriverError as e:
            log.error("cannot undo a failed prepare; the next call for the claim tries again claim=%s: %s", uid, e)

    def _undo_steps(self, record: Record) -> dict[GpuUuid, DeviceError]:
        """Undo a record's steps. Returns the first error of each card that refuses.

        The record becomes unfinished first: then no other claim uses the hardware that is being removed, and a new
        process can continue.
        """
        uid = record.plan.ref.uid
        others = tuple(self._others(uid).values())
        undos = plan.undo(record, others)
        if undos and record.prepared is not None:
            self._checkpoint.put(replace(record, prepared=None))
        self._cdi_writer.remove(uid)
        refused: dict[GpuUuid, DeviceError] = {}
        for undoing in undos:
            if undoing.gpu not in refused:
                try:
                    self._steps.undo(undoing, others)
                except DeviceError as e:
                    refused[undoing.gpu] = e
        return refused

    def _is_lost(self, gpu: GpuUuid) -> bool:
        """Whether the card is unreadable. Such a card has the taint for lost cards."""
        try:
            self._nvml.look(gpu)
        except DeviceError:
            return True
        return False

    # ------------------------------------------------------------ parts

    def _wanted(self, claim: Claim, record: Record | None) -> Scope:
        """The hardware that the claim takes by the present inventory, and the hardware of its older record."""
        wanted = Plan(claim.ref, plan.grants(claim, self._inventory), ())
        held = () if record is None else record.plan.gpus
        return Scope(tuple(sorted({*wanted.gpus, *held})), record, wanted.grants)

    def _others(self, uid: ClaimUid) -> dict[ClaimUid, Record]:
        return {other: record for other, record in self._checkpoint.records().items() if other != uid}

    def _look_for(self, wanted: Plan) -> dict[GpuUuid, LiveGpu]:
        """A look at each card. A card that is only monitored may be lost, because a monitor must show that, too."""
        used = {
            grant.gpu for grant in wanted.grants if not isinstance(grant.sharing, Monitor) or grant.slot is not None
        }
        live = dict[GpuUuid, LiveGpu]()
        for gpu in dict.fromkeys(wanted.named):
            try:
                live[gpu] = self._nvml.look(gpu)
            except DeviceError:
                if gpu in used:
                    raise
                live[gpu] = LiveGpu(mig=False, mig_pending=False)
        return live

    @contextlib.contextmanager
    def _locked(self, uid: ClaimUid, scope: Scope) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(files.locked_name(self._locks / "claims.lock", uid))
            for gpu in scope.gpus:
                stack.enter_context(files.locked(self._gpu_lock(gpu)))
            yield

    def _gpu_lock(self, gpu: GpuUuid) -> Path:
        return self._locks / f"gpu-{gpu}.lock"
