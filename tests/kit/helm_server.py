"""An API server with as much as Helm asks of it: the version, discovery, and the objects that `lookup` finds.

It stores nothing. `helm install --dry-run=server` renders the chart against it, with its notes.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Body = Mapping[str, Any]

# Kinds by the path of their group: the resource, and whether it lives in a namespace.
_KINDS: Mapping[str, Mapping[str, tuple[str, bool]]] = {
    "/api/v1": {
        "ConfigMap": ("configmaps", True),
        "Namespace": ("namespaces", False),
        "Node": ("nodes", False),
        "ResourceQuota": ("resourcequotas", True),
        "Secret": ("secrets", True),
        "ServiceAccount": ("serviceaccounts", True),
    },
    "/apis/apps/v1": {"DaemonSet": ("daemonsets", True)},
    "/apis/batch/v1": {"Job": ("jobs", True)},
    "/apis/admissionregistration.k8s.io/v1": {
        "ValidatingAdmissionPolicy": ("validatingadmissionpolicies", False),
        "ValidatingAdmissionPolicyBinding": ("validatingadmissionpolicybindings", False),
    },
    "/apis/rbac.authorization.k8s.io/v1": {
        "ClusterRole": ("clusterroles", False),
        "ClusterRoleBinding": ("clusterrolebindings", False),
        "Role": ("roles", True),
        "RoleBinding": ("rolebindings", True),
    },
    "/apis/resource.k8s.io/v1": {"DeviceClass": ("deviceclasses", False)},
}


class HelmServer:
    """`objects` are found by their kind, name and namespace. Everything else does not exist."""

    def __init__(self, folder: Path, objects: Iterable[Body] = (), version: str = "v1.37.0") -> None:
        self._objects, self._version = list(objects), version
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self.answer))
        self.kubeconfig = folder / "helm-kubeconfig"
        self.kubeconfig.write_text(json.dumps(_kubeconfig(self._server.server_port)), encoding="utf-8")

    def __enter__(self) -> HelmServer:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def answer(self, path: str) -> tuple[int, Body]:
        if path == "/version":
            return 200, {"gitVersion": self._version, "major": "1", "minor": self._version.split(".")[1]}
        if path in ("/api", "/apis") or path in _KINDS:
            return 200, _discovery(path)
        for group, kinds in _KINDS.items():
            if path.startswith(f"{group}/"):
                return self._found(group, kinds, path.removeprefix(f"{group}/").split("/"))
        return _missing(path)

    def _found(self, group: str, kinds: Mapping[str, tuple[str, bool]], parts: list[str]) -> tuple[int, Body]:
        namespace = parts[1] if parts[0] == "namespaces" and len(parts) > 2 else ""
        resource, *name = parts[2:] if namespace else parts
        kind = next((kind for kind, (plural, _) in kinds.items() if plural == resource), "")
        here = [body for body in self._objects if body["kind"] == kind]
        if not name:
            return 200, {"kind": f"{kind}List", "apiVersion": group.split("/", 2)[2], "metadata": {}, "items": here}
        for body in here:
            if (body["metadata"]["name"], body["metadata"].get("namespace", "")) == (name[0], namespace):
                return 200, body
        return _missing("/".join(parts))


def _discovery(path: str) -> Body:
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        return {
            "kind": "APIGroupList",
            "apiVersion": "v1",
            "groups": [_group(group) for group in _KINDS if "." in group or "/apis" in group],
        }
    resources = [
        {"name": plural, "singularName": "", "namespaced": inside, "kind": kind, "verbs": ["get", "list", "create"]}
        for kind, (plural, inside) in _KINDS[path].items()
    ]
    version = path.removeprefix("/apis/").removeprefix("/api/")
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": resources}


def _group(path: str) -> Body:
    name, version = path.removeprefix("/apis/").split("/")
    entry = {"groupVersion": f"{name}/{version}", "version": version}
    return {"name": name, "versions": [entry], "preferredVersion": entry}


def _missing(path: str) -> tuple[int, Body]:
    status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}
    return 404, {**status, "message": f"{path} not found"}


def _handler(answer: Any) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # A header and a body are two packets, and the second one would wait 40 ms for the acknowledgement of the first.
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            status, body = answer(self.path.partition("?")[0])
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def _kubeconfig(port: int) -> Body:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
        "clusters": [{"name": "here", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
        "users": [{"name": "me", "user": {}}],
    }
