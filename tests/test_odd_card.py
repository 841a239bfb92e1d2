"""One odd card: for any answer to any call, the other cards are offered and served as if it were healthy.

Each verb of NVML × (each code that it may return, a hang, an absurd text, an absurd number), with one product of
each generation as the odd card. `tests/nvml/test_odd_card.py` does the same to NVIDIA's functions below.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gpuslice import node
from gpuslice.core.inventory import Inventory
from gpuslice.core.model import DeviceRef, Gpu, GpuUuid, LiveGpu, MigUuid, Partition, Placement, PoolName
from gpuslice.core.pools.pool import Features, resource_slices
from gpuslice.core.pools.validation import problems
from gpuslice.errors import ClaimError, DeviceError
from gpuslice.nvml.api import ComputeMode
from gpuslice.nvml.sim.faults import CODES
from gpuslice.nvml.sim.nvml import SimNvml
from gpuslice.publishing.node_health import NodeHealth
from gpuslice.system import files
from gpuslice.system.host import SimHost

from tests.kit.builders import a_policy
from tests.kit.rig import NODE, Rig, a_claim

OLD = {"reserved_mib": 0, "pci_device_id": "0x000010DE", "resetless": False, "profiles": []}
PRODUCTS = {
    "p4": OLD | {"name": "Tesla P4", "architecture": "Pascal", "compute_capability": "6.1", "memory_mib": 7680},
    "v100": OLD | {"name": "Tesla V100", "architecture": "Volta", "compute_capability": "7.0", "memory_mib": 16384},
    "gb10": OLD | {"name": "NVIDIA GB10", "architecture": "Blackwell", "compute_capability": "12.1", "memory_mib": 0},
}
GENERATIONS = ("p4", "v100", "t4", "a100-40g", "l4", "h100", "rtx-pro-6000", "gb10")
VERBS = tuple(verb for verb in CODES if verb != "wait_event")  # no thread waits for events
POLICY = a_policy(timeslice={"interval": "short"})
ALL = Features(partitionable=True, consumable=True, taints=True)
# A text that is no UTF-8 ends at the door (tests/nvml/test_odd_card.py); any other comes through.
NO_TEXT, ABSURD = "\xe9\ufffd\x1b\n" * 50, 2**64 - 1


def absurd_cards(gpu: Gpu, other: Gpu) -> Iterator[Gpu]:
    for field in ("product", "architecture", "compute_capability", "driver_version", "cuda_version"):
        for text in (NO_TEXT, ""):
            yield replace(gpu, **{field: text})  # type: ignore[arg-type]
    for field in ("memory_bytes", "reserved_bytes", "index"):
        for number in (0, ABSURD):
            yield replace(gpu, **{field: number})  # type: ignore[arg-type]
    yield replace(gpu, memory_bytes=ABSURD, reserved_bytes=ABSURD)
    for bus_id in (NO_TEXT, "", "0000:ffffffff:00.0"):
        yield replace(gpu, bus_id=bus_id)
    for uuid in (NO_TEXT, "", other.uuid):
        yield replace(gpu, uuid=GpuUuid(uuid))
    for profile in gpu.profiles[:1]:
        for field in ("memory_mib", "multiprocessors", "copy_engines", "compute_slices", "max_instances"):
            yield replace(gpu, profiles=(replace(profile, **{field: ABSURD}), *gpu.profiles[1:]))  # type: ignore[arg-type]
        yield replace(gpu, profiles=(replace(profile, name=NO_TEXT), *gpu.profiles[1:]))
        yield replace(gpu, profiles=(replace(profile, placements=()), *gpu.profiles[1:]))


def absurd_looks() -> Iterator[LiveGpu]:
    for placement in (Placement(0, ABSURD), Placement(ABSURD, 1), Placement(0, 0)):
        for profile in (0, ABSURD):
            partition = Partition(profile=profile, placement=placement, gi=ABSURD, ci=0, uuid=MigUuid(NO_TEXT))
            yield LiveGpu(mig=True, mig_pending=True, partitions=(partition,))


class OddNvml(SimNvml):
    """The simulated node, whose card 0 answers with the value in `says` for a verb."""

    says: dict[str, Any] = {}  # noqa: RUF012  replaced for each case

    def _listed(self, index: int) -> Gpu:
        gpu = super()._listed(index)
        return self.says.get("gpus", gpu) if index == 0 else gpu

    def _odd(self, verb: str, gpu: GpuUuid, usual: Callable[[GpuUuid], Any]) -> Any:
        return self.says[verb] if verb in self.says and gpu == self.cards[0].uuid else usual(gpu)

    def look(self, gpu: GpuUuid) -> LiveGpu:
        found: LiveGpu = self._odd("look", gpu, super().look)
        return found

    def minor(self, gpu: GpuUuid) -> int:
        return int(self._odd("minor", gpu, super().minor))

    def time_slice(self, gpu: GpuUuid) -> int:
        return int(self._odd("time_slice", gpu, super().time_slice))

    def compute_mode(self, gpu: GpuUuid) -> ComputeMode:
        mode: ComputeMode = self._odd("compute_mode", gpu, super().compute_mode)
        return mode


class Trial:
    """A node with an odd card at index 0, and what its good cards publish while no card is odd."""

    def __init__(self, folder: Path, product: str, limit_s: float) -> None:
        spec = folder / "node.yaml"
        body = {"gpus": [{"product": key} for key in (product, "h100", "l4")], "products": PRODUCTS}
        spec.write_text(json.dumps(body))
        self.rig = Rig(folder, str(spec), POLICY)
        self.nvml = OddNvml(folder / "node", str(spec), latency="zero", hang_limit_s=limit_s)
        self.rig.build(self.nvml)
        self.cards = node.Cards(self.nvml, SimHost(folder / "node"), files.ensure_folder(folder / "plugin"))
        self.limit_s = limit_s
        self.odd, *self.good = self.nvml.cards
        self.tried, self.harmed, self.lost = 0, list[str](), list[str]()
        self.well = self.published()

    def published(self) -> dict[PoolName, str]:
        """The published devices of the good cards, after a start and a look at the node."""
        gpus, _ = self.cards.known()
        inventory = Inventory.of(gpus, POLICY, NODE)
        health = NodeHealth(
            nvml=self.nvml, mps=self.rig.mps, checkpoint=self.rig.checkpoint, hung=dict, limit_s=self.limit_s
        )
        taints = health.look(inventory)
        pools = resource_slices(inventory, taints, driver="gpuslice.dev", features=ALL)
        good = {pool.name for pool in inventory.pools if pool.gpu.uuid in {gpu.uuid for gpu in self.good}}
        assert all(not problems(pool) for pool in pools if pool.name in good)
        return {pool.name: json.dumps(pool.specs) for pool in pools if pool.name in good}

    def serve(self, device: str, pool: int) -> None:
        claim = a_claim(f"{device}-{pool}", DeviceRef(self.rig.inventory.pools[pool].name, device))
        try:
            self.rig.prepare(claim)
        finally:
            self.rig.unprepare(claim)

    def attempt(self, what: str, *, hangs: bool = False, serve: bool = True) -> None:
        """Publish, and serve the odd card if it does not hang. With `serve`, serve the good card, too."""
        self.tried += 1
        try:
            if self.published() != self.well:
                self.harmed.append(what)
            for device in () if hangs else ("gpu", "timeslice"):
                with contextlib.suppress(DeviceError, ClaimError):
                    self.serve(device, 0)
        except Exception as e:  # noqa: BLE001  that is what would end the process
            self.lost.append(f"{what}: {ascii(e)[:300]}")
        try:
            if serve:
                self.serve("mig-1g-19-0", 1)
        except Exception as e:  # noqa: BLE001
            self.harmed.append(f"{what}: {ascii(e)[:300]}")

    def restore(self) -> None:
        self.nvml.says = {}
        self.nvml.withdraw()
        self.nvml.reset(self.odd.uuid)
        self.rig.recover()

    def result(self) -> tuple[list[str], list[str]]:
        """Harmed good cards, and errors that would have ended the process."""
        return self.harmed, self.lost


@pytest.fixture
def trial(request: pytest.FixtureRequest) -> Iterator[Trial]:
    """A folder in memory if the machine has one, because a thousand claims wait for a disk."""
    product, limit_s = request.param
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="gs-", dir=memory if os.access(memory, os.W_OK) else None) as folder:
        there = Trial(Path(folder), product, limit_s)
        yield there
        there.nvml.withdraw()
        there.nvml.close()


@pytest.mark.parametrize("trial", [(product, 15.0) for product in GENERATIONS], indirect=True, ids=GENERATIONS)
def test_no_refusal_of_one_card_harms_another(trial: Trial) -> None:
    for verb in VERBS:
        for number, code in enumerate(sorted(CODES[verb])):
            trial.nvml.cue("fail", verb, trial.odd.uuid, code=code, times=None)
            trial.attempt(f"{verb} {code.name}", serve=number == 0)  # a claim writes to the disk: once a verb
            trial.restore()

    assert trial.result() == ([], [])
    assert trial.tried == sum(len(CODES[verb]) for verb in VERBS)


@pytest.mark.parametrize("trial", [(product, 1.0) for product in GENERATIONS], indirect=True, ids=GENERATIONS)
def test_no_hang_of_one_card_harms_another(trial: Trial) -> None:
    for verb in VERBS:
        trial.nvml.cue("hang", verb, trial.odd.uuid, times=None)
        trial.attempt(f"{verb} hangs", hangs=True)
        trial.restore()

    assert trial.result() == ([], [])


@pytest.mark.parametrize("trial", [(product, 15.0) for product in GENERATIONS], indirect=True, ids=GENERATIONS)
def test_no_absurd_answer_of_one_card_harms_another(trial: Trial) -> None:
    answers: list[tuple[str, Any]] = [("gpus", card) for card in absurd_cards(trial.odd, trial.good[0])]
    answers += [("look", live) for live in absurd_looks()]
    answers += [(verb, number) for verb in ("minor", "time_slice") for number in (-1, ABSURD)]
    answers += [("compute_mode", ComputeMode.EXCLUSIVE_THREAD), ("compute_mode", ComputeMode.PROHIBITED)]
    trial.cards.save(trial.cards.known()[0])  # of two cards with one UUID, the one that was seen before is the one
    for verb, answer in answers:
        trial.nvml.says = {verb: answer}
        trial.attempt(f"{verb} {ascii(answer)[:300]}")
        trial.restore()

    assert trial.result() == ([], [])
