"""One look at the node that finds unavailable devices: lost or hung GPUs, foreign partitions, a wrong MIG mode."""

from __future__ import annotations

import concurrent.futures
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

from gpuslice.checkpoint import Checkpoint
from gpuslice.core import health
from gpuslice.core.health import NodeLook, Taints
from gpuslice.core.inventory import Inventory, Pool
from gpuslice.core.model import GpuUuid, LiveGpu, Mps, Taint
from gpuslice.errors import DeviceError, HungError
from gpuslice.mps.api import MpsDaemons
from gpuslice.nvml.api import FOR_GOOD, Nvml

log = logging.getLogger(__name__)


# Same limit as for prepares (`plugin/workers.py`): a look that takes longer counts as hung.
LIMIT_S = 15.0

Reply = TypeVar("Reply")
Pending = concurrent.futures.Future[Any]


class HangGuard:
    """Asks GPUs in a thread. If a call hangs, the thread is left behind, so that one dead card hides no other."""

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        self._limit_s = limit_s
        self._questions: queue.SimpleQueue[tuple[Callable[[], Any], Pending]] | None = None
        self._stuck: dict[GpuUuid, Pending] = {}

    def ask(self, verb: Callable[[GpuUuid], Reply], gpu: GpuUuid) -> Reply:
        """Ask one GPU. DeviceError from NVML. HungError without an answer in time, and in later calls until the answer
        comes."""
        stuck = self._stuck.get(gpu)
        if stuck is not None and not stuck.done():
            raise self._hung(gpu)
        self._stuck.pop(gpu, None)
        if self._questions is None:
            questions: queue.SimpleQueue[tuple[Callable[[], Any], Pending]] = queue.SimpleQueue()
            self._questions = questions  # the thread compares this with its own questions
            try:
                threading.Thread(target=self._answer, args=(questions,), name="look at the node", daemon=True).start()
            except RuntimeError:
                self._questions = None  # otherwise the next look waits for a thread that does not exist
                raise
        answer: concurrent.futures.Future[Reply] = concurrent.futures.Future()
        self._questions.put((partial(verb, gpu), answer))
        try:
            return answer.result(self._limit_s)
        except TimeoutError:
            self._questions, self._stuck[gpu] = None, answer
            raise self._hung(gpu) from None

    def _answer(self, questions: queue.SimpleQueue[tuple[Callable[[], Any], Pending]]) -> None:
        while questions is self._questions or not questions.empty():
            question, answer = questions.get()
            try:
                answer.set_result(question())
            except BaseException as e:  # noqa: BLE001 - handed to the caller
                answer.set_exception(e)

    def _hung(self, gpu: GpuUuid) -> HungError:
        return HungError.overdue(f"a look at GPU {gpu}", [gpu], self._limit_s)


