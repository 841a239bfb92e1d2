"""Whether a part serves. The part itself is asked, without any proxy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hack.lib.api import NODES, ApiServer, RequestError, fetch
from hack.lib.cluster.layout import LOOPBACK, NODE, Facts, Place

_ANSWER_S = 5.0


@dataclass(frozen=True, slots=True)
class Readiness:
    place: Place
    facts: Facts

    def of(self, part: str) -> bool:
        """Whether this part does its work. True for a part that cannot be asked."""
        known = {
            "containerd": self.place.socket.exists,
            "kube-apiserver": self.api,
            "etcd": self.api,  # which is ready only with etcd
            "kubelet": self.kubelet,
            "driver": self.driver,
        }
        return known.get(part, lambda: True)()

    def api(self) -> bool:
        return self.place.certificate.exists() and _answers(lambda: self._with_api(lambda api: api.text("/readyz")))

    def kubelet(self) -> bool:
        """Whether the kubelet serves. Its node may become ready later. After a restart the node looks ready before the
        kubelet."""
        url = f"https://{LOOPBACK}:{self.facts.ports.kubelet}/healthz"
        return _answers(lambda: fetch(url, timeout_s=_ANSWER_S))

    def node(self) -> bool:
        try:
            node = self._with_api(lambda api: api.ask("GET", f"{NODES}/{NODE}"))
        except RequestError:
            return False
        conditions = node.get("status", {}).get("conditions", ())
        return any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)

    def driver(self) -> bool:
        url = f"http://{LOOPBACK}:{self.facts.ports.driver}/readyz"
        return _answers(lambda: fetch(url, timeout_s=_ANSWER_S))

    def _with_api(self, ask: Callable[[ApiServer], Any]) -> Any:
        url = f"https://{self.facts.address}:{self.facts.ports.api}"
        api = ApiServer(url, self.facts.tokens["admin"], self.place.certificate, timeout_s=_ANSWER_S)
        with contextlib.closing(api):
            return ask(api)


def _answers(ask: Callable[[], object]) -> bool:
    """Whether one of our servers answers without a refusal."""
    try:
        ask()
    except (RequestError, OSError):  # OSError: the API server is still writing the certificate
        return False
    return True
