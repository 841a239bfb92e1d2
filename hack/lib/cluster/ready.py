"""When a part serves: asked of the part itself, past any proxy."""

from __future__ import annotations

import json
import ssl
import urllib.request
from dataclasses import dataclass

from hack.lib.cluster.layout import LOOPBACK, NODE, Facts, Place

_ANSWER_S = 5.0


@dataclass(frozen=True, slots=True)
class Readiness:
    place: Place
    facts: Facts

    def of(self, part: str) -> bool:
        """Whether this part does its work; of a part that nobody can ask: yes."""
        known = {
            "containerd": self.place.socket.exists,
            "kube-apiserver": self.api,
            "etcd": self.api,  # which is not ready without it
            "kubelet": self.kubelet,
            "driver": self.driver,
        }
        return known.get(part, lambda: True)()

    def api(self) -> bool:
        return self.place.certificate.exists() and self._ask_api("/readyz") is not None

    def kubelet(self) -> bool:
        """Whether it serves; its node may be ready later, and a restarted one's node looks ready before."""
        url = f"https://{LOOPBACK}:{self.facts.ports.kubelet}/healthz"
        return _ask(urllib.request.Request(url), ssl._create_unverified_context()) is not None  # signed by itself

    def node(self) -> bool:
        node = json.loads(self._ask_api(f"/api/v1/nodes/{NODE}") or "{}")
        conditions = node.get("status", {}).get("conditions", ())
        return any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)

    def driver(self) -> bool:
        return _ask(urllib.request.Request(f"http://{LOOPBACK}:{self.facts.ports.driver}/readyz")) is not None

    def _ask_api(self, path: str) -> bytes | None:
        url = f"https://{LOOPBACK}:{self.facts.ports.api}{path}"
        who = {"Authorization": f"Bearer {self.facts.tokens['admin']}"}
        trust = ssl.create_default_context(cafile=str(self.place.certificate))
        return _ask(urllib.request.Request(url, headers=who), trust)


def _ask(request: urllib.request.Request, trust: ssl.SSLContext | None = None) -> bytes | None:
    """What a server of ours answers; None where it does not, or refuses."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=trust))
    try:
        with direct.open(request, timeout=_ANSWER_S) as response:
            return bytes(response.read())
    except OSError:
        return None
