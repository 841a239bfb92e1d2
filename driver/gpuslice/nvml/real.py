"""NVML of a real node, through nvidia-ml-py. Everything is read from the hardware; there is no table of products here.

The process keeps one session open, because a new session costs seconds if nothing else keeps the NVIDIA driver loaded. It
caches handles, because the search for a GPU by UUID is slow while other calls run (NVIDIA's DRA driver notes up to 10 s).
Our open session can make another program's switch of MIG mode fail as "in use". An open session of another program can do
the same to the driver.

If NVML cannot list the profiles of a card, the card has `profiles=()` and a sentence in `notes()`: drivers around R535 list
no profiles while MIG is off. A caller may remember earlier profiles; this class does not. `Host.locate` finds the place of
a card on the machine.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from functools import partial
from pathlib import Path

import pynvml

from gpuslice.core.model import Gpu, GpuUuid, LiveGpu, MigUuid, Placement
from gpuslice.errors import DeviceError
from gpuslice.nvml import card, mig
from gpuslice.nvml.api import TIME_SLICES, XID_OFF_THE_BUS, Code, ComputeMode, GpuProcess, Memory, XidEvent
from gpuslice.nvml.card import CardFacts
from gpuslice.nvml.library import asking, find, refusal, start
from gpuslice.nvml.listing import LIMIT_S, Listing
from gpuslice.nvml.mig import Handle, tolerating
from gpuslice.nvml.smi import Smi

_WHOLE = 0xFFFFFFFF  # instead of an instance id: the whole GPU
_MOST_CARDS = 64  # the largest machines have 16; a larger count is wrong
_MOST_MINOR = 0xFFFFF  # 20 bits, Linux' dev_t
_XID = pynvml.nvmlEventTypeXidCriticalError
_PROC = Path("/proc")


class RealNvml:
    """`Nvml` on the GPUs of this machine. `driver_root`: mount point of the host's / (or the driver container's)."""

    def __init__(self, driver_root: Path | None = None, *, hang_limit_s: float = LIMIT_S) -> None:
        start(driver_root)
        self._smi = Smi(driver_root, find(driver_root) if driver_root else None)
        self._versions, self._unknown = card.versions()
        self._listing: Listing[tuple[CardFacts, Handle]] = Listing(hang_limit_s)
        self._handles: dict[GpuUuid, Handle] = {}
        self._labels: dict[GpuUuid, str] = {}
        self._slices: dict[GpuUuid, dict[int, int]] = {}  # compute slices by profile id
        self._lost: tuple[str, ...] = ()
        self._doubled: frozenset[GpuUuid] = frozenset()
        self._notes: tuple[str, ...] = ()
        self._events: Handle | None = None
        self._waiting = threading.Lock()
        self._closing = threading.Event()

    # ------------------------------------------------------------ cards

    def gpus(self) -> tuple[Gpu, ...]:
        with asking("this node", "count its GPUs"):
            count = int(pynvml.nvmlDeviceGetCount())
        notes = list(self._unknown)
        if count > _MOST_CARDS:
            notes.append(f"NVML counts {count} GPUs on this node; only the first {_MOST_CARDS} are asked")
        read, lost = self._listing.read(range(min(count, _MOST_CARDS)), partial(card.read, of=self._versions))
        times = Counter(found.gpu.uuid for found, _ in read)
        self._doubled = frozenset(uuid for uuid, number in times.items() if number > 1)
        for found, device in read:
            self._keep(found, device)
        self._lost = (*lost, *map(_doubled, sorted(self._doubled)))
        self._notes = (*notes, *(note for found, _ in read for note in found.notes))
        return tuple(found.gpu for found, _ in read if found.gpu.uuid not in self._doubled)

    def lost(self) -> tuple[str, ...]:
        return self._lost

    def notes(self) -> tuple[str, ...]:
        return self._notes

    def _keep(self, found: CardFacts, device: Handle) -> None:
        uuid = found.gpu.uuid
        self._handles[uuid], self._labels[uuid] = device, found.label
        if found.gpu.profiles:
            self._slices[uuid] = {profile.id: profile.compute_slices for profile in found.gpu.profiles}

    # ------------------------------------------------------------ one card now

    def look(self, gpu: GpuUuid) -> LiveGpu:
        device, label = self._device(gpu)
        with asking(label, "read its partitions"):
            mode = mig.mode(device)
            if mode is None:
                return LiveGpu(mig=False, mig_pending=False)
            current, pending = mode
            slices = self._widths(gpu, device) if current else {}
            return LiveGpu(mig=current, mig_pending=pending, partitions=mig.partitions(device, slices))

    def minor(self, gpu: GpuUuid) -> int:
        device, label = self._device(gpu)
        with asking(label, "read its device minor"):
            minor = int(pynvml.nvmlDeviceGetMinorNumber(device))
            if minor > _MOST_MINOR:
                raise ValueError(f"device minor {minor}")
            return minor

    def processes(self, gpu: GpuUuid) -> tuple[GpuProcess, ...]:
        device, label = self._device(gpu)
        found: dict[tuple[int, int, int], GpuProcess] = {}
        with asking(label, "list its processes"):
            for listed in (
                pynvml.nvmlDeviceGetComputeRunningProcesses_v3,
                pynvml.nvmlDeviceGetGraphicsRunningProcesses_v3,
                pynvml.nvmlDeviceGetMPSComputeRunningProcesses_v3,
            ):
                with tolerating(Code.NOT_SUPPORTED, Code.FUNCTION_NOT_FOUND):
                    for entry in listed(device):
                        key = (entry.pid, entry.gpuInstanceId, entry.computeInstanceId)
                        found.setdefault(key, _process(*key, entry.usedGpuMemory))
        return tuple(found.values())

    def memory(self, device: GpuUuid | MigUuid) -> Memory:
        with asking(device, "read its memory"):
            if device.startswith("MIG-"):  # never cached: the handle outlives the partition, and NVML reuses the id
                handle = pynvml.nvmlDeviceGetHandleByUUID(device)
            else:
                handle, _ = self._device(GpuUuid(device))
            total, _, used = card.memory(handle)
        return Memory(total, used)

    # ------------------------------------------------------------ changes

    def set_mig_mode(self, gpu: GpuUuid, on: bool) -> None:
        device, label = self._device(gpu)
        what = f"switch MIG mode {'on' if on else 'off'}"
        with asking(label, what):
            if mig.mode(device) == (on, on):
                return
            # Success of the call is not success of the switch; the returned status shows the result of the switch.
            status = pynvml.nvmlDeviceSetMigMode(device, int(on))
        if status != Code.SUCCESS:
            raise refusal(label, what, status)

    def create_gpu_instance(self, gpu: GpuUuid, profile: int, placement: Placement) -> int:
        device, label = self._device(gpu)
        with asking(label, f"create a GPU instance of profile {profile} at {placement.start}:{placement.size}"):
            return mig.create_gi(device, profile, placement)

    def create_compute_instance(self, gpu: GpuUuid, gi: int) -> tuple[int, MigUuid]:
        device, label = self._device(gpu)
        with asking(label, f"create a compute instance in GPU instance {gi}"):
            return mig.create_ci(device, gi, self._widths(gpu, device))

    def destroy_compute_instance(self, gpu: GpuUuid, gi: int, ci: int) -> None:
        device, label = self._device(gpu)
        with asking(label, f"destroy compute instance {ci} of GPU instance {gi}"):
            mig.destroy_ci(device, gi, ci)

    def destroy_gpu_instance(self, gpu: GpuUuid, gi: int) -> None:
        device, label = self._device(gpu)
        with asking(label, f"destroy GPU instance {gi}"):
            mig.destroy_gi(device, gi)

    def compute_mode(self, gpu: GpuUuid) -> ComputeMode:
        device, label = self._device(gpu)
        with asking(label, "read its compute mode"):
            return ComputeMode(pynvml.nvmlDeviceGetComputeMode(device))

    def set_compute_mode(self, gpu: GpuUuid, mode: ComputeMode) -> None:
        device, label = self._device(gpu)
        with asking(label, f"set compute mode {mode.name}"):
            pynvml.nvmlDeviceSetComputeMode(device, int(mode))

    def time_slice(self, gpu: GpuUuid) -> int:
        return self._smi.time_slice(gpu, self._device(gpu)[1])

    def set_time_slice(self, gpu: GpuUuid, level: int) -> None:
        label = self._device(gpu)[1]
        if level not in TIME_SLICES:
            raise refusal(label, f"set time slice {level}", Code.INVALID_ARGUMENT)
        self._smi.set_time_slice(gpu, label, level)

    # ------------------------------------------------------------ events

    def wait_event(self, timeout_s: float) -> XidEvent | None:
        with self._waiting, asking("this node", "wait for events"):
            if self._events is None:
                self._events = _subscribe()
            if self._events is None:  # no GPU reports events; NVML would return at once, again and again
                self._closing.wait(timeout_s)
                return None
            try:
                event = pynvml.nvmlEventSetWait_v2(self._events, int(timeout_s * 1000))
            except pynvml.NVMLError_Timeout:
                return None
            except pynvml.NVMLError_GpuIsLost:
                # Every further wait would end in the same way, so continue without the lost GPU.
                self._unsubscribe()
                return XidEvent(gpu=None, xid=XID_OFF_THE_BUS)
            if event.eventType != _XID:
                return None
            gpu = GpuUuid(pynvml.nvmlDeviceGetUUID(event.device))
        return XidEvent(
            gpu=gpu, xid=int(event.eventData), gi=_instance(event.gpuInstanceId), ci=_instance(event.computeInstanceId)
        )

    def _unsubscribe(self) -> None:
        if self._events is not None:
            pynvml.nvmlEventSetFree(self._events)
        self._events = None

    def close(self) -> None:
        """End the session of this process. A second call does nothing."""
        if not self._closing.is_set():
            self._closing.set()
            # A wait cannot be cancelled, and the library must stay loaded until its end.
            with self._waiting, contextlib.suppress(pynvml.NVMLError):
                self._unsubscribe()
                pynvml.nvmlShutdown()

    # ------------------------------------------------------------ handles

    def _device(self, gpu: GpuUuid) -> tuple[Handle, str]:
        """The handle of a card, and its name for errors."""
        if gpu in self._doubled:  # the handle, and so the device minor, could belong to the other card
            raise DeviceError(_doubled(gpu), Code.INVALID_ARGUMENT)
        if gpu not in self._handles:
            with asking(gpu, "find it"):
                self._handles[gpu] = pynvml.nvmlDeviceGetHandleByUUID(gpu)
        return self._handles[gpu], self._labels.get(gpu, gpu)

    def _widths(self, gpu: GpuUuid, device: Handle) -> dict[int, int]:
        if gpu not in self._slices:
            self._slices[gpu] = {profile.id: profile.compute_slices for profile in mig.profiles(device)[0]}
        return self._slices[gpu]


def _doubled(gpu: GpuUuid) -> str:
    return (
        f"GPU {gpu}: several cards of this node have this UUID; update the NVIDIA driver, or remove one of these cards"
    )


def _subscribe() -> Handle | None:
    """One event set for all GPUs that can report XIDs. None if no GPU can."""
    events: Handle = pynvml.nvmlEventSetCreate()
    registered = 0
    for index in range(pynvml.nvmlDeviceGetCount()):
        with tolerating(Code.NOT_SUPPORTED, Code.GPU_IS_LOST):
            device = pynvml.nvmlDeviceGetHandleByIndex(index)
            if pynvml.nvmlDeviceGetSupportedEventTypes(device) & _XID:
                pynvml.nvmlDeviceRegisterEvents(device, _XID, events)
                registered += 1
    if registered:
        return events
    pynvml.nvmlEventSetFree(events)
    return None


def _process(pid: int, gi: int, ci: int, used: int | None) -> GpuProcess:
    try:
        name = (_PROC / str(pid) / "comm").read_text(errors="replace").strip()
    except OSError:  # another pid namespace, or it has ended
        name = ""
    return GpuProcess(pid=pid, name=name, gi=_instance(gi), ci=_instance(ci), used_bytes=used)


def _instance(number: int) -> int | None:
    return None if number == _WHOLE else number
