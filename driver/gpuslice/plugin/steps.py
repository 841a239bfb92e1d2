"""Carries out one step of the transaction on the hardware, or undoes it. `core.plan` has decided the steps before.

Every `do` can be repeated. Every `undo` succeeds if its hardware is gone already.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import assert_never

from gpuslice.core import plan, share, shared
from gpuslice.core.model import INTERVALS, GpuUuid, MigSlot, MigUuid
from gpuslice.core.record import (
    AdjustMps,
    CreateMig,
    DestroyMig,
    MadeMig,
    Record,
    ResetComputeMode,
    ResetTimeSlice,
    SetComputeMode,
    SetMigMode,
    SetTimeSlice,
    StartMps,
    Step,
    StopMps,
    Undo,
)
from gpuslice.errors import DeviceError
from gpuslice.mps.api import DaemonSpec, MpsDaemons
from gpuslice.nvml.api import Code, ComputeMode, Nvml

log = logging.getLogger(__name__)

Save = Callable[[Record], None]


class StepExecutor:
    def __init__(self, nvml: Nvml, mps: MpsDaemons) -> None:
        self._nvml = nvml
        self._mps = mps

    def do(self, step: Step, record: Record, others: Sequence[Record], save: Save) -> Record:
        """Carry out one step of a record, and `save` each result before the next effect.

        `others`: records that may use the same hardware. DeviceError if the hardware refuses.
        """
        match step:
            case SetMigMode(gpu, on):
                with self._naming_holders(gpu, "MIG mode"):
                    self._nvml.set_mig_mode(gpu, on)
            case CreateMig(slot):
                return self._create(slot, record, save)
            case SetComputeMode() | SetTimeSlice() if _stands(step, others):
                pass  # an earlier share of this card has set it; setting costs a run of nvidia-smi
            case SetComputeMode(gpu):
                with self._naming_holders(gpu, "the compute mode"):
                    self._nvml.set_compute_mode(gpu, ComputeMode.EXCLUSIVE_PROCESS)
            case SetTimeSlice(gpu, interval):
                self._nvml.set_time_slice(gpu, INTERVALS.index(interval))
            case StartMps(gpu, slot):
                if slot is None:
                    self._refuse_prohibited(gpu)
                self._ensure(step, (*others, record))
            case _:
                assert_never(step)
        return record

    def ensure_daemons(self, steps: Sequence[StartMps], records: Sequence[Record]) -> None:
        """Make these MPS daemons run, because one may have ended by itself. Returns at once if all run. It tries all, then
        raises the first error."""
        errors = []
        for step in steps:
            try:
                self._ensure(step, records)
            except DeviceError as e:
                errors.append(e)
        if errors:
            raise errors[0]

    def daemons(self) -> tuple[str, ...]:
        """Keys of the MPS daemons that run. Empty if no supervisor answers."""
        try:
            return tuple(daemon.key for daemon in self._mps.statuses())
        except DeviceError:
            return ()

    def stop_unwanted(self, gpu: GpuUuid, records: Sequence[Record]) -> None:
        """Stop the daemons of a card without a record. A supervisor starts all daemons again that it finds, but a claim
        may have been unprepared while no supervisor ran."""
        for key in share.unwanted(self.daemons(), gpu, records):
            log.warning("stopping an MPS daemon that no claim uses any more key=%s", key)
            self._mps.stop(key)

    def undo(self, undoing: Undo, others: Sequence[Record]) -> None:
        """Undo one step. `others`: the records that stay."""
        match undoing:
            case DestroyMig():
                self._destroy(undoing)
            case ResetComputeMode(gpu):
                if self._nvml.compute_mode(gpu) != ComputeMode.DEFAULT:  # also if the step was never carried out
                    with _fine(Code.NOT_SUPPORTED):
                        self._nvml.set_compute_mode(gpu, ComputeMode.DEFAULT)
            case ResetTimeSlice(gpu):
                # In MIG mode, or if nvidia-smi cannot set it, nothing was set.
                with _fine(Code.NOT_SUPPORTED, Code.LIBRARY_NOT_FOUND):
                    self._nvml.set_time_slice(gpu, 0)
            case StopMps(gpu, slot):
                self._mps.stop(share.daemon_key(gpu, slot))
            case AdjustMps(gpu, slot):
                self._adjust(StartMps(gpu, slot), others)
            case _:
                assert_never(undoing)

    # ------------------------------------------------------------ partitions

    def _create(self, slot: MigSlot, record: Record, save: Save) -> Record:
        if any(done.slot == slot and done.uuid is not None for done in record.done):
            return record  # created by an earlier share of the same partition
        made = MadeMig(slot=slot, gi=self._nvml.create_gpu_instance(slot.gpu, slot.profile, slot.placement))
        save(replace(record, done=(*record.done, made)))
        ci, uuid = self._nvml.create_compute_instance(slot.gpu, made.gi)
        record = replace(record, done=(*record.done, replace(made, ci=ci, uuid=uuid)))
        save(record)
        return record

    def _destroy(self, undoing: DestroyMig) -> None:
        gpu = undoing.slot.gpu
        partition = plan.target(undoing, self._nvml.look(gpu))
        if partition is None:
            return
        if partition.ci is not None:
            with _fine(Code.NOT_FOUND):
                self._nvml.destroy_compute_instance(gpu, partition.gi, partition.ci)
        with _fine(Code.NOT_FOUND):
            self._nvml.destroy_gpu_instance(gpu, partition.gi)

    # ------------------------------------------------------------ MPS

    def _ensure(self, step: StartMps, records: Sequence[Record]) -> None:
        grants = shared.shares_of(step, records)
        memory_mib, percent = share.ceilings(grants)
        self._mps.ensure(
            DaemonSpec(
                key=share.daemon_key(step.gpu, step.slot),
                device=_device(step, records),
                memory_mib=memory_mib,
                threads_percent=percent,
            )
        )

    def _refuse_prohibited(self, gpu: GpuUuid) -> None:
        """Refuse compute mode PROHIBITED. It occurs only if the policy keeps the mode; else an earlier step changed it."""
        if self._nvml.compute_mode(gpu) == ComputeMode.PROHIBITED:
            raise DeviceError(
                f"GPU {gpu} has compute mode PROHIBITED, in which no program starts, and this node's policy keeps the "
                "mode; run "
                f"nvidia-smi -i {gpu} -c DEFAULT, or leave computeMode out of keep"
            )

    def _adjust(self, step: StartMps, others: Sequence[Record]) -> None:
        """Lower the ceilings for the remaining claims. A failure is no error of the leaving claim: its share is free."""
        try:
            self._ensure(step, others)
        except DeviceError as e:
            log.warning("cannot lower the ceilings of an MPS daemon after a share was released gpu=%s: %s", step.gpu, e)

    # ------------------------------------------------------------ errors

    @contextlib.contextmanager
    def _naming_holders(self, gpu: GpuUuid, what: str) -> Iterator[None]:
        try:
            yield
        except DeviceError as e:
            if e.code != Code.IN_USE:
                raise
            try:
                names = ", ".join(f"{p.name or 'process'} (pid {p.pid})" for p in self._nvml.processes(gpu))
            except DeviceError as unlisted:  # the driver reports the first refusal
                names = f"programs that NVML does not list ({unlisted})"
            raise DeviceError(
                f"{what} of GPU {gpu} cannot be switched while it is in use by {names or 'another NVML client'}; stop it "
                "or wait until it leaves",
                e.code,
            ) from e


def _stands(step: Step, others: Sequence[Record]) -> bool:
    return any(other.prepared is not None and step in other.plan.steps for other in others)


def _device(step: StartMps, records: Sequence[Record]) -> GpuUuid | MigUuid:
    """The UUID that the daemon serves: of the card, or of the partition that one of its claims created."""
    if step.slot is None:
        return step.gpu
    made = [done.uuid for record in records for done in record.done if done.slot == step.slot and done.uuid is not None]
    if not made:
        raise DeviceError(f"the partition for an MPS daemon on GPU {step.gpu} vanished; the kubelet tries again")
    return made[-1]


@contextlib.contextmanager
def _fine(*codes: Code) -> Iterator[None]:
    try:
        yield
    except DeviceError as e:
        if e.code not in codes:
            raise
