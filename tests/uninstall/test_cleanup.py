"""The clean-up of a node, on a folder tree that a real driver left."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from gpuslice import node as nodes
from gpuslice.config import Config
from gpuslice.errors import DriverError, StateError
from gpuslice.mps.process import boot_id
from gpuslice.standin.cluster import DRIVER, StandInCluster
from gpuslice.standin.scheduler import Request
from gpuslice.uninstall import cleanup

CARDS = "h100x2"
PART = Request(name="part", driver=DRIVER, where={"type": "mig", "profile": "1g.10gb"})
SHARE = Request(name="share", driver=DRIVER, where={"type": "mps", "index": 1}, capacity={"memory": "8Gi"})


@pytest.fixture
async def cluster(short: Path) -> AsyncIterator[StandInCluster]:
    async with StandInCluster(short, CARDS) as cluster:
        cluster.mps = short / "gpuslice" / "mps"
        cluster.mps.parent.mkdir()
        yield cluster


def config(cluster: StandInCluster) -> Config:
    return Config(
        kubelet_registrar_directory_path=cluster.registry,
        kubelet_plugins_directory_path=cluster.plugins,
        cdi_root=cluster.cdi,
        mps_root=cluster.mps,
    )


def everything(cluster: StandInCluster) -> list[str]:
    """What a driver may have left below the folders of the node."""
    roots = (cluster.registry, cluster.plugins, cluster.cdi, cluster.mps.parent)
    found = [path for root in roots for path in (root, *root.rglob("*")) if path.exists() or path.is_symlink()]
    return sorted(str(path.relative_to(cluster.folder)) for path in found)


async def used(cluster: StandInCluster) -> None:
    """A driver and a supervisor have served claims of every kind, and have ended."""
    supervisor, driver = await cluster.supervise(), await cluster.start()
    claims = [
        cluster.claim("part", PART),
        cluster.claim("share", SHARE),
    ]
    for ref in claims:
        await cluster.run(ref)
        await cluster.end(ref)
    await driver.terminate()
    await supervisor.terminate()


async def test_nothing_of_a_driver_that_has_ended_is_left(cluster: StandInCluster) -> None:
    await used(cluster)
    other = cluster.registry / "other.example-reg.sock"
    other.touch()
    (cluster.cdi / "other.example-claim_1.json").touch()
    said: list[str] = []

    cleanup.clean(config(cluster), said.append)

    assert everything(cluster) == [
        "cdi", "cdi/other.example-claim_1.json", "plugins", "registry", "registry/other.example-reg.sock"
    ]  # fmt: skip
    assert said == [
        f"removed {cluster.mps}",
        f"removed {cluster.mps.parent}",
        f"removed {cluster.plugins / 'gpuslice.dev'}",
        "nothing of gpuslice.dev is left on this node",
    ]


async def test_a_second_time_there_is_nothing_to_do(cluster: StandInCluster) -> None:
    await used(cluster)
    said: list[str] = []

    cleanup.clean(config(cluster), lambda _: None)
    cleanup.clean(config(cluster), said.append)

    assert said == ["nothing of gpuslice.dev is left on this node"]
    cleanup.check(config(cluster))


def bare_node(folder: Path) -> Config:
    """The settings for a node in this folder, on which nothing is made."""
    return Config(
        kubelet_registrar_directory_path=folder / "registry",
        kubelet_plugins_directory_path=folder / "plugins",
        cdi_root=folder / "cdi",
        mps_root=folder / "gpuslice/mps",
    )


def test_a_node_without_any_folder_is_clean(tmp_path: Path) -> None:
    said: list[str] = []

    cleanup.clean(bare_node(tmp_path), said.append)

    assert said == ["nothing of gpuslice.dev is left on this node"]
    assert list(tmp_path.iterdir()) == []


async def test_what_a_killed_driver_and_supervisor_leave_goes_too(cluster: StandInCluster) -> None:
    supervisor, driver = await cluster.supervise(), await cluster.start()
    ref = cluster.claim("share", SHARE)
    await cluster.run(ref)
    (record,) = (cluster.plugins / "gpuslice.dev" / "claims").rglob("*.json")
    await driver.kill()
    await supervisor.kill()
    (cluster.cdi / ".gpuslice.dev-claim_1.json.7-abc.tmp").touch()
    record.unlink()  # somebody gave the claim up by hand
    assert [text for text in environments() if str(cluster.mps) in text]
    said: list[str] = []

    cleanup.clean(config(cluster), said.append)

    assert everything(cluster) == ["cdi", "plugins", "registry"]
    assert not [text for text in environments() if str(cluster.mps) in text]


def environments() -> list[str]:
    """Of all MPS processes of this machine."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            found.append(path.read_bytes().decode(errors="replace"))
        except OSError:
            continue  # it has ended, or belongs to another user
    return [text for text in found if "CUDA_MPS_PIPE_DIRECTORY" in text]


