"""The simulated node outside of NVML: actions of a test, a demo or a command on the node while a driver runs on it.

The folder is the node. Any process that opens the folder again finds the node unchanged. Nothing here costs simulated
time, and nothing waits for a hung call.
"""

from __future__ import annotations

import uuid
from dataclasses import replace
from functools import partial
from pathlib import Path

from gpuslice.core.model import MIB, Gpu, GpuUuid, LiveGpu, MigProfile, MigUuid, Partition
from gpuslice.errors import DeviceError
from gpuslice.nvml.api import MPS_SERVER, XID_OFF_THE_BUS, Code, ComputeMode, GpuProcess, XidEvent
from gpuslice.nvml.sim.faults import Cue, Cues, Effect, Events
from gpuslice.nvml.sim.models import Product
from gpuslice.nvml.sim.spec import parse
from gpuslice.nvml.sim.state import GpuState, StateFolder


class SimNode:
    """A node in `folder`, created from `node` (see spec.py) or found there. ConfigError if the found node differs."""

    def __init__(self, folder: Path, node: str | Path | None = None) -> None:
        self.folder = folder
        self._state = StateFolder(folder, None if node is None else parse(node))
        self._products = self._state.spec.models()
        self._gpus = tuple(self._gpu(index, product) for index, product in enumerate(self._products))
        self._index = {gpu.uuid: gpu.index for gpu in self._gpus}
        self._cues = Cues(folder / "cues")
        self._events = Events(folder / "events")

    def _gpu(self, index: int, product: Product) -> Gpu:
        card, count = self._state.spec.cards[index], len(self._products)
        bus = 0x0A + 0x0E * index
        numa = (0 if index * 2 < count else 1) if card.numa_node is None else card.numa_node
        return Gpu(
            uuid=GpuUuid(f"GPU-{uuid.uuid5(self._state.seed, str(index))}"),
            index=index,
            bus_id=f"0000:{bus:02x}:00.0",
            product=product.name,
            architecture=product.architecture,
            compute_capability=product.compute_capability,
            memory_bytes=product.memory_mib * MIB,
            reserved_bytes=product.reserved_mib * MIB,
            driver_version=self._state.spec.driver_version,
            cuda_version=self._state.spec.cuda_version,
            profiles=product.profiles,
            resetless=product.resetless,
            numa_node=numa,
            pcie_root=f"pci0000:{bus - 2:02x}",
        )

    # ------------------------------------------------------------ state

    @property
    def cards(self) -> tuple[Gpu, ...]:
        """Every card, lost ones included."""
        return self._gpus

    def boot_id(self) -> str:
        """The content of /proc/sys/kernel/random/boot_id on this node."""
        return self._state.boot_id()

    def inferred(self) -> tuple[str, ...]:
        """One sentence for each product with values that are not from a listing of this product."""
        return tuple(
            f"the simulated {p.name} has values that were inferred, because no listing shows them: {', '.join(p.inferred)}"
            for p in dict.fromkeys(self._products)
            if p.inferred
        )

    def index(self, gpu: GpuUuid) -> int:
        if gpu not in self._index:
            raise DeviceError(f"{gpu} is not a GPU of this node; list the GPUs of the node", Code.NOT_FOUND)
        return self._index[gpu]

    def label(self, index: int) -> str:
        return f"GPU {index} ({self._gpus[index].bus_id})"

    def find(self, uuid_: MigUuid) -> tuple[int, Partition]:
        """The card and the partition with this UUID now. NOT_FOUND if there is none."""
        for index in range(len(self._gpus)):
            for partition in self._state.read(index).live.partitions:
                if partition.uuid == uuid_:
                    return index, partition
        raise DeviceError(f"{uuid_} is not a partition of this node; it was destroyed or never existed", Code.NOT_FOUND)

    def profile(self, index: int, partition: Partition) -> MigProfile:
        profile = self._gpus[index].profile(partition.profile)
        assert profile is not None, "every partition has a profile of its card"
        return profile

    # ------------------------------------------------------------ injected faults

    def cue(
        self,
        effect: Effect,
        call: str = "*",
        gpu: GpuUuid | None = None,
        *,
        code: int = Code.UNKNOWN,
        times: int | None = 1,
        skip: int = 0,
        done: bool = False,
    ) -> str:
        """Cue a fault (see `faults.Cue`) and return its name, for `withdraw` and `wait_hung`."""
        if gpu is not None:
            self.index(gpu)
        return self._cues.add(Cue(effect=effect, call=call, gpu=gpu, code=int(code), times=times, skip=skip, done=done))

    def withdraw(self, cue: str | None = None) -> None:
        """Withdraw this cue, or all cues. Calls that hang on it continue at once."""
        self._cues.withdraw(cue)

    def cues(self) -> dict[str, Cue]:
        return self._cues.pending()

    def wait_hung(self, cue: str, timeout_s: float) -> bool:
        """Block until some call hangs on this cue; False after the timeout."""
        return self._cues.wait_hung(cue, timeout_s)

    # ------------------------------------------------------------ events of a node

    def lose(self, gpu: GpuUuid) -> None:
        """The GPU falls off the bus. Its calls fail until `reset` or `reboot`. The XID does not name the GPU."""
        index = self.index(gpu)
        self._state.change(index, lambda state: replace(state, lost=True))
        self._events.add(XidEvent(gpu=None, xid=XID_OFF_THE_BUS))

    def raise_xid(self, device: GpuUuid | MigUuid, xid: int) -> None:
        """A critical XID on a whole GPU or on one partition."""
        if device.startswith("MIG-"):
            index, partition = self.find(MigUuid(device))
            event = XidEvent(gpu=self._gpus[index].uuid, xid=xid, gi=partition.gi, ci=partition.ci)
        else:
            event = XidEvent(gpu=self._gpus[self.index(GpuUuid(device))].uuid, xid=xid)
        self._events.add(event)

    def run_process(
        self,
        device: GpuUuid | MigUuid,
        *,
        pid: int | None = None,
        name: str = "python",
        used_bytes: int = 0,
        mps: bool = False,
    ) -> int:
        """Start a process on a card or a partition and return its pid. Refused if CUDA would not start.

        `mps`: the process is a client of the MPS server there, so EXCLUSIVE_PROCESS allows it beside the server.
        """
        if device.startswith("MIG-"):
            index, partition = self.find(MigUuid(device))
            gi, ci = partition.gi, partition.ci
        else:
            index, gi, ci = self.index(GpuUuid(device)), None, None

        def start(state: GpuState) -> GpuState:
            chosen = pid or max((p.pid for p in state.processes), default=10_000 * (index + 1)) + 1
            process = GpuProcess(pid=chosen, name=name, gi=gi, ci=ci, used_bytes=used_bytes)
            self._admit(index, state, process, mps)
            return replace(state, processes=(*state.processes, process))

        return self._state.change(index, start).processes[-1].pid

    def _admit(self, index: int, state: GpuState, process: GpuProcess, mps: bool) -> None:
        here = self.label(index)
        beside = [p for p in state.processes if (p.gi, p.ci) == (process.gi, process.ci)]
        if state.lost:
            raise DeviceError(f"{here} is lost; reset it or reboot the node", Code.GPU_IS_LOST)
        if process.gi is None and state.live.mig:
            raise DeviceError(f"{here} is in MIG mode, where CUDA needs a partition; name one", Code.NOT_SUPPORTED)
        if state.compute_mode == ComputeMode.PROHIBITED:
            raise DeviceError(f"{here} is in compute mode PROHIBITED; set it to DEFAULT", Code.NOT_SUPPORTED)
        through = mps and any(p.name == MPS_SERVER for p in beside)
        if state.compute_mode == ComputeMode.EXCLUSIVE_PROCESS and beside and not through:
            raise DeviceError(
                f"{here} is in compute mode EXCLUSIVE_PROCESS, and pid {beside[0].pid} uses it; end that process",
                Code.IN_USE,
            )
        if process.gi is None:
            limit = self._gpus[index].memory_bytes - self._gpus[index].reserved_bytes
        else:
            partition = state.partition(process.gi)
            if partition is None:
                raise DeviceError(
                    f"{here} no longer has GPU instance {process.gi}; name one that exists", Code.NOT_FOUND
                )
            limit = self.profile(index, partition).memory_mib * MIB
        used = sum(p.used_bytes or 0 for p in (*beside, process))
        if used > limit:
            raise DeviceError(
                f"{here} has {limit} bytes there, less than the {used} wanted", Code.INSUFFICIENT_RESOURCES
            )

    def end_process(self, pid: int) -> None:
        """End a process on any card. NOT_FOUND if no card has it."""
        for index in range(len(self._gpus)):
            if any(p.pid == pid for p in self._state.read(index).processes):
                self._state.change(
                    index, lambda state: replace(state, processes=tuple(p for p in state.processes if p.pid != pid))
                )
                return
        raise DeviceError(f"pid {pid} runs on no GPU of this node; list the processes of each GPU", Code.NOT_FOUND)

    def set_mig_pending(self, gpu: GpuUuid, on: bool) -> None:
        """Set a MIG mode that waits for the next reset, like nvidia-smi of an administrator."""
        self._state.change(self.index(gpu), lambda state: state.with_mig(state.live.mig, pending=on))

    def reset(self, gpu: GpuUuid) -> None:
        """Reset a GPU: removes partitions, applies a pending MIG mode, brings back a lost GPU. IN_USE with processes."""
        index = self.index(gpu)

        def again(state: GpuState) -> GpuState:
            if state.processes and not state.lost:
                pids = ", ".join(str(p.pid) for p in state.processes)
                raise DeviceError(f"{self.label(index)} cannot be reset while pids {pids} run; end them", Code.IN_USE)
            mode = state.live.mig_pending
            return GpuState(live=LiveGpu(mig=mode, mig_pending=mode), compute_mode=state.compute_mode)

        self._state.change(index, again)

    def reboot(self) -> None:
        """Remove the state that a reboot removes: partitions, processes, compute modes, cues; MIG mode except on Ampere."""
        for index, gpu in enumerate(self._gpus):
            self._state.change(index, partial(_booted, gpu.resetless))
        self._cues.withdraw(None)
        self._state.new_boot()

    def close(self) -> None:
        """Close the folder. Hung calls of this process fail as uninitialized; the node itself stays."""
        self._cues.close()
        self._events.close()


def _booted(resetless: bool, state: GpuState) -> GpuState:
    on = not resetless and state.live.mig_pending
    return GpuState(live=LiveGpu(mig=on, mig_pending=on))
