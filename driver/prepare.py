"""The transaction: prepare, unprepare, recover. Decide by `core.plan`, write down, act, undo from what is written.

Order of a prepare: intent on disk → steps on the hardware, each result noted as it comes into being → CDI file → finished
record. Order of the way back: CDI file → hardware → record. So after a death at any point either the record is finished
and everything it names exists, or the record tells what to undo; nothing of ours exists without a record.

Everything here blocks and runs in worker threads. A claim's lock and its GPUs' locks are files: a second instance (rolling
update) is kept out by the same means as a second thread. They are taken in one order, claim first, GPUs sorted, and never
held while waiting for another claim.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import assert_never

from driver import files
from driver.checkpoint import Checkpoint
from driver.core import plan
from driver.core.inventory import Inventory
from driver.core.model import (
    Busy,
    Claim,
    ClaimUid,
    CreateMig,
    GpuUuid,
    LiveGpu,
    MadeMig,
    Plan,
    PreparedClaim,
    Record,
    SetMigMode,
    Step,
    Undo,
)
from driver.errors import DeviceError, DriverError
from driver.injection import Injector
from driver.nvml.api import Code, Nvml

log = logging.getLogger(__name__)


class Preparer:
    def __init__(
        self,
        *,
        nvml: Nvml,
        checkpoint: Checkpoint,
        inventory: Inventory,
        injector: Injector,
        locks: Path,
    ) -> None:
        self._nvml = nvml
        self._checkpoint = checkpoint
        self._inventory = inventory
        self._injector = injector
        self._locks = files.ensure_folder(locks)

    # ------------------------------------------------------------ the doors' verbs

    def prepare(self, claim: Claim) -> PreparedClaim | Busy:
        """What the claim was given, the same as last time if it stands; or who has to leave first."""
        answer = None
        while answer is None:
            answer = self._prepare(claim, self.gpus_of(claim))
        return answer

    def _prepare(self, claim: Claim, gpus: Sequence[GpuUuid]) -> PreparedClaim | Busy | None:
        """None where another instance has prepared the claim on other GPUs meanwhile: again, with those locked too."""
        uid = claim.ref.uid
        with self._locked(uid, gpus):
            record = self._checkpoint.get(uid)
            if record is not None and not set(record.plan.gpus) <= set(gpus):
                return None
            if record is not None and record.prepared is not None and plan.serves(record, claim):
                live = self._look(record.plan.named)
                if plan.stands(record, live):
                    self._injector.ensure(record, live)
                    return record.prepared
            wanted = Plan(claim.ref, plan.grants(claim, self._inventory), ())
            if not set(wanted.gpus) <= set(gpus):
                return None
            if record is not None:
                self._undo(record)
            live = self._look(wanted.named)
            decision = plan.make(claim, self._inventory, self._others(uid).values(), live)
            return decision if isinstance(decision, Busy) else self._carry_out(decision)

    def unprepare(self, uid: ClaimUid, gpus: Sequence[GpuUuid]) -> bool:
        """Give back what the claim holds. False where it holds other GPUs than expected: ask again with those."""
        with self._locked(uid, gpus):
            record = self._checkpoint.get(uid)
            if record is not None and not set(record.plan.gpus) <= set(gpus):
                return False
            if record is not None:
                self._undo(record)
            else:
                self._injector.remove(uid)
            return True

    def recover(self, uid: ClaimUid) -> None:
        """Undo a claim that a killed process left unfinished; leaves one alone that another instance has finished."""
        with self._locked(uid, self.gpus_of_record(uid)):
            record = self._checkpoint.get(uid)
            if record is not None and record.prepared is None:
                log.warning("undoing what was left half-made claim=%s", record.plan.ref)
                self._undo(record)

    # ------------------------------------------------------------ what others ask

    def records(self) -> Mapping[ClaimUid, Record]:
        return self._checkpoint.records()

    def unfinished(self) -> tuple[ClaimUid, ...]:
        return tuple(uid for uid, record in self._checkpoint.records().items() if record.prepared is None)

    def gpus_of(self, claim: Claim) -> tuple[GpuUuid, ...]:
        """GPUs that a prepare works on: those it would take and those that an older record of the claim holds."""
        record = self._checkpoint.get(claim.ref.uid)
        if record is not None and plan.serves(record, claim):
            return record.plan.gpus
        wanted = Plan(claim.ref, plan.grants(claim, self._inventory), ())
        return tuple(sorted({*wanted.gpus, *(() if record is None else record.plan.gpus)}))

    def gpus_of_record(self, uid: ClaimUid) -> tuple[GpuUuid, ...]:
        record = self._checkpoint.get(uid)
        return () if record is None else record.plan.gpus

    def in_use(self, record: Record) -> bool:
        """Whether a process runs on what the record holds; a GPU that cannot be asked counts as in use."""
        made = {(done.slot.gpu, done.gi) for done in record.done}
        partitioned = {done.slot.gpu for done in record.done}
        try:
            return any(
                (gpu, process.gi) in made if gpu in partitioned else True
                for gpu in record.plan.gpus
                for process in self._nvml.processes(gpu)
            )
        except DeviceError:
            return True

    # ------------------------------------------------------------ forward

    def _carry_out(self, decided: Plan) -> PreparedClaim:
        record = Record(decided)
        self._checkpoint.put(record)
        try:
            for step in decided.steps:
                record = self._do(step, record)
            finished = self._injector.inject(record, self._look(decided.named))
            self._checkpoint.put(finished)
        except DriverError:
            self._roll_back(decided.ref.uid)
            raise
        assert finished.prepared is not None
        return finished.prepared

    def _do(self, step: Step, record: Record) -> Record:
        """Carry out one step and write down what came into being, before the next effect."""
        match step:
            case SetMigMode(gpu, on):
                self._set_mig_mode(gpu, on)
                return record
            case CreateMig(slot):
                made = MadeMig(slot=slot, gi=self._nvml.create_gpu_instance(slot.gpu, slot.profile, slot.placement))
                self._checkpoint.put(replace(record, done=(*record.done, made)))
                ci, uuid = self._nvml.create_compute_instance(slot.gpu, made.gi)
                record = replace(record, done=(*record.done, replace(made, ci=ci, uuid=uuid)))
                self._checkpoint.put(record)
                return record
            case _:
                assert_never(step)

    def _set_mig_mode(self, gpu: GpuUuid, on: bool) -> None:
        try:
            self._nvml.set_mig_mode(gpu, on)
        except DeviceError as e:
            if e.code != Code.IN_USE:
                raise
            names = ", ".join(f"{p.name or 'process'} (pid {p.pid})" for p in self._nvml.processes(gpu))
            raise DeviceError(
                f"MIG mode of GPU {gpu} cannot be switched while it is in use by {names or 'another NVML client'}; stop it "
                "or wait until it leaves",
                e.code,
            ) from e

    # ------------------------------------------------------------ back

    def _undo(self, record: Record) -> None:
        """Take everything back, the record last. Raises where the hardware refuses; the record then stays."""
        uid = record.plan.ref.uid
        self._injector.remove(uid)
        for undoing in plan.undo(record, self._others(uid).values()):
            self._undo_one(undoing)
        self._checkpoint.drop(uid)

    def _roll_back(self, uid: ClaimUid) -> None:
        """After a failed prepare; a failure here is only told, for the record stays and the next call tries again."""
        try:
            record = self._checkpoint.get(uid)
            if record is not None:
                self._undo(record)
        except DriverError as e:
            log.error("cannot take a failed prepare back yet claim=%s: %s", uid, e)

    def _undo_one(self, undoing: Undo) -> None:
        gpu = undoing.slot.gpu
        partition = plan.target(undoing, self._nvml.look(gpu))
        if partition is None:
            return
        if partition.ci is not None:
            with _gone_is_fine():
                self._nvml.destroy_compute_instance(gpu, partition.gi, partition.ci)
        with _gone_is_fine():
            self._nvml.destroy_gpu_instance(gpu, partition.gi)

    # ------------------------------------------------------------ parts

    def _others(self, uid: ClaimUid) -> dict[ClaimUid, Record]:
        return {other: record for other, record in self._checkpoint.records().items() if other != uid}

    def _look(self, gpus: Iterable[GpuUuid]) -> dict[GpuUuid, LiveGpu]:
        return {gpu: self._nvml.look(gpu) for gpu in dict.fromkeys(gpus)}

    @contextlib.contextmanager
    def _locked(self, uid: ClaimUid, gpus: Sequence[GpuUuid]) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(files.locked(self._locks / f"claim-{uid}.lock", unlink=True))
            for gpu in sorted(gpus):
                stack.enter_context(files.locked(self._locks / f"gpu-{gpu}.lock"))
            yield


@contextlib.contextmanager
def _gone_is_fine() -> Iterator[None]:
    try:
        yield
    except DeviceError as e:
        if e.code != Code.NOT_FOUND:
            raise
