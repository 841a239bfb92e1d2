"""Odd content from the API server, a proxy before it or a user's claim: each verb gives an ApiError or a sound answer."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from gpuslice.core import claims, params
from gpuslice.core.json import parse
from gpuslice.core.model import ClaimRef, ClaimUid, DeviceRef, PoolName
from gpuslice.core.pools import reconcile, shape
from gpuslice.core.pools.pool import PoolSlices
from gpuslice.core.pools.reconcile import Owner
from gpuslice.errors import ApiError, ClaimError
from gpuslice.kube import Kube

from tests.kit import mutation

REF = ClaimRef("default", "one", ClaimUid("uid-1"))
META = {"name": "one", "namespace": "ns", "uid": "uid-1", "resourceVersion": "7"}
RESULT = {
    "driver": "gpuslice.dev",
    "request": "gpu",
    "pool": "n/p",
    "device": "gpu",
    "adminAccess": False,
    "shareID": "s",
    "consumedCapacity": {"memory": "1Gi"},
}
CONFIG = {
    "source": "FromClaim",
    "requests": ["gpu"],
    "opaque": {
        "driver": "gpuslice.dev",
        "parameters": {
            "apiVersion": "gpuslice.dev/v1alpha1",
            "kind": "SliceConfig",
            "enforcement": "preferred",
            "timeSlicing": {"interval": "short"},
        },
    },
}
ASKED = {"capacity": {"requests": {"memory": "5120"}}}
SPEC = {
    "devices": {
        "requests": [{"name": "gpu", "exactly": ASKED}, {"name": "a", "firstAvailable": [ASKED | {"name": "b"}]}]
    }
}
CLAIM = {
    "metadata": META,
    "spec": SPEC,
    "status": {"allocation": {"devices": {"results": [RESULT], "config": [CONFIG]}}},
}
OWNER = Owner("gpuslice.dev", "n", "uid-n")
TAINT = {"key": "gpuslice.dev/gpu", "value": "lost", "effect": "NoSchedule"}
SLICE = {
    "metadata": META | {"name": f"{reconcile.name_base(0, 1, OWNER)}abcde", "ownerReferences": [OWNER.reference()]},
    "spec": {
        "driver": "gpuslice.dev",
        "nodeName": "n",
        "pool": {"name": "n/p", "generation": 1},
        "devices": [{"name": "gpu", "taints": [TAINT | {"timeAdded": "2026-01-01T00:00:00Z"}]}],
    },
}
VERBS: dict[str, Callable[[Kube], object]] = {
    "version": lambda kube: kube.version(),
    "node": lambda kube: kube.node_uid("one"),
    "claim": lambda kube: kube.claim("ns", "one"),
    "claims": lambda kube: list(shape.pools_of(kube.claims(), "gpuslice.dev")),
    "slices": lambda kube: compared(kube.resource_slices("gpuslice.dev", "n")[0]),
    "watch": lambda kube: watched(kube),
    "bookmark": lambda kube: watched(kube),
    "create": lambda kube: kube.create_resource_slice(SLICE)["spec"]["pool"]["name"],
    "dry run": lambda kube: kube.create_resource_slice(SLICE, dry_run=True)["spec"]["pool"]["name"],
    "update": lambda kube: kube.update_resource_slice(SLICE)["metadata"]["uid"],
    "delete": lambda kube: kube.delete_resource_slice("s", uid="u", resource_version="1"),
}
GOOD: dict[str, Any] = {
    "version": {"gitVersion": "v1.37.0"},
    "node": {"metadata": META},
    "claim": CLAIM,
    "claims": {"kind": "ResourceClaimList", "metadata": {"resourceVersion": "7"}, "items": [CLAIM]},
    "slices": {"kind": "ResourceSliceList", "metadata": {"resourceVersion": "7"}, "items": [SLICE]},
    "watch": {"type": "ADDED", "object": SLICE},
    "bookmark": {"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "7"}}},
    "create": SLICE,
    "dry run": SLICE,
    "update": SLICE,
    "delete": {"kind": "Status", "status": "Success"},
}


def compared(found: list[Any]) -> object:
    """The publisher's work with a list."""
    wanted = [PoolSlices(PoolName("n/p"), ({"devices": [{"name": "gpu", "taints": [TAINT]}]},))]
    return shape.published(found), reconcile.changes(wanted, found, OWNER)


