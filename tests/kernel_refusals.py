"""Refusals of the kernel: no descriptors, a disk that fails, a folder that became read-only.

The driver answers with one sentence, and leaves nothing behind after the fault. The tests refuse each kind of call once, also
calls of later code.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

from gpuslice.app import App
from gpuslice.config import Config
from gpuslice.errors import DriverError
from gpuslice.mps.supervisor import Supervisor
from gpuslice.plugin.server import PluginServer
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
