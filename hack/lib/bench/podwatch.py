"""When pods became ready and when they were gone, from one watch, without polling."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hack.lib.api import RequestError, WatchStream
from hack.lib.bench.subject import BenchError

_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class _Seen:
    """Moments by the monotonic clock, 0.0 means not yet; and the last seen state."""

    ready: float = 0.0
    gone: float = 0.0
    state: str = "never seen"


class PodWatch:
    """One watch on the pods. It notes when each pod became ready and when it was gone."""

    def __init__(self, watch: WatchStream) -> None:
        self._watch = watch
        self._known: dict[str, _Seen] = {}
        self._news = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._follow, name="watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._watch.close()
        self._thread.join()

    def ready(self, name: str) -> float:
        """Wait until the pod is ready. Returns the moment. BenchError after a minute."""
        return self._wait(name, "ready", lambda seen: seen.ready)

    def gone(self, name: str) -> float:
        return self._wait(name, "gone", lambda seen: seen.gone)

    def _wait(self, name: str, what: str, moment: Callable[[_Seen], float]) -> float:
        def seen() -> _Seen:
            return self._known.get(name, _Seen())

        with self._news:
            self._news.wait_for(lambda: self._ended or moment(seen()), _TIMEOUT_S)
            if not moment(seen()):
                why = "the watch on pods ended" if self._ended else f"{_TIMEOUT_S:.0f} s have passed"
                raise BenchError(f"{why} before pod {name} was {what}; it was {seen().state}")
            return moment(seen())

    def _follow(self) -> None:
        try:
            for line in self._watch.lines():
                at = time.perf_counter()
                self._note(json.loads(line), at)
        except (RequestError, ValueError):
            pass  # closed, by us or by the server; `_wait` raises the error
        finally:
            with self._news:
                self._ended = True
                self._news.notify_all()

    def _note(self, event: Mapping[str, Any], at: float) -> None:
        pod = event["object"]
        name, conditions = pod["metadata"]["name"], pod.get("status", {}).get("conditions", ())
        ready = any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)
        with self._news:
            before = self._known.get(name, _Seen())
            self._known[name] = _Seen(
                ready=before.ready or (at if ready else 0.0),
                gone=at if event["type"] == "DELETED" else 0.0,
                state=" ".join([pod["status"]["phase"], *(one["message"] for one in conditions if "message" in one)]),
            )
            self._news.notify_all()
