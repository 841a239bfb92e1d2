"""Refusals of the kernel: no descriptors, a disk that fails, a folder that became read-only.

The driver answers with one sentence, and leaves nothing behind after the fault. The tests refuse each kind of call once, also
calls of later code.
"""

from __future__ import annotations

import asyncio
import errno
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
from gpuslice.app import App
from gpuslice.commands import trouble
from gpuslice.config import Config
from gpuslice.errors import DriverError
from gpuslice.mps.supervisor import Supervisor
from gpuslice.plugin.server import PluginServer
from gpuslice.standin.cluster import DRIVER, StandInCluster
from gpuslice.system import files
from gpuslice.telemetry import Telemetry

from tests.kit import kernel
from tests.kit.kernel import Kind
from tests.kit.mps_node import MpsNode, a_node
from tests.kit.publishing import an_api_server
from tests.kit.rig import Rig, a_claim
from tests.test_mutations import Api, life

Steps = Callable[[Path], Iterator[Callable[[], object]]]


def kinds(root: Path, steps: Steps) -> list[Kind]:
    """Each kind of call in the steps. Calls of the simulated hardware are no calls of the driver."""
    with kernel.noting(root) as noted:
        for step in steps(root):
            step()
    return [kind for kind in noted if not kind[1].startswith(("/node", "/api"))]


def harm(root: Path, steps: Steps, kind: Kind) -> list[str]:
    """The damage beyond a refusal with a sentence, if this kind of call fails."""
    wrong = []
    with kernel.refusing(root, kind):
        try:
            for step in steps(root):
                try:
                    step()
                except DriverError as e:
                    wrong += [] if str(e).count("; ") and "Errno" not in str(e) else [f"{kind}: {e}"]
        except DriverError:
            pass
        except Exception as e:  # noqa: BLE001 - each is a harm, whatever it is
            wrong.append(f"{kind}: {type(e).__name__}: {e}")
    return wrong


# ---------------------------------------------------------------- a claim


def life_of_claims(root: Path) -> Iterator[Callable[[], object]]:
    rig = Rig(root)
    claims = a_claim("partition", rig.device("mig-1g-19-0")), a_claim("card", rig.device("gpu", 1))
    for claim in claims:
        yield partial(rig.prepare, claim)
        yield rig.preparer.make_spares
    yield lambda: asyncio.run(life(rig, Api(claims)))
    for claim in claims:
        yield partial(rig.prepare, claim)
        yield partial(rig.unprepare, claim)
    rig.nvml.close()


def test_whatever_the_kernel_refuses_a_claim_says_so_and_nothing_is_left_when_it_is_over(tmp_path: Path) -> None:
    tried = kinds(tmp_path / "clean", life_of_claims)
    wrong = []

    for number, kind in enumerate(tried):
        root = tmp_path / str(number)
        wrong += harm(root, life_of_claims, kind)
        for step in life_of_claims(root):
            step()
        rig = Rig(root)
        left = [*rig.records(), *rig.cdi_files(), *rig.partitions(0)]
        wrong += [f"{kind} leaves {left}"] if left else []
        rig.nvml.close()
        shutil.rmtree(root)

    assert wrong == []
    assert len(tried) > 20


# ---------------------------------------------------------------- a supervisor


def life_of_daemons(node: MpsNode, root: Path) -> Iterator[Callable[[], object]]:
    supervisor = Supervisor(root / "mps", node.command)
    opened = list[None]()
    yield lambda: opened.append(supervisor.open())  # type: ignore[func-returns-value]
    if not opened:
        return
    for memory_mib in (1024, 2048):
        yield partial(supervisor.ensure, node.daemon(memory_mib=memory_mib))
    yield partial(supervisor.stop, "gpu-0")
    yield partial(supervisor.ensure, node.daemon(1))  # `close` ends this daemon; its folder stays
    yield supervisor.close


def test_whatever_the_kernel_refuses_a_supervisor_says_so_and_serves_when_it_is_over(
    short: Path, unmeasured: None
) -> None:
    with a_node(short) as node:
        steps = partial(life_of_daemons, node)
        tried, wrong = kinds(short, steps), list[str]()
        for kind in tried:
            # There is nothing to adopt, because the threads of a start that fails would go on in this process.
            shutil.rmtree(short / "mps", ignore_errors=True)
            wrong += harm(short, steps, kind)
            left = node.daemons_of("gpu-0") + node.daemons_of("gpu-1")
            wrong += [f"{kind} leaves processes {left}"] if left else []

    assert wrong == []
    assert len(tried) > 15


# ---------------------------------------------------------------- a start


def start(config: Config, root: Path) -> Iterator[Callable[[], object]]:
    yield lambda: App(config)
    server = PluginServer(
        driver=config.driver_name,
        registry=config.kubelet_registrar_directory_path,
        plugin_folder=config.plugin_folder,
        pod_uid="",
        pod_namespace="",
        registration_socket="",
        claims=cast("Any", None),
        telemetry=Telemetry(),
        registered=lambda: None,
    )

    async def serve() -> None:
        try:
            await server.open()
        finally:
            await server.close(0)

    yield lambda: asyncio.run(serve())


def test_whatever_the_kernel_refuses_a_start_says_so(short: Path) -> None:
    for name in ("registry", "cdi"):
        files.ensure_folder(short / name)
    with an_api_server(short / "api") as server:
        config = Config(
            node_name="node-1",
            kubeconfig=server.kubeconfig,
            kubelet_registrar_directory_path=short / "registry",
            kubelet_plugins_directory_path=short / "plugins",
            cdi_root=short / "cdi",
            mps_root=short / "mps",
            simulate="l4",
            simulate_folder=short / "node",
        )
        steps = partial(start, config)
        tried, wrong = kinds(short, steps), list[str]()
        for kind in tried:
            shutil.rmtree(short / "plugins", ignore_errors=True)
            wrong += harm(short, steps, kind)

    assert wrong == []
    assert len(tried) > 12


@pytest.mark.parametrize("name", ["gpus.json", "running.json"])
async def test_a_disk_that_takes_no_more_of_what_is_only_for_comfort_refuses_no_start(
    short: Path, unmeasured: None, name: str
) -> None:
    async with StandInCluster(short) as cluster:
        cluster.module = "tests.kit.kernel"
        refused = f"{short}|os.rename|/plugins/{DRIVER}/.{name}.*.tmp|ENOSPC"

        driver = await cluster.start(environment={"KERNEL": refused})

        assert f"{name}: No space left on device" in driver.log.read_text()


# ---------------------------------------------------------------- the door of the commands


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EROFS, errno.EIO, errno.ENOSPC, errno.ENOMEM])
def test_what_no_part_of_the_driver_foresaw_is_the_nodes_fault_all_the_same(number: int) -> None:
    sentence, code = trouble.sentence(OSError(number, "no", "/some/file"))

    assert code == 3
    assert sentence.startswith("cannot use /some/file: no; ")
    assert "mistake" not in sentence


@pytest.mark.parametrize("descriptors", [8, 12, 63])
def test_a_driver_without_descriptors_ends_with_a_sentence(short: Path, unmeasured: None, descriptors: int) -> None:
    with an_api_server(short / "api") as server:
        cluster = StandInCluster(short)
        cluster.api = server
        arguments = cluster.arguments("--http-endpoint", "127.0.0.1:0")
        ended = subprocess.run(
            ["prlimit", f"--nofile={descriptors}", sys.executable, "-m", "gpuslice", *arguments],
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )

    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith(f"gpuslice: this process may have {descriptors} files open")
