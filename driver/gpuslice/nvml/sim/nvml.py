"""A simulated node with the refusals of a real node, and NVML's code for each refusal. It is a feature: docs/simulator.md.

It needs no GPU and no library of NVIDIA. Each verb first waits for its turn, then for injected faults, then for its
latency, then acts. Changes of one GPU run one after the other; reads do not wait. GPUs never wait for each other, except
with the latency "serial": then every call of every process on this node waits for the call before it.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

from gpuslice.core.model import MIB, Gpu, GpuUuid, LiveGpu, MigProfile, MigSlot, MigUuid, Partition, Placement
from gpuslice.errors import DeviceError
from gpuslice.nvml.api import TIME_SLICES, Code, ComputeMode, GpuProcess, Memory, XidEvent
from gpuslice.nvml.listing import LIMIT_S, Listing
from gpuslice.nvml.sim import geometry
from gpuslice.nvml.sim.node import SimNode
from gpuslice.nvml.sim.state import GpuState, Mutation

Latency = Literal["realistic", "zero", "serial"]

# The first compute capability with an adjustable time slice in this simulator: Volta. Some Pascal cards have it too, but
# no source lists them.
_TIME_SLICED = 7

# Seconds of a call: orders of magnitude, not measurements. Comments in NVIDIA's DRA driver give about 1 s for the destroy
# of a GPU instance, and about the same for a create. The other values are our guess in proportion to these.
SECONDS = {
    "gpus": 0.02,
    "look": 0.002,
    "minor": 0.0005,
    "set_mig_mode": 2.0,
    "create_gpu_instance": 1.0,
    "create_compute_instance": 0.1,
    "destroy_compute_instance": 0.1,
    "destroy_gpu_instance": 1.0,
    "processes": 0.002,
    "memory": 0.001,
    "compute_mode": 0.0005,
    "set_compute_mode": 0.01,
    "time_slice": 0.02,  # a run of nvidia-smi
    "set_time_slice": 0.02,
}


class SimNvml(SimNode):
    """`Nvml` on a simulated node. `SimNode` is the other half: processes, XIDs, faults and reboots."""

    def __init__(
        self,
        folder: Path,
        node: str | Path | None = None,
        *,
        latency: Latency = "realistic",
        hang_limit_s: float = LIMIT_S,
    ) -> None:
        super().__init__(folder, node)
        self._latency = latency
        self._closing = threading.Event()
        self._listing: Listing[Gpu] = Listing(hang_limit_s)
        self._lost: tuple[str, ...] = ()
        self._meet("start", None, done=False)

    # ------------------------------------------------------------ reading

    def gpus(self) -> tuple[Gpu, ...]:
        with self._turn(None, changing=False):
            self._meet("gpus", None, done=False)
            self._spend("gpus")
            found, self._lost = self._listing.read(range(len(self.cards)), self._listed)
        return found

    def _listed(self, index: int) -> Gpu:
        gpu = self.cards[index]
        self._meet("gpus", gpu.uuid, done=False)
        self._alive(index, self._state.read(index))
        return gpu

    def lost(self) -> tuple[str, ...]:
        return self._lost

    def notes(self) -> tuple[str, ...]:
        return ()

    def look(self, gpu: GpuUuid) -> LiveGpu:
        return self._read("look", gpu).live

    def minor(self, gpu: GpuUuid) -> int:
        """The index. For a resetless card in MIG mode, a number above all indices: legal, and it shows stale caches."""
        state, index = self._read("minor", gpu), self.index(gpu)
        return index + len(self.cards) if state.live.mig and self.cards[index].resetless else index

    def processes(self, gpu: GpuUuid) -> tuple[GpuProcess, ...]:
        return self._read("processes", gpu).processes

    def memory(self, device: GpuUuid | MigUuid) -> Memory:
        if device.startswith("MIG-"):
            index, partition = self.find(MigUuid(device))
            state = self._read("memory", self.cards[index].uuid)
            total = self.profile(index, partition).memory_mib * MIB
            used = sum(p.used_bytes or 0 for p in state.processes if p.gi == partition.gi)
        else:
            state, total = self._read("memory", GpuUuid(device)), self.cards[self.index(GpuUuid(device))].memory_bytes
            used = sum(p.used_bytes or 0 for p in state.processes)
        return Memory(total, used)

    def compute_mode(self, gpu: GpuUuid) -> ComputeMode:
        return self._read("compute_mode", gpu).compute_mode

    def wait_event(self, timeout_s: float) -> XidEvent | None:
        self._check_open()
        # Before the faults: an XID during a hung call must not be lost.
        self._events.subscribe()
        self._meet("wait_event", None, done=False)
        return self._events.next(timeout_s)

    # ------------------------------------------------------------ MIG mode

    def set_mig_mode(self, gpu: GpuUuid, on: bool) -> None:
        index = self.index(gpu)
        state = self._change("set_mig_mode", gpu, lambda state: self._with_mig_mode(index, state, on))
        if state.live.mig == on:
            return
        if busy := _busy(state):
            raise self._refusal(
                index, Code.IN_USE, f"MIG mode waits for a reset, and {busy}; end these processes, then reset the GPU"
            )
        raise self._refusal(index, Code.RESET_REQUIRED, "MIG mode is pending; reset the GPU or reboot the node")

    def _with_mig_mode(self, index: int, state: GpuState, on: bool) -> GpuState:
        gpu = self.cards[index]
        if not gpu.profiles:
            raise self._refusal(index, Code.NOT_SUPPORTED, f"{gpu.product} has no MIG; use another GPU")
        if state.live.mig == on:
            return state.with_mig(on)
        if state.live.partitions:
            raise self._refusal(index, Code.IN_USE, "it has GPU instances; destroy them first")
        if not gpu.resetless:
            return state.with_mig(state.live.mig, pending=on)
        if busy := _busy(state):
            raise self._refusal(
                index, Code.IN_USE, f"MIG mode cannot be switched while {busy}; end these processes first"
            )
        return replace(state.with_mig(on), compute_mode=ComputeMode.DEFAULT, time_slice=0)

    # ------------------------------------------------------------ partitions

    def create_gpu_instance(self, gpu: GpuUuid, profile: int, placement: Placement) -> int:
        index = self.index(gpu)
        state = self._change("create_gpu_instance", gpu, lambda state: self._with_gi(index, state, profile, placement))
        made = state.live.at(MigSlot(gpu, profile, placement))
        assert made is not None
        return made.gi

    def _with_gi(self, index: int, state: GpuState, profile_id: int, placement: Placement) -> GpuState:
        profile = self._profile(index, state, profile_id, placement)
        standing = [(self.profile(index, p), p.placement) for p in state.live.partitions]
        model = self._products[index]
        if reason := geometry.refusal(model.engines, standing, profile, placement):
            text = f"no room for a {profile.name} at memory slice {placement.start}: {reason}; destroy what blocks it"
            raise self._refusal(index, Code.INSUFFICIENT_RESOURCES, text)
        gi = geometry.instance_id(model.memory_slices, placement, (p.gi for p in state.live.partitions))
        new = Partition(profile=profile_id, placement=placement, gi=gi)
        return state.with_partitions((*state.live.partitions, new))

    def _profile(self, index: int, state: GpuState, profile_id: int, placement: Placement) -> MigProfile:
        if not state.live.mig:
            raise self._refusal(index, Code.NOT_SUPPORTED, "MIG mode is off; switch it on first")
        profile = self.cards[index].profile(profile_id)
        if profile is None:
            known = ", ".join(str(p.id) for p in self.cards[index].profiles)
            raise self._refusal(
                index, Code.INVALID_ARGUMENT, f"there is no MIG profile {profile_id}; use one of {known}"
            )
        if placement not in profile.placements:
            starts = ", ".join(str(p.start) for p in profile.placements)
            text = f"{profile.name} cannot be at {placement.start}:{placement.size}; use one of the starts {starts}"
            raise self._refusal(index, Code.INVALID_ARGUMENT, text)
        return profile

    def create_compute_instance(self, gpu: GpuUuid, gi: int) -> tuple[int, MigUuid]:
        index = self.index(gpu)

        def create(state: GpuState) -> GpuState:
            partition = self._gi(index, state, gi)
            if partition.ci is not None:
                text = (
                    f"GPU instance {gi} already has compute instance {partition.ci} over its full width; use that one"
                )
                raise self._refusal(index, Code.INSUFFICIENT_RESOURCES, text)
            return _with_partition(state, replace(partition, ci=0, uuid=MigUuid(f"MIG-{uuid.uuid4()}")))

        made = self._change("create_compute_instance", gpu, create).partition(gi)
        assert made is not None and made.ci is not None and made.uuid is not None
        return made.ci, made.uuid

    def destroy_compute_instance(self, gpu: GpuUuid, gi: int, ci: int) -> None:
        index = self.index(gpu)

        def destroy(state: GpuState) -> GpuState:
            partition = self._gi(index, state, gi)
            if partition.ci != ci:
                raise self._refusal(
                    index, Code.NOT_FOUND, f"GPU instance {gi} has no compute instance {ci}; it is gone"
                )
            if pids := [p.pid for p in state.processes if (p.gi, p.ci) == (gi, ci)]:
                text = f"pids {', '.join(map(str, pids))} run on partition {partition.uuid}; end them first"
                raise self._refusal(index, Code.IN_USE, text)
            return _with_partition(state, replace(partition, ci=None, uuid=None))

        self._change("destroy_compute_instance", gpu, destroy)

    def destroy_gpu_instance(self, gpu: GpuUuid, gi: int) -> None:
        index = self.index(gpu)

        def destroy(state: GpuState) -> GpuState:
            partition = self._gi(index, state, gi)
            if partition.ci is not None:
                text = f"GPU instance {gi} has compute instance {partition.ci}; destroy that first"
                raise self._refusal(index, Code.IN_USE, text)
            return state.with_partitions(tuple(p for p in state.live.partitions if p.gi != gi))

        self._change("destroy_gpu_instance", gpu, destroy)

    def _gi(self, index: int, state: GpuState, gi: int) -> Partition:
        if not state.live.mig:
            raise self._refusal(index, Code.NOT_SUPPORTED, "MIG mode is off; switch it on first")
        partition = state.partition(gi)
        if partition is None:
            raise self._refusal(index, Code.NOT_FOUND, f"there is no GPU instance {gi}; it is gone")
        return partition

    # ------------------------------------------------------------ compute mode

    def set_compute_mode(self, gpu: GpuUuid, mode: ComputeMode) -> None:
        index = self.index(gpu)

        def switch(state: GpuState) -> GpuState:
            if state.live.mig:  # nvml.h: on a card in MIG mode it is DEFAULT and cannot be changed
                text = "the compute mode cannot be changed in MIG mode; switch MIG mode off first"
                raise self._refusal(index, Code.NOT_SUPPORTED, text)
            return replace(state, compute_mode=mode)

        self._change("set_compute_mode", gpu, switch)

    def time_slice(self, gpu: GpuUuid) -> int:
        return self._require_time_slice(self.index(gpu), self._read("time_slice", gpu)).time_slice

    def set_time_slice(self, gpu: GpuUuid, level: int) -> None:
        index = self.index(gpu)
        if level not in TIME_SLICES:
            text = f"there is no time slice {level}; use one of 0 (default) to 3 (long)"
            raise self._refusal(index, Code.INVALID_ARGUMENT, text)
        self._change(
            "set_time_slice", gpu, lambda state: replace(self._require_time_slice(index, state), time_slice=level)
        )

    def _require_time_slice(self, index: int, state: GpuState) -> GpuState:
        gpu = self.cards[index]
        if state.live.mig:
            raise self._refusal(
                index, Code.NOT_SUPPORTED, "it has no time slice in MIG mode; switch MIG mode off first"
            )
        if int(gpu.compute_capability.partition(".")[0]) < _TIME_SLICED:
            raise self._refusal(index, Code.NOT_SUPPORTED, f"{gpu.product} has no time slice to set; use another GPU")
        return state

    def close(self) -> None:
        """End this session. Hung and waiting calls fail as uninitialized. The node does not change."""
        self._closing.set()
        super().close()

    # ------------------------------------------------------------ the path of one call

    def _read(self, call: str, gpu: GpuUuid) -> GpuState:
        index = self.index(gpu)
        with self._turn(index, changing=False):
            self._meet(call, gpu, done=False)
            self._spend(call)
            return self._alive(index, self._state.read(index))

    def _change(self, call: str, gpu: GpuUuid, change: Mutation) -> GpuState:
        index = self.index(gpu)
        with self._turn(index, changing=True):
            self._meet(call, gpu, done=False)
            self._spend(call)
            state = self._state.change(index, lambda state: change(self._alive(index, state)))
            self._meet(call, gpu, done=True)
            return state

    @contextmanager
    def _turn(self, index: int | None, *, changing: bool) -> Iterator[None]:
        self._check_open()
        if self._latency == "serial" or changing:
            with self._state.turn(None if self._latency == "serial" else index):
                yield
        else:
            yield

    def _check_open(self) -> None:
        if self._closing.is_set():
            raise DeviceError("NVML is not initialized; the driver has closed it", Code.UNINITIALIZED)

    def _meet(self, call: str, gpu: GpuUuid | None, *, done: bool) -> None:
        """Apply the cues for this call."""
        taken = self._cues.take(call, gpu, done)
        if taken is None:
            return
        name, cue = taken
        here = "the node" if gpu is None else self.label(self.index(gpu))
        match cue.effect:
            case "hang":
                if not self._cues.hang(name):
                    raise DeviceError(f"NVML was closed while {call} on {here} hung", Code.UNINITIALIZED)
            case "lose":
                if gpu is not None:
                    self.lose(gpu)
                raise DeviceError(f"{here} is lost (cued for {call}); reset it or reboot the node", Code.GPU_IS_LOST)
            case "fail":
                raise DeviceError(f"{here}: {call} failed with {Code(cue.code).name}, as cued", cue.code)

    def _spend(self, call: str) -> None:
        # The only place that waits for a fixed time on purpose. The end of the session ends the wait.
        if self._latency != "zero" and self._closing.wait(SECONDS[call]):
            raise DeviceError(f"NVML was closed during {call}", Code.UNINITIALIZED)

    def _alive(self, index: int, state: GpuState) -> GpuState:
        if state.lost:
            raise self._refusal(index, Code.GPU_IS_LOST, "it is lost; reset it or reboot the node")
        return state

    def _refusal(self, index: int, code: Code, text: str) -> DeviceError:
        return DeviceError(f"{self.label(index)}: {text}", code)


def _busy(state: GpuState) -> str:
    return ", ".join(f"pid {p.pid} ({p.name}) uses it" for p in state.processes)


def _with_partition(state: GpuState, partition: Partition) -> GpuState:
    others = tuple(p for p in state.live.partitions if p.gi != partition.gi)
    return state.with_partitions((*others, partition))
