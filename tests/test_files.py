"""Every file of ours: missing, empty, incomplete, of another mode, a folder, a link. Only its own claim may be refused."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from gpuslice.config import Config
from gpuslice.core.model import Claim
from gpuslice.errors import DriverError
from gpuslice.node import snapshot
from gpuslice.nvml.sim.node import SimNode
from gpuslice.standin.cluster import DRIVER, StandInCluster
from gpuslice.standin.scheduler import Request
from gpuslice.system import files

from tests.kit.mps_node import MpsNode
from tests.kit.rig import Rig, a_claim
from tests.test_mutations import Api, life


def gone(path: Path) -> None:
    path.unlink(missing_ok=True)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20] if path.exists() else b"{")


def no_object(path: Path) -> None:
    path.write_bytes(b"{}")


def another_mode(path: Path) -> None:
    path.touch()
    path.chmod(0)


def a_folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def a_link_to_nothing(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(path.parent / "nothing")


def a_link_to_a_file(path: Path) -> None:
    """A person has moved the file away."""
    there = path.parent / ".moved"
    if path.exists():
        path.rename(there)
    there.touch()
    path.symlink_to(there)


def neighbour(path: Path) -> Path | None:
    """Another file of the same kind: the last one in the same folder, or in the folders beside this one."""
    beside = [p for p in path.parent.iterdir() if p != path and p.suffix == path.suffix and p.is_file()]
    beside = beside or [p for p in path.parents[1].glob(f"*/{path.name}") if p.parent != path.parent and p.is_file()]
    return max(beside, default=None)


def a_link_to_a_neighbour(path: Path) -> None:
    """Two locks that are one, or two records of one claim."""
    there = neighbour(path)
    path.unlink(missing_ok=True)
    path.symlink_to(there or path.parent)


def a_copy_of_a_neighbour(path: Path) -> None:
    """A person has copied the wrong file. It names another claim, card or daemon."""
    there = neighbour(path)
    path.unlink(missing_ok=True)
    path.write_bytes(there.read_bytes() if there else b"")


def a_pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


HARMS = (
    gone,
    empty,
    torn,
    no_object,
    another_mode,
    a_folder,
    a_link_to_nothing,
    a_link_to_a_file,
    a_link_to_a_neighbour,
    a_copy_of_a_neighbour,
    a_pipe,
)

FILES: dict[str, Callable[[Rig, Claim], Path]] = {
    "record": lambda rig, claim: rig.checkpoint.folder / f"{claim.ref.uid}.json",
    "CDI file": lambda rig, claim: rig.folder / "cdi" / f"gpuslice.dev-claim_{claim.ref.uid}.json",
    "lock of a card": lambda rig, claim: rig.folder / "locks" / f"gpu-{rig.gpus[0].uuid}.lock",
    "lock of the claims": lambda rig, claim: rig.folder / "locks" / "claims.lock",
}


@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__)
@pytest.mark.parametrize("file", list(FILES))
def test_a_file_that_is_not_as_it_was_harms_no_other_claim(
    tmp_path: Path, file: str, harm: Callable[[Path], None]
) -> None:
    rig = Rig(tmp_path)
    victim = a_claim("victim", rig.device("mig-1g-19-0"), rig.device("mig-1g-19-0", 1))
    others = (a_claim("beside", rig.device("mig-1g-19-1")), a_claim("elsewhere", rig.device("mig-1g-19-1", 1)))
    given = [rig.prepare(claim) for claim in (*others, victim)][:2]
    harm(FILES[file](rig, victim))

    again = rig.restart()
    asyncio.run(life(again, Api((*others, victim))))

    assert [again.prepare(claim) for claim in others] == given
    again.prepare(a_claim("newcomer", again.device("mig-1g-19-2")))
    for claim in others:
        again.unprepare(claim)
    if file != "record":  # the driver repairs its other files without a request
        if file == "CDI file":
            assert_as_written(again, victim)
        again.prepare(victim)
        assert_as_written(again, victim)
        again.unprepare(victim)
        assert victim.ref.uid not in again.records()
    else:
        for ask in (again.ask, again.unprepare):
            with contextlib.suppress(DriverError):
                ask(victim)


def assert_as_written(rig: Rig, claim: Claim) -> None:
    path = FILES["CDI file"](rig, claim)
    assert stat.S_IMODE(path.lstat().st_mode) == 0o644
    assert stat.S_ISREG(path.lstat().st_mode)
    devices = rig.cdi(claim)["devices"]
    assert isinstance(devices, list)
    assert len(devices) == 2


@pytest.mark.parametrize(
    "harm", [h for h in HARMS if h is not another_mode or os.geteuid() == 0], ids=lambda h: h.__name__
)
def test_a_cdi_file_that_is_harmed_while_the_driver_runs_is_mended_by_the_regular_look(
    tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    rig = Rig(tmp_path)
    victim = a_claim("victim", rig.device("mig-1g-19-0"), rig.device("gpu", 1))
    rig.prepare(victim)
    path = FILES["CDI file"](rig, victim)
    before = path.read_bytes()
    harm(path)

    asyncio.run(life(rig, Api((victim,))))

    assert path.read_bytes() == before
    assert_as_written(rig, victim)


def test_a_changed_text_of_the_same_length_is_mended(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    victim = a_claim("victim", rig.device("gpu"), rig.device("gpu", 1))
    rig.prepare(victim)
    path = FILES["CDI file"](rig, victim)
    before, times = path.read_bytes(), path.stat()
    path.write_bytes(before.replace(b"rw", b"r-"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    rig.prepare(victim)

    assert path.read_bytes() == before


def test_a_cdi_file_that_is_as_it_was_is_not_written_again(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    victim = a_claim("victim", rig.device("gpu"))
    rig.prepare(victim)
    inode = FILES["CDI file"](rig, victim).stat().st_ino

    again = rig.restart()
    asyncio.run(life(again, Api((victim,))))

    assert FILES["CDI file"](again, victim).stat().st_ino == inode
    assert again.preparer.to_mend() == ()


def test_a_cdi_file_without_a_record_is_removed_and_one_of_a_broken_record_stays(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    lost, broken, foreign = (
        a_claim("lost", rig.device("gpu")),
        a_claim("broken", rig.device("gpu", 1)),
        "other-claim_x.json",
    )
    for claim in (lost, broken):
        rig.prepare(claim)
    FILES["record"](rig, lost).unlink()
    FILES["record"](rig, broken).write_text("{}\n")
    (tmp_path / "cdi" / foreign).touch()

    asyncio.run(life(rig, Api((lost, broken))))

    assert rig.cdi_files() == sorted([f"gpuslice.dev-claim_{broken.ref.uid}.json", foreign])


@pytest.mark.timeout(240)  # a dozen starts
async def test_files_of_the_plugins_folder_that_are_not_as_they_were_refuse_no_start(short: Path) -> None:
    """One node for all harms, because each start repairs what the harm before it left."""
    async with StandInCluster(short) as cluster:
        driver, folder = await cluster.start(), cluster.plugins / DRIVER
        for number, harm in enumerate(HARMS):
            print(harm.__name__)  # noqa: T201 - pytest shows it with a failure
            assert await driver.terminate() == 0
            for name in ("gpus.json", "shapes.json", "running.json"):
                harm(folder / name)
            for body in cluster.api.all("resourceslices"):
                cluster.api.delete("resourceslices", body["metadata"]["name"])

            with contextlib.suppress(DriverError), snapshot(Config(kubelet_plugins_directory_path=cluster.plugins)):
                pass
            driver = await cluster.start()
            claim = cluster.claim(f"c{number}", Request(name="gpu", driver=DRIVER, where={"type": "gpu"}))
            await cluster.run(claim)

            assert driver.alive
            for name in ("gpus.json", "shapes.json", "running.json"):
                assert stat.S_ISREG((folder / name).lstat().st_mode), name
            await cluster.end(claim)


@pytest.mark.timeout(240)  # two dozen daemons
@pytest.mark.parametrize("file", ["daemon.json", "log/console"])
def test_files_of_mps_daemons_that_are_not_as_they_were_harm_no_other_daemon(
    short: Path, unmeasured: None, file: str
) -> None:
    """Each daemon but one has another harm, and the next supervisor finds them all."""
    well = 9  # its folder is the last one by name, so it is the neighbour of all others
    harms = dict(zip((gpu for gpu in range(16) if gpu != well), HARMS, strict=False))
    assert len(harms) == len(HARMS)
    with contextlib.closing(MpsNode(short, "h100x16")) as mps:
        supervisor = mps.supervise_in_process()
        beside = mps.client.ensure(mps.daemon(well))
        for gpu in harms:
            mps.client.ensure(mps.daemon(gpu))

        for gpu, harm in harms.items():
            harm(mps.root / f"gpu-{gpu}" / file)
        mps.outlive(supervisor)

        assert beside in mps.client.statuses()
        for gpu, harm in harms.items():
            mended, key = mps.client.ensure(mps.daemon(gpu)), f"gpu-{gpu}"
            assert (mended.problem, mps.daemons_of(key)) == ("", [mended.pid]), harm.__name__
            mps.client.stop(key)
            assert not (mps.root / key).exists(), harm.__name__
        assert mps.client.statuses() == (beside,)


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


@pytest.mark.parametrize("harm", [a_link_to_nothing, a_link_to_a_file, a_folder, a_pipe, a_socket])
def test_what_is_no_plain_file_is_no_content(short: Path, harm: Callable[[Path], None]) -> None:
    harm(short / "file")

    with pytest.raises(ValueError, match=r"^it is no plain file$"):
        files.read_plain(short / "file")


@pytest.mark.parametrize("folder", ["cdi", "locks"])
def test_a_folder_that_is_gone_is_made_again(tmp_path: Path, folder: str) -> None:
    rig = Rig(tmp_path)
    victim = a_claim("victim", rig.device("gpu"), rig.device("gpu", 1))
    rig.prepare(victim)
    shutil.rmtree(tmp_path / folder)

    asyncio.run(life(rig, Api((victim,))))

    rig.prepare(victim)
    assert_as_written(rig, victim)


def test_a_mode_that_was_asked_for_is_there_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        rig = Rig(tmp_path / "node")
        files.ensure_folder(tmp_path / "run" / "open", 0o711)
        rig.preparer.make_spares()
        for name, card in (("from-a-spare", 0), ("without", 1)):
            rig.prepare(a_claim(name, rig.device("gpu", card)))
    finally:
        os.umask(before)

    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "node/cdi").iterdir()}
    assert modes == {0o644}
    assert stat.S_IMODE((tmp_path / "node/cdi").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "run" / "open").stat().st_mode) == 0o711
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) & 0o011 == 0o011, "its parents lead there"


def test_a_folder_of_an_earlier_version_gets_the_rights_that_are_missing_and_keeps_the_others(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir(mode=0o700)
    (tmp_path / "there").chmod(0o2700)

    files.ensure_folder(tmp_path / "there", 0o711)

    assert stat.S_IMODE((tmp_path / "there").stat().st_mode) == 0o2711


def test_the_leftover_of_a_lost_card_does_not_grow(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    victim = a_claim("victim", rig.device("mig-1g-19-0"))
    rig.prepare(victim)
    SimNode(tmp_path / "node").lose(rig.gpus[0].uuid)
    rig.unprepare(victim)
    (record,) = rig.checkpoint.folder.iterdir()
    (left,) = rig.records()
    size = record.stat().st_size

    for _ in range(100):
        assert rig.preparer.unprepare(left, rig.preparer.scope(left)) is None

    assert record.stat().st_size == size