def watched(kube: Kube) -> object:
    events = list(kube.watch_resource_slices("gpuslice.dev", "n", "1", 1))
    assert all(int(event["object"]["metadata"]["resourceVersion"]) for event in events)
    return shape.published(event["object"] for event in events if event["type"] != "BOOKMARK")


def nested(levels: int, inner: str = "1") -> str:
    return '{"a":' * levels + inner + "}" * levels


class Server:
    """Answers every request with `answer`."""

    def __init__(self, folder: Path) -> None:
        self.answer = b""
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # head and body in one packet

            def handle_one_request(self) -> None:
                self.raw_requestline = self.rfile.readline(65537)
                if not self.raw_requestline or not self.parse_request():
                    self.close_connection = True
                    return
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.send_response(200)
                self.send_header("Content-Length", str(len(server.answer)))
                self.end_headers()
                self.wfile.write(server.answer)
                self.wfile.flush()

            def log_message(self, format: str, *args: object) -> None:
                """Quiet."""

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        named = [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{self._http.server_port}"}}]
        context = [{"name": "c", "context": {"cluster": "c", "user": "u"}}]
        body = {"current-context": "c", "clusters": named, "contexts": context, "users": [{"name": "u", "user": {}}]}
        (folder / "config").write_text(json.dumps(body))
        self.kube = Kube(folder / "config")

    def close(self) -> None:
        self.kube.close()
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    yield server
    server.close()


def unfit(server: Server, verb: str, text: str) -> str:
    """The exception that is not an ApiError; "" if there is none."""
    server.answer = text.encode(errors="surrogatepass") + b"\n"
    try:
        VERBS[verb](server.kube)
    except ApiError:
        return ""
    except Exception as e:  # noqa: BLE001 - what would end a thread
        return f"{type(e).__name__}: {e}"[:200]
    return ""


@pytest.mark.parametrize("verb", list(VERBS))
def test_an_odd_answer_is_an_api_error_or_passed_over(server: Server, verb: str) -> None:
    server.answer = json.dumps(GOOD[verb]).encode() + b"\n"
    VERBS[verb](server.kube)
    texts = {text[:40]: text for text in ("", "null", "[]", "3", '"x"', "<html>", "\x00", nested(50_000), "[" * 9_000)}
    for path, what, body in mutation.edits(GOOD[verb]):
        texts[f"{path} = {what}"] = json.dumps(body)

    odd = {name: error for name, text in texts.items() if (error := unfit(server, verb, text))}

    assert odd == {}


def test_one_claim_that_is_nested_deep_hides_no_other(server: Server) -> None:
    deep = json.dumps({"metadata": META, "status": "HERE"}).replace('"HERE"', nested(5_000))
    server.answer = (
        f'{{"kind": "ResourceClaimList", "metadata": {{}}, "items": [{deep}, {json.dumps(CLAIM)}]}}'.encode()
    )

    assert list(shape.pools_of(server.kube.claims(), "gpuslice.dev")) == ["n/p"]


@pytest.mark.parametrize("inner", ['"a \\" ]}"', "[1, 2]", "{}"])
def test_what_is_cut_off_below_a_hundred_levels_leaves_the_rest_as_it_is(inner: str) -> None:
    body = parse(f'{{"before": "[[", "deep": {nested(5_000, inner)}, "after": [{{"x": "}}"}}]}}'.encode())

    assert (body["before"], body["after"]) == ("[[", [{"x": "}"}])
    levels, below = 0, body["deep"]
    while below is not None:
        levels, below = levels + 1, below["a"]
    assert levels == 98


def test_no_value_of_a_claim_is_more_than_an_error_of_that_claim() -> None:
    deep: Any = {}
    for _ in range(5_000):
        deep = {"a": deep, "b": [deep]}

    for path in mutation.values(CLAIM):
        for wrong in (*mutation.WRONG, deep, "1e999999999", "1E9999999999999999999"):
            body = mutation.edited(CLAIM, path, wrong)
            claims.is_held(body, REF.uid, [DeviceRef(PoolName("n/p"), "gpu")], "gpuslice.dev")
            list(shape.pools_of([body], "gpuslice.dev"))
            try:
                claims.parse(body, REF, "gpuslice.dev")
            except ClaimError as e:
                assert len(str(e)) < 1000, path  # it becomes an event of the pod


def test_a_parameter_of_a_thousand_levels_is_named_by_its_type() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]

    with pytest.raises(ClaimError, match=r"here\.enforcement is of type list and must be one of"):
        params.parse({**CONFIG["opaque"]["parameters"], "enforcement": deep}, "here")  # type: ignore[index]
