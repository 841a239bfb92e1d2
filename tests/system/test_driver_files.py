"""Driver roots as NVIDIA's installers leave them, and roots whose links are odd or hostile: nothing outside is ever named."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from gpuslice.errors import DeviceError
from gpuslice.nvml import library
from gpuslice.system import chroot, driver_files
from gpuslice.system.host import RealHost

from tests.kit.node_tree import DEBIAN, RHEL, VERSION, fill_driver_root, fill_proc, write

LIBRARY = f"libcuda.so.{VERSION}"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A whole driver beside the root, and nothing of it may be mounted or run."""
    folder = tmp_path / "outside"
    fill_driver_root(folder)
    write(folder / "usr/bin/nvidia-cdi-hook")
    return folder


def link(path: Path, target: str | Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def files(root: Path) -> dict[str, str]:
    """Path in the container → path below the root."""
    return {target: source for source, target in driver_files.search(root, None).files}


# ---------------------------------------------------------------- layouts that work


def test_a_folder_behind_an_absolute_link_is_the_one_below_the_root(root: Path) -> None:
    fill_driver_root(root / "opt/vendor", "lib64")
    link(root / "usr/lib64", "/opt/vendor/lib64")
    link(root / "usr/bin", "/opt/vendor/usr/bin")

    found = files(root)

    assert found[f"/opt/vendor/lib64/{LIBRARY}"] == f"/opt/vendor/lib64/{LIBRARY}"
    assert found["/usr/bin/nvidia-smi"] == "/opt/vendor/usr/bin/nvidia-smi"


def test_a_root_with_merged_folders_gives_each_file_once(root: Path) -> None:
    fill_driver_root(root, RHEL)
    (root / "lib/firmware").rename(root / "usr/lib-firmware")
    (root / "lib").rmdir()
    (root / "usr/lib/firmware").parent.mkdir()
    (root / "usr/lib-firmware").rename(root / "usr/lib/firmware")
    for name in ("lib", "lib64", "bin"):
        link(root / name, f"usr/{name}")

    found = driver_files.search(root, None).files

    targets = [target for _, target in found]
    assert len(targets) == len(set(targets))
    assert (
        f"/usr/lib/firmware/nvidia/{VERSION}/gsp_ga10x.bin",
        f"/lib/firmware/nvidia/{VERSION}/gsp_ga10x.bin",
    ) in found


def test_names_kept_by_debian_s_alternatives_are_followed_to_the_library(root: Path) -> None:
    current = f"{DEBIAN}/nvidia/current"
    fill_driver_root(root, current)
    link(root / "etc/alternatives/nvidia--libcuda.so.1", f"/{current}/libcuda.so.1")
    link(root / DEBIAN / "libcuda.so.1", "/etc/alternatives/nvidia--libcuda.so.1")
    link(root / current / "libcuda.so.0", "/etc/alternatives/nvidia--libcuda.so.1")

    found = driver_files.search(root, None)

    assert found.anchor == f"/{current}/{LIBRARY}"
    assert dict(found.links)[f"/{current}/libcuda.so.0"] == found.anchor


def test_data_behind_a_link_inside_the_root_comes_along(root: Path) -> None:
    fill_driver_root(root)
    write(root / "opt/icd.json")
    link(root / "etc/vulkan/icd.d/nvidia_icd.json", "/opt/icd.json")

    assert files(root)["/etc/vulkan/icd.d/nvidia_icd.json"] == "/opt/icd.json"


def test_a_root_that_is_a_link_itself_is_taken_as_named(tmp_path: Path, root: Path) -> None:
    fill_driver_root(root)
    link(tmp_path / "current", root)

    assert files(tmp_path / "current") == files(root)


# ---------------------------------------------------------------- links that lead out


@pytest.mark.parametrize("target", ["../../../outside/usr/lib/x86_64-linux-gnu/", "../../../../../../../../"])
def test_a_library_behind_a_link_that_climbs_out_is_refused_by_that_link(
    root: Path, outside: Path, target: str
) -> None:
    link(root / "usr/lib64/libcuda.so.1", f"{target}{LIBRARY}")

    with pytest.raises(DeviceError) as refused:
        driver_files.search(root, None)

    assert str(refused.value) == (
        f"{root}/usr/lib64/libcuda.so.1 is a link to {target}{LIBRARY}, which is not below the driver root {root}; "
        "name the folder that holds the NVIDIA driver's own files as the driver root"
    )


def test_a_folder_that_climbs_out_is_refused_by_its_link(root: Path, outside: Path) -> None:
    link(root / "usr/lib64", f"../../outside/{DEBIAN}")

    with pytest.raises(DeviceError, match=f"^{root}/usr/lib64 is a link to ../../outside/{DEBIAN}, which is not below"):
        driver_files.search(root, None)


def test_an_absolute_link_out_of_the_root_is_read_as_one_inside_and_finds_nothing(root: Path, outside: Path) -> None:
    link(root / "usr/lib64", outside / DEBIAN)

    with pytest.raises(
        DeviceError, match=f"no libcuda.so.<version> or libnvidia-ml.so.<version> below {root}; install"
    ):
        driver_files.search(root, None)


@pytest.mark.parametrize("place", [f"usr/lib64/{LIBRARY}", "usr/lib64"])
def test_a_circle_of_links_ends_in_one_sentence(root: Path, place: str) -> None:
    link(root / place, f"/{place}-again")
    link(root / f"{place}-again", f"/{place}")

    with pytest.raises(DeviceError, match=f"^{root}/{place} is behind links that lead in a circle; name the folder"):
        driver_files.search(root, None)


@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize(
    ("place", "name"),  # the name of a file outside, "" for their folder
    [
        (f"{RHEL}/libnvidia-evil.so.{VERSION}", "file"),
        (f"{RHEL}/libnvidia-nvvm70.so.4", "file"),
        (f"{RHEL}/vdpau", ""),
        ("usr/sbin/nvidia-persistenced", "file"),
        ("usr/share/nvidia", ""),
        ("usr/share/nvidia/nvoptix.bin", "file"),
        ("etc/vulkan", ""),
        ("etc/OpenCL/vendors/nvidia.icd", "file"),
        (f"usr/lib/firmware/nvidia/{VERSION}", ""),
        ("usr/bin/nvidia-cdi-hook", "file"),
        ("opt/nvidia/toolkit", ""),
    ],
)
def test_nothing_outside_is_mounted_or_run_beside_a_sound_library(
    tmp_path: Path, root: Path, place: str, name: str, absolute: bool
) -> None:
    fill_driver_root(root, RHEL)
    (root / RHEL / "vdpau").rename(root / "unused")
    fill_proc(tmp_path / "proc")
    for file in (
        "file",
        "icd.d/nvidia_icd.json",
        "nvoptix.bin",
        "gsp_tu10x.bin",
        f"lib.so.{VERSION}",
        "nvidia-cdi-hook",
    ):
        write(tmp_path / "outside" / file)
    target = tmp_path / "outside" / name
    link(root / place, target if absolute else os.path.relpath(target, (root / place).parent))

    common = RealHost(root, proc=tmp_path / "proc", dev=tmp_path).common()

    assert common.hooks == ()
    for mount in common.mounts:
        assert os.path.realpath(mount.host_path) == mount.host_path, "no link is left for the runtime to follow"
        assert root in Path(mount.host_path).parents


def test_a_socket_outside_is_not_given_to_containers(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_driver_root(root)
    fill_proc(tmp_path / "proc")
    link(root / "run/nvidia-fabricmanager", "../../outside")
    (tmp_path / "outside").mkdir()
    monkeypatch.chdir(tmp_path / "outside")  # a bound path holds 107 bytes at most

    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        common = RealHost(root, proc=tmp_path / "proc", dev=tmp_path).common()

    assert not [mount for mount in common.mounts if "fabricmanager" in mount.container_path]


def test_a_hook_behind_a_link_inside_is_named_by_its_file(tmp_path: Path, root: Path) -> None:
    fill_driver_root(root)
    fill_proc(tmp_path / "proc")
    write(root / "opt/toolkit/nvidia-cdi-hook")
    link(root / "usr/bin/nvidia-cdi-hook", "/opt/toolkit/nvidia-cdi-hook")

    common = RealHost(root, host_root=Path("/host"), proc=tmp_path / "proc", dev=tmp_path).common()

    assert {hook.path for hook in common.hooks} == {"/host/opt/toolkit/nvidia-cdi-hook"}


# ---------------------------------------------------------------- NVML's library, and paths as such


def test_nvml_is_loaded_from_below_the_root_whatever_its_link_says(root: Path) -> None:
    write(root / "opt/libnvidia-ml.so.580.1")
    link(root / "usr/lib64/libnvidia-ml.so.1", "/opt/libnvidia-ml.so.580.1")

    assert library.find(root) == root / "opt/libnvidia-ml.so.580.1"


def test_nvml_behind_a_link_that_climbs_out_is_not_loaded(root: Path, outside: Path) -> None:
    link(root / "usr/lib64/libnvidia-ml.so.1", f"../../../outside/{DEBIAN}/libnvidia-ml.so.1")

    assert library.find(root) is None
    with pytest.raises(
        DeviceError, match=r"cannot find libnvidia-ml\.so\.1: .*/libnvidia-ml\.so\.1 is a link to \.\./"
    ):
        library.start(root)


def test_dots_count_from_the_folder_behind_a_link_and_not_from_the_link(root: Path) -> None:
    write(root / "a/b/file")
    write(root / "a/other")
    link(root / "short", "a/b")
    link(root / "mine", "short/../other")

    assert chroot.resolve(root, "mine") == root / "a/other"


def test_the_root_of_the_node_has_nothing_above_it() -> None:
    assert chroot.resolve(Path("/"), "../../etc") == Path("/etc")


def test_a_name_that_no_file_system_takes_is_one_sentence(root: Path) -> None:
    with pytest.raises(DeviceError, match="File name too long; check the driver root and its rights"):
        chroot.resolve(root, "n" * 300)
