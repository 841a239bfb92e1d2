"""Many nodes in one process: on each, the product's own controller and publisher over simulated cards.

`python -m hack.lib.scale.publishers KUBECONFIG FOLDER FIRST COUNT` reads orders from stdin and answers each one on stdout,
one JSON object a line. It ends with stdin. `Publishers` is the other side of these pipes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gpuslice.answers import Call
from gpuslice.api import Api
from gpuslice.checkpoint import Checkpoint
from gpuslice.core.inventory import Inventory
from gpuslice.core.policy.rules import Policy
from gpuslice.kube import Kube
from gpuslice.mps.client import MpsClient
from gpuslice.nvml.sim.nvml import SimNvml
from gpuslice.publishing.controller import SliceController
from gpuslice.publishing.node_health import NodeHealth
from gpuslice.system import files

from hack.lib.scale.errors import ScaleError
from hack.lib.scale.figures import Stamp
from hack.lib.scale.fleet import CARDS, DRIVER, REPOSITORY, name_of

_STARTERS = 8
_ENDED = "a process with publishers has ended, see above; --tree needs a driver with the modules of this tree"


class _StampedApi(Api):
    """An API server that notes each request when it is sent."""

    def __init__(self, kubeconfig: Path, note: Callable[[str, str], None]) -> None:
        super().__init__(kubeconfig)
        self._note = note

    def _send(self, call: Call, *arguments: Any, **more: Any) -> Any:
        self._note(call.verb, call.resource)
        return super()._send(call, *arguments, **more)


class _StampedKube(Kube):
    def __init__(self, kubeconfig: Path, note: Callable[[str, str], None]) -> None:
        super().__init__(kubeconfig)
        self._api, self._claims = _StampedApi(kubeconfig, note), _StampedApi(kubeconfig, note)


class _Node:
    def __init__(self, kubeconfig: Path, folder: Path, number: int) -> None:
        self._kubeconfig, self._folder, self._number = kubeconfig, folder, number
        self.nvml = SimNvml(folder / "node", CARDS, latency="zero")
        self._gpus = self.nvml.gpus()
        self._checkpoint = Checkpoint(files.ensure_folder(folder / "claims"), "a-boot")
        self.stamps: list[Stamp] = []
        self._kube: Kube | None = None
        self.controller: SliceController | None = None

    def start(self, policy: Policy) -> None:
        """Start a driver with this policy, after the end of the former driver."""
        self.stop()
        self.nvml.reset(self._gpus[0].uuid)
        kube, gpus, name = _StampedKube(self._kubeconfig, self._note), self._gpus, name_of(self._number)
        health = NodeHealth(nvml=self.nvml, mps=MpsClient(self._folder / "mps"), checkpoint=self._checkpoint, hung=dict)
        controller = SliceController(
            kube=kube,
            driver=DRIVER,
            node=name,
            dynamic=Inventory.of(gpus, policy, name),
            static=Inventory.of(gpus, policy, name, static=True),
            health=health,
            checkpoint=self._checkpoint,
            folder=self._folder,
        )
        controller.start()
        self._kube, self.controller = kube, controller

    def stop(self) -> None:
        if self.controller is not None:
            self.controller.stop()
        if self._kube is not None:
            self._kube.close()

    def lose_a_card(self) -> None:
        """Lose a card, so that the node has something to publish."""
        self.nvml.lose(self._gpus[0].uuid)
        if self.controller is not None:
            self.controller.nudge()

    @property
    def published(self) -> bool:
        return self.controller is not None and self.controller.problem() is None

    @property
    def shapes(self) -> str:
        with contextlib.suppress(FileNotFoundError):
            return (self._folder / "shapes.json").read_text(encoding="utf-8")
        return '{"pools": {}}'

    def _note(self, verb: str, resource: str) -> None:
        self.stamps.append(Stamp(time.time(), self._number, verb, resource))


def with_counters(shapes: str) -> int:
    """The number of pools with counters in the file of shapes. Such pools still offer more than whole cards."""
    pools: Mapping[str, Sequence[Mapping[str, object]]] = json.loads(shapes)["pools"]
    return sum(any(spec.get("sharedCounters") for spec in specs) for specs in pools.values())


def _obey(nodes: Sequence[_Node], order: Mapping[str, Any]) -> None:
    match order["do"]:
        case "start":
            policy = Policy.parse(order["policy"])
            with ThreadPoolExecutor(_STARTERS, "start") as threads:
                list(threads.map(lambda node: node.start(policy), nodes))
        case "lose a card":
            for node in nodes:
                node.lose_a_card()
        case _:  # only a look
            pass


def _serve(nodes: Sequence[_Node]) -> None:
    """Carry out orders and answer them, until stdin ends."""
    for line in sys.stdin:
        _obey(nodes, json.loads(line))
        stamps: list[Stamp] = []
        for node in nodes:
            taken, node.stamps = node.stamps, []
            stamps += taken
        answer = {
            "published": sum(node.published for node in nodes),
            "counters": sum(with_counters(node.shapes) for node in nodes),
            "stamps": [[one.at, one.node, one.verb, one.resource] for one in stamps],
        }
        print(json.dumps(answer), flush=True)
    with ThreadPoolExecutor(_STARTERS, "stop") as threads:
        list(threads.map(lambda node: node.stop(), nodes))


class Publishers:
    """The fleet: `count` nodes in a few processes."""

    def __init__(self, kubeconfig: Path, folder: Path, count: int, tree: Path) -> None:
        """`tree`: the checkout whose driver runs. The other code of the processes is from this checkout."""
        self.published, self.counters = 0, 0
        self.stamps: list[Stamp] = []
        processes = min(count, max(2, min(4, os.cpu_count() or 2)))
        environment = os.environ | {"PYTHONPATH": f"{tree / 'driver'}:{REPOSITORY}"}
        self._processes: list[subprocess.Popen[str]] = []
        for number in range(processes):
            numbers = range(number * count // processes, (number + 1) * count // processes)
            words = [str(kubeconfig), str(folder), str(numbers.start), str(len(numbers))]
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "hack.lib.scale.publishers", *words],
                    cwd=REPOSITORY,
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )

    def order(self, do: str, **more: object) -> None:
        """Give an order to all processes, and take their answers: the published nodes, and the stamps since the last order."""
        for process in self._processes:
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps({"do": do, **more}) + "\n")
                process.stdin.flush()
            except BrokenPipeError as e:
                raise ScaleError(_ENDED) from e
        answers = list(map(self._answer, self._processes))
        self.published = sum(answer["published"] for answer in answers)
        self.counters = sum(answer["counters"] for answer in answers)
        self.stamps += (Stamp(*fields) for answer in answers for fields in answer["stamps"])

    @staticmethod
    def _answer(process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise ScaleError(_ENDED)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        for process in self._processes:
            assert process.stdout is not None
            process.wait()
            process.stdout.close()


@contextlib.contextmanager
def publishers(kubeconfig: Path, folder: Path, count: int, tree: Path) -> Iterator[Publishers]:
    fleet = Publishers(kubeconfig, folder, count, tree)
    try:
        yield fleet
    finally:
        fleet.close()


def main() -> None:
    logging.basicConfig(level=logging.ERROR)  # each pool that waits logs a warning, and each node has eight
    kubeconfig, folder, first, count = sys.argv[1:5]
    numbers = range(int(first), int(first) + int(count))
    _serve([_Node(Path(kubeconfig), files.ensure_folder(Path(folder) / name_of(number)), number) for number in numbers])


if __name__ == "__main__":
    main()