async def test_a_prepared_claim_keeps_everything_and_is_named(cluster: StandInCluster) -> None:
    driver = await cluster.start()
    ref = cluster.claim("part", PART)
    await cluster.run(ref)
    await driver.kill()
    before = everything(cluster)

    with pytest.raises(StateError) as refused:
        cleanup.clean(config(cluster), lambda _: None)

    assert str(refused.value) == (
        f"prepared on this node: default/part ({ref.uid}), so the files of this node stay; install the driver again, then "
        "delete its pods"
    )
    assert everything(cluster) == before


async def test_an_unreadable_record_counts_as_a_prepared_claim(cluster: StandInCluster) -> None:
    driver = await cluster.start()
    await driver.terminate()
    folder = nodes.records_folder(config(cluster))
    assert folder is not None
    (folder / "u-1.json").write_text("torn")

    with pytest.raises(StateError, match="prepared on this node: claim u-1, so the files of this node stay"):
        cleanup.clean(config(cluster), lambda _: None)
    with pytest.raises(StateError, match="prepared on this node: claim u-1; delete its pods, while the driver runs"):
        cleanup.check(config(cluster), 0.1)


@pytest.mark.parametrize("settings", ["", "{}", "[", '{"node_name": 1}'])
def test_damaged_settings_of_the_last_driver_do_not_stop_the_clean_up(tmp_path: Path, settings: str) -> None:
    """The file is not synced, so a loss of power may leave it empty. No driver has started since then."""
    bare = bare_node(tmp_path)
    bare.plugin_folder.mkdir(parents=True)
    (bare.plugin_folder / "running.json").write_text(settings)
    record = bare.plugin_folder / "claims" / boot_id() / "u-1.json"
    record.parent.mkdir(parents=True)
    record.touch()

    with pytest.raises(StateError, match="prepared on this node: claim u-1"):
        cleanup.check(bare, 0.1)
    record.unlink()
    cleanup.clean(bare, lambda _: None)

    assert not bare.plugin_folder.exists()


@pytest.mark.parametrize("place", ["plugins/gpuslice.dev", "gpuslice/mps", "gpuslice/mps/gpu-1"])
def test_nothing_behind_a_link_is_removed(tmp_path: Path, place: str) -> None:
    bare, theirs = bare_node(tmp_path), tmp_path / "theirs" / "gpu-1" / "file"
    theirs.parent.mkdir(parents=True)
    theirs.touch()
    link = tmp_path / place
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "theirs")

    with pytest.raises(DriverError, match=str(link)):
        cleanup.clean(bare, lambda _: None)

    assert theirs.exists()
    assert link.is_symlink()


async def test_records_of_a_former_boot_prepare_nothing(cluster: StandInCluster) -> None:
    driver = await cluster.start()
    ref = cluster.claim("part", PART)
    await cluster.run(ref)
    await driver.kill()
    (cluster.node_folder / "boot_id").write_text("another boot\n")

    cleanup.check(config(cluster))
    cleanup.clean(config(cluster), lambda _: None)

    assert everything(cluster) == ["cdi", "plugins", "registry"]


async def test_the_check_returns_as_soon_as_the_driver_has_unprepared(cluster: StandInCluster) -> None:
    await cluster.start()
    ref = cluster.claim("part", PART)
    await cluster.run(ref)
    with pytest.raises(StateError, match=rf"prepared on this node: default/part \({ref.uid}\)"):
        cleanup.check(config(cluster), 0.1)
    waiting = asyncio.create_task(asyncio.to_thread(cleanup.check, config(cluster), 30))

    await cluster.end(ref)

    await asyncio.wait_for(waiting, 20)


