"""`gpuslice preflight`, against the stand-in API server: what it refuses, in which words, and what it lets through."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from gpuslice import cli
from gpuslice.config import DRIVER_NAME
from gpuslice.core import gpucodec
from gpuslice.kube import RIGHTS
from gpuslice.plugin import sockets
from gpuslice.standin.apiserver import StandInApiServer

from tests.kit.builders import a_gpu

POD = "0f0e0d0c-0b0a-4908-8706-050403020100"
OTHER = "1f0e0d0c-0b0a-4908-8706-050403020100"
POLICY = "apiVersion: gpuslice.dev/v1alpha1\nkind: Policy\n"
ANYWAY = "; the driver starts all the same, because claims are prepared here and no other instance could unprepare them"


class Node:
    """The folders of a node as the step before the driver sees them, with a kubelet that listens."""

    def __init__(self, folder: Path, api: StandInApiServer, stack: contextlib.ExitStack) -> None:
        self.folder, self.api, self._stack = folder, api, stack
        self.plugin = folder / "kubelet/plugins" / DRIVER_NAME
        self.registry = folder / "kubelet/plugins_registry"
        self.kubelet = folder / "kubelet/pod-resources/kubelet.sock"
        self.cdi, self.root, self.policy = folder / "cdi", folder / "root", folder / "policy.yaml"
        for path in (self.plugin, self.registry, self.cdi, self.root, self.kubelet.parent):
            path.mkdir(parents=True)
        self.policy.write_text(POLICY)
        self.listen(self.kubelet)

    def listen(self, path: Path) -> None:
        server = self._stack.enter_context(socket.socket(socket.AF_UNIX))
        server.bind(str(path))
        server.listen()

    def may(self, *, but: tuple[str, str] | None = None) -> None:
        """The API server says which rights the driver has: all, or all but one."""
        for right in RIGHTS:
            body = {"kind": "SelfSubjectAccessReview", "status": {"allowed": right != but}}
            self.api.answer(201, json.dumps(body).encode(), path="selfsubjectaccessreviews")

    def serve(self, pod: str, namespace: str) -> None:
        """Another instance of the driver serves this node."""
        endpoint = self.plugin / (f"dra-{pod}.sock" if pod else "dra.sock")
        self._stack.callback(os.close, sockets.exclusive(endpoint, namespace))
        self.listen(endpoint)

    def prepare(self) -> None:
        """A claim is prepared here."""
        record = self.plugin / "claims/an-earlier-boot/uid-1.json"
        record.parent.mkdir(parents=True)
        record.write_text("{}")

    def flags(self, *more: str) -> list[str]:
        return [
            *("preflight", "--node-name", "node-1", "--pod-uid", POD, "--pod-namespace", "gpus"),
            *("--kubeconfig", str(self.api.kubeconfig), "--policy", str(self.policy)),
            *("--kubelet-plugins-directory-path", str(self.plugin.parent)),
            *("--kubelet-registrar-directory-path", str(self.registry)),
            *("--cdi-root", str(self.cdi), "--driver-root-ctr-path", str(self.root), *more),
        ]


@pytest.fixture
def node(short: Path) -> Iterator[Node]:
    with StandInApiServer(short) as api, contextlib.ExitStack() as stack:
        yield Node(short / "node", api, stack)


@pytest.fixture
def run(node: Node, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    yield Run(node, capsys)


class Run:
    def __init__(self, node: Node, capsys: pytest.CaptureFixture[str]) -> None:
        self._node, self._capsys = node, capsys

    def __call__(self, *more: str) -> tuple[int, list[str]]:
        """The exit code, and the lines on standard error."""
        with pytest.raises(SystemExit) as ended:
            cli.main(self._node.flags(*more))
        out, err = self._capsys.readouterr()
        assert isinstance(ended.value.code, int)
        assert bool(out) is (ended.value.code == 0)
        return ended.value.code, err.splitlines()


def test_a_node_without_a_gpu_or_an_nvidia_driver_is_ready_because_the_driver_waits_for_them(
    node: Node, run: Run
) -> None:
    node.may()
    before = sorted(node.folder.rglob("*"))

    assert run() == (0, [])
    assert sorted(node.folder.rglob("*")) == before


# ---------------------------------------------------------------- with these the driver cannot run


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "version: v1\nsharing: {}\n",
            "the document is a configuration of NVIDIA's device plugin, but must be a Policy",
        ),
        (f"{POLICY}defaults: {{}}\n", "the document has the unknown key 'defaults'; known keys: apiVersion, kind"),
        (
            f"{POLICY}default: {{modes: [mig], timeslice: {{shares: '4'}}}}\n",
            "default.timeslice.shares is the text '4'",
        ),
        ("gpus: [", "is not YAML, line 1"),
    ],
)
def test_a_wrong_policy_is_one_sentence(node: Node, run: Run, text: str, sentence: str) -> None:
    node.may()
    node.policy.write_text(text)

    code, (line,) = run()

    assert code == 2
    assert line.startswith(f"gpuslice: policy file {node.policy}")
    assert sentence in line


@pytest.mark.parametrize(
    ("flag", "folder"), [("--cdi-root", "cdi"), ("--kubelet-registrar-directory-path", "kubelet/plugins_registry")]
)
def test_a_folder_that_cannot_be_written_is_named_with_its_flag(
    node: Node, run: Run, flag: str, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.may()
    access = os.access
    # A read-only mount, which root cannot write either (access(2): EROFS).
    monkeypatch.setattr(os, "access", lambda path, mode: path != node.folder / folder and access(path, mode))

    assert run() == (
        3,
        [
            f"gpuslice: folder {node.folder / folder} is not writable for uid {os.getuid()}; mount it writable, or name "
            f"another one with {flag}"
        ],
    )


@pytest.mark.parametrize(
    ("pod", "namespace", "who"),
    [(OTHER, "there", f"pod {OTHER} in namespace there"), ("", "", "a process outside a pod")],
)
def test_a_second_driver_of_the_same_name_is_refused(node: Node, run: Run, pod: str, namespace: str, who: str) -> None:
    node.may()
    node.prepare()
    node.serve(pod, namespace)

    assert run() == (
        2,
        [
            f"gpuslice: another driver of the same name serves this node with the folder {node.plugin}: {who}; a node can "
            "have one, so remove one of the two installations"
        ],
    )


@pytest.mark.parametrize("namespace", ["gpus", ""], ids=["same-namespace", "of-0.1.0"])
def test_the_instance_before_a_rolling_update_is_no_second_driver(node: Node, run: Run, namespace: str) -> None:
    node.may()
    node.serve(OTHER, namespace)

    assert run() == (0, [])


def test_the_socket_of_a_killed_instance_is_no_second_driver(node: Node, run: Run) -> None:
    node.may()
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(node.plugin / f"dra-{OTHER}.sock"))

    assert run() == (0, [])


def test_a_port_that_another_program_has_is_named(node: Node, run: Run) -> None:
    """With `hostNetwork`, the port is one of the node."""
    node.may()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        endpoint = f"127.0.0.1:{taken.getsockname()[1]}"

        code, (line,) = run("--http-endpoint", endpoint)

    assert code == 2
    assert line.startswith(f"gpuslice: cannot listen on {endpoint} for metrics and probes")


def test_an_unusable_kubeconfig_is_one_sentence(node: Node, run: Run) -> None:
    code, (line,) = run("--kubeconfig", "/does/not/exist")

    assert (code, line) == (
        2,
        "gpuslice: kubeconfig /does/not/exist does not exist; check the path that --kubeconfig names",
    )


# ---------------------------------------------------------------- with these the driver can still unprepare claims


def wrong_kubelet(node: Node) -> str:
    node.kubelet.unlink()
    return (
        f"{node.folder}/kubelet is not the folder of a running kubelet, because nothing listens on {node.kubelet}; set "
        "kubeletRootDir of the chart (--kubelet-plugins-directory-path, --kubelet-registrar-directory-path) to the "
        "kubelet's --root-dir"
    )


def unreadable_root(node: Node) -> str:
    node.root.rmdir()
    node.root.write_text("a file")  # root may read every folder, so a file stands for an unreadable one
    return (
        f"the root of the NVIDIA driver, / on the node, cannot be read at {node.root}: Not a directory; look at its file "
        "system, or name another root with --nvidia-driver-root"
    )


def missing_right(node: Node) -> str:
    node.api.release()
    node.may(but=("create", "resourceslices"))
    return (
        'the driver has no right to create resourceslices; add {apiGroups: ["resource.k8s.io"], resources: '
        '["resourceslices"], verbs: ["create"]} to the ClusterRole of this service account'
    )


Trouble = Callable[[Node], str]
TROUBLES = [(wrong_kubelet, 3), (unreadable_root, 3), (missing_right, 4)]


@pytest.mark.parametrize(("trouble", "code"), TROUBLES)
def test_a_problem_is_one_sentence_on_a_node_without_claims(node: Node, run: Run, trouble: Trouble, code: int) -> None:
    node.may()
    sentence = trouble(node)

    assert run() == (code, [f"gpuslice: {sentence}"])


@pytest.mark.parametrize(("trouble", "code"), TROUBLES)
def test_a_problem_stops_an_update_while_the_old_instance_serves_the_claims(
    node: Node, run: Run, trouble: Trouble, code: int
) -> None:
    node.may()
    node.prepare()
    node.serve(OTHER, "gpus")
    sentence = trouble(node)

    assert run() == (code, [f"gpuslice: {sentence}"])


@pytest.mark.parametrize(("trouble", "code"), TROUBLES)
def test_a_problem_stops_no_driver_that_alone_could_unprepare_the_claims_of_its_node(
    node: Node, run: Run, trouble: Trouble, code: int
) -> None:
    node.may()
    node.prepare()
    sentence = trouble(node)

    assert run() == (0, [f"gpuslice: warning: {sentence}{ANYWAY}"])


def test_a_wrong_policy_fails_also_with_claims_because_the_driver_would_not_start(node: Node, run: Run) -> None:
    node.may()
    node.prepare()
    node.policy.write_text("gpus: [")

    code, (line,) = run()

    assert (code, line.startswith("gpuslice: policy file")) == (2, True)


def test_several_problems_are_a_line_each_and_the_first_decides_the_exit_code(node: Node, run: Run) -> None:
    sentences = [wrong_kubelet(node), missing_right(node)]

    assert run() == (3, [f"gpuslice: {sentence}" for sentence in sentences])


# ---------------------------------------------------------------- what is only noted


def test_an_api_server_that_is_away_is_noted_because_the_driver_waits_for_it(node: Node, run: Run) -> None:
    node.api.away()

    code, (line,) = run()

    assert code == 0
    assert line.startswith("gpuslice: warning: the rights of the driver are unknown: no answer from the API server at ")


def test_the_end_of_its_pod_ends_the_step_at_once_while_it_waits_for_an_answer(node: Node, tmp_path: Path) -> None:
    """The step is process 1 of its container, for which the kernel drops SIGTERM without a handler."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        body = yaml.safe_load(node.api.kubeconfig.read_text(encoding="utf-8"))
        body["clusters"][0]["cluster"]["server"] = f"http://127.0.0.1:{silent.getsockname()[1]}"
        kubeconfig = tmp_path / "kubeconfig"
        kubeconfig.write_text(json.dumps(body), encoding="utf-8")
        command = [sys.executable, "-m", "gpuslice", *node.flags("--kubeconfig", str(kubeconfig))]
        with subprocess.Popen(command) as process:
            silent.settimeout(30)
            connection, _ = silent.accept()
            with connection:
                process.terminate()

                assert process.wait(10) == 1


def test_a_refused_token_fails_because_the_driver_would_end_with_it(node: Node, run: Run) -> None:
    node.api.fail(401, times=2, path="selfsubjectaccessreviews", text="Unauthorized")

    code, (line,) = run()

    assert code == 4
    assert "refused the driver's credentials" in line


def saved(node: Node, card: str) -> None:
    """A driver has started here before, with this card."""
    (node.plugin / "gpus.json").write_text(json.dumps(gpucodec.encode((a_gpu(card),))))


def test_what_of_the_policy_the_last_known_cards_cannot_follow_is_noted(node: Node, run: Run) -> None:
    node.may()
    saved(node, "l4")
    node.policy.write_text(f"{POLICY}gpus: [{{match: {{product: '*H100*'}}, modes: [mig]}}]\n")

    code, (line,) = run()

    assert code == 0
    assert "policy: gpus[0] matches no GPU of this node, so it has no effect here; the node has NVIDIA L4" in line