class NodeHealth:
    def __init__(
        self,
        *,
        nvml: Nvml,
        mps: MpsDaemons,
        checkpoint: Checkpoint,
        hung: Callable[[], Mapping[GpuUuid, str]],
        renew: Callable[[], bool] = lambda: False,
        refused: Callable[[], Mapping[tuple[GpuUuid, str], str]] = dict,
        limit_s: float = LIMIT_S,
    ) -> None:
        """`renew` starts NVML again and returns whether it did. It is called if no card at all can be read."""
        self._nvml = nvml
        self._guard = HangGuard(limit_s)
        self._verbs: dict[str, Callable[[GpuUuid], object]] = {
            "minor": nvml.minor,
            "time_slice": nvml.time_slice,
            "compute_mode": nvml.compute_mode,
        }
        self._answered: dict[tuple[GpuUuid, str], Taint | None] = {}  # final, because a card never gets a new verb
        self._mps = mps
        self._checkpoint = checkpoint
        self._hung, self._renew, self._refused = hung, renew, refused
        self.unreadable = ""  # why no card could be read; "" if a card could be read
        self._logged: Taints = {}

    def look(self, inventory: Inventory) -> Taints:
        """Taints of all devices. Logs new and removed taints. It blocks, but does not look at a hung GPU."""
        taints = self.survey(inventory).taints
        self._log_changes(taints)
        return taints

    def survey(self, inventory: Inventory) -> NodeLook:
        """The whole node as it is now. The log names a new session only."""
        # Records before and after the look: a partition of ours has its record before it is made and until it is gone.
        records = self._checkpoint.records()
        live, unwell = self._look_at_all(inventory)
        # A card that answers shows that the session works. A session with a hung card must not be replaced.
        if not live and unwell and all(taint.value == "lost" for taint in unwell.values()) and self._renew():
            live, unwell = self._look_at_all(inventory)
        self.unreadable = "" if live or not unwell else f"no card can be read: {min(unwell.values()).reason}"
        records |= self._checkpoint.records()
        taints = health.taints(
            inventory, live, unwell, records.values(), self._daemons(inventory), self._unable(inventory)
        )
        return NodeLook(inventory, live, records, taints)

    def _look_at_all(self, inventory: Inventory) -> tuple[dict[GpuUuid, LiveGpu], dict[GpuUuid, Taint]]:
        """Each card's state, or its problem."""
        live: dict[GpuUuid, LiveGpu] = {}
        unwell = {gpu: Taint("gpu", "hung", reason=text) for gpu, text in self._hung().items()}
        for pool in inventory.pools:
            uuid = pool.gpu.uuid
            if uuid in unwell:
                continue
            try:
                live[uuid] = self._guard.ask(self._nvml.look, uuid)
                self._learn(pool, live[uuid])
            except HungError as e:
                unwell[uuid] = Taint("gpu", "hung", reason=str(e))
            except DeviceError as e:
                unwell[uuid] = Taint("gpu", "lost", reason=str(e))
        return live, unwell

    def _learn(self, pool: Pool, live: LiveGpu) -> None:
        """Ask once for each verb that claims of this card will need. If an answer is not final, the next look asks again."""
        uuid = pool.gpu.uuid
        for verb in health.needs(pool, live):
            if (uuid, verb) in self._answered:
                continue
            try:
                self._guard.ask(self._verbs[verb], uuid)
                self._answered[uuid, verb] = None
            except HungError:
                raise
            except DeviceError as e:
                if e.code in FOR_GOOD:
                    self._answered[uuid, verb] = health.refused(verb, str(e))

    def _unable(self, inventory: Inventory) -> dict[GpuUuid, tuple[Taint, ...]]:
        found = {key: taint for key, taint in self._answered.items() if taint is not None}
        found |= {(gpu, verb): health.refused(verb, reason) for (gpu, verb), reason in self._refused().items()}

        def of(gpu: GpuUuid) -> Iterator[Taint]:
            return (taint for (uuid, _), taint in found.items() if uuid == gpu)

        return {pool.gpu.uuid: tuple(of(pool.gpu.uuid)) for pool in inventory.pools}

    def _daemons(self, inventory: Inventory) -> dict[str, Taint]:
        """MPS daemons with a problem. The supervisor is asked only if a card offers MPS."""
        if not any(isinstance(device.offer.sharing, Mps) for pool in inventory.pools for device in pool.devices):
            return {}
        try:
            return {r.key: Taint("mps", "fault", reason=r.problem) for r in self._mps.statuses() if r.problem}
        except DeviceError as e:
            return {"": Taint("mps", "supervisor-away", reason=str(e))}

    def _log_changes(self, taints: Taints) -> None:
        def reasons(of: Taints) -> set[str]:
            return {taint.reason for here in of.values() for taint in here}

        for reason in sorted(reasons(taints) - reasons(self._logged)):
            log.warning("tainted devices: %s", reason)
        for reason in sorted(reasons(self._logged) - reasons(taints)):
            log.info("removed the taint of devices, because this is over: %s", reason)
        self._logged = taints