class Cleaning:
    """A clean-up that goes on beside a test."""

    def __init__(self, config: Config) -> None:
        self._said: list[str] = []
        self._spoke = threading.Event()
        self._task = asyncio.create_task(asyncio.to_thread(cleanup.clean, config, self._say))

    def _say(self, sentence: str) -> None:
        self._said.append(sentence)
        self._spoke.set()

    async def says_something(self) -> None:
        assert await asyncio.to_thread(self._spoke.wait, 20)

    async def ends(self) -> list[str]:
        await asyncio.wait_for(self._task, 20)
        return self._said


async def test_the_clean_up_waits_for_a_driver_that_ends(cluster: StandInCluster) -> None:
    driver = await cluster.start()
    cleaning = Cleaning(config(cluster))
    await cleaning.says_something()
    assert (cluster.plugins / "gpuslice.dev" / "gpus.json").exists()

    await driver.terminate()

    said = await cleaning.ends()
    assert said[0] == f"waiting for the end of the process that holds {cluster.plugins}/gpuslice.dev/dra.sock.lock"
    assert said[-1] == "nothing of gpuslice.dev is left on this node"


async def test_a_driver_that_comes_while_the_clean_up_waits_keeps_its_files(cluster: StandInCluster) -> None:
    """The driver was installed again while the clean-up waited for the end of the old one."""
    old = await cluster.start("--pod-uid", "11111111-1111-1111-1111-111111111111")
    cleaning = Cleaning(config(cluster))
    await cleaning.says_something()
    await cluster.start("--pod-uid", "22222222-2222-2222-2222-222222222222")
    ref = cluster.claim("part", PART)

    await old.terminate()

    with pytest.raises(StateError) as refused:
        await cleaning.ends()
    assert str(refused.value) == (
        f"another driver has started on this node meanwhile, in {cluster.plugins}/gpuslice.dev, so its files stay; remove "
        "that installation first"
    )
    await cluster.run(ref)
    await cluster.end(ref)


async def test_the_clean_up_waits_for_a_supervisor_that_ends(cluster: StandInCluster) -> None:
    supervisor = await cluster.supervise()
    cleaning = Cleaning(config(cluster))
    await cleaning.says_something()

    await supervisor.terminate()

    said = await cleaning.ends()
    assert said[0] == f"waiting for the end of the process that holds {cluster.mps}/supervisor.lock"
    assert not cluster.mps.exists()


async def test_a_driver_that_is_installed_again_adopts_what_is_left(cluster: StandInCluster) -> None:
    """The repair after `helm uninstall --no-hooks`: the kubelet tries its unprepare again and again."""
    supervisor = await cluster.supervise()
    first = await cluster.start("--pod-uid", "11111111-1111-1111-1111-111111111111")
    refs = [
        cluster.claim("part", PART),
        cluster.claim("share", SHARE),
    ]
    for ref in refs:
        await cluster.run(ref)
    await first.kill()
    await supervisor.kill()

    await cluster.supervise()
    second = await cluster.start("--pod-uid", "22222222-2222-2222-2222-222222222222")
    for ref in refs:
        await cluster.end(ref)
    await second.terminate()
    for process in cluster.supervisors:
        await process.terminate()

    cleanup.clean(config(cluster), lambda _: None)
    assert everything(cluster) == ["cdi", "plugins", "registry"]


# ---------------------------------------------------------------- mounts


@pytest.fixture
def apart() -> Iterator[list[str]]:
    """A command that runs in a mount namespace of its own, so that nothing of it stays on this machine."""
    command = ["unshare", "--mount", "--propagation", "private"]
    if os.geteuid() or not shutil.which("unshare") or subprocess.run([*command, "true"], check=False).returncode:
        pytest.skip("mounts need root, CAP_SYS_ADMIN and unshare(1)")
    yield command


def test_mounts_below_the_folder_of_the_supervisor_go_the_innermost_first(tmp_path: Path, apart: list[str]) -> None:
    root = tmp_path / "gpuslice" / "mps"
    (root / "gpu-1" / "shm").mkdir(parents=True)
    script = (
        f"mount -t tmpfs a {root}/gpu-1/shm && mkdir {root}/gpu-1/shm/b && mount -t tmpfs b {root}/gpu-1/shm/b && "
        f"mkdir {root}/Other && mount -t tmpfs c {root}/Other && touch {root}/Other/file && "
        f"{sys.executable} -m gpuslice cleanup --mps-root {root} --cdi-root {tmp_path}/cdi "
        f"--kubelet-plugins-directory-path {tmp_path}/p --kubelet-registrar-directory-path {tmp_path}/r && "
        f"! grep {tmp_path} /proc/self/mountinfo"
    )

    done = subprocess.run([*apart, "sh", "-c", script], capture_output=True, text=True, check=False, timeout=50)

    assert done.returncode == 0, done.stderr + done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_clean_up_pod_sees_the_node_elsewhere_and_leaves_no_mount_and_no_daemon(
    tmp_path: Path, apart: list[str]
) -> None:
    """As in its pod: /run of the node is at another path, and mounts are shared with the node."""
    node, here, key = tmp_path / "run", tmp_path / "node-run", "gpu-1"
    pipe = node / "gpuslice" / "mps" / key / "pipe"
    (pipe.parent / "shm").mkdir(parents=True)
    here.mkdir()
    cleanup = (
        f"mount --rbind {node} {here} && mount --make-rshared {here} && umount -l {node} && {sys.executable} -m gpuslice "
        f"cleanup --mps-root {node}/gpuslice/mps --cdi-root {tmp_path}/cdi "
        f"--kubelet-plugins-directory-path {tmp_path}/p --kubelet-registrar-directory-path {tmp_path}/r"
    )
    script = (
        f"mount --bind {node} {node} && mount --make-shared {node} && mount -t tmpfs a {pipe.parent}/shm && "
        f"unshare --mount --propagation unchanged sh -c 'mount --make-private / && {cleanup}' && "
        f"grep -c {tmp_path} /proc/self/mountinfo && ls -A {node}"
    )
    # The kernel keeps the name of the program that a process has started, so a link to sleep(1) stands for a daemon.
    (tmp_path / "nvidia-cuda-mps-control").symlink_to(shutil.which("sleep") or "")
    environment = {**os.environ, "CUDA_MPS_PIPE_DIRECTORY": str(pipe)}
    with subprocess.Popen([tmp_path / "nvidia-cuda-mps-control", "50"], env=environment) as left:
        done = subprocess.run(
            [*apart, "sh", "-c", script],
            env={**os.environ, "MPS_ROOT_CTR_PATH": f"{here}/gpuslice/mps"},
            capture_output=True,
            text=True,
            check=False,
            timeout=50,
        )
        ended = left.poll()
        left.kill()

    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stdout.splitlines()[-1] == "1"  # the mount of the test itself, and nothing in it
    assert ended == -signal.SIGKILL


# ---------------------------------------------------------------- the command


def run(cluster: StandInCluster, *more: str) -> subprocess.CompletedProcess[str]:
    paths = config(cluster)
    flags = [
        *("--kubelet-plugins-directory-path", str(paths.kubelet_plugins_directory_path)),
        *("--kubelet-registrar-directory-path", str(paths.kubelet_registrar_directory_path)),
        *("--cdi-root", str(paths.cdi_root)),
        *("--mps-root", str(paths.mps_root)),
    ]
    command = [sys.executable, "-m", "gpuslice", "cleanup", *flags, *more]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=50)


async def test_the_command_says_what_it_removed_or_why_not(cluster: StandInCluster) -> None:
    driver = await cluster.start()
    ref = cluster.claim("part", PART)
    await cluster.run(ref)
    await driver.kill()

    refused = run(cluster)
    await cluster.start()
    await cluster.end(ref)
    checked = run(cluster, "--check")
    await cluster.drivers[-1].terminate()
    cleaned = run(cluster)

    assert (refused.returncode, refused.stdout) == (3, "")
    assert refused.stderr.startswith("gpuslice: prepared on this node: default/part")
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "no claim is prepared on this node\n", "")
    assert cleaned.returncode == 0
    assert cleaned.stdout.splitlines()[-1] == "nothing of gpuslice.dev is left on this node"
