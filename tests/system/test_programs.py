"""NVIDIA's programs below a driver root: which file is run, and what it finds besides."""

from __future__ import annotations

from pathlib import Path

import pytest
from gpuslice.errors import DeviceError
from gpuslice.system import programs

from tests.kit.node_tree import RHEL, VERSION, fill_driver_root, write

CONTROL, SERVER = "nvidia-cuda-mps-control", "nvidia-cuda-mps-server"


def program(path: Path, text: str = "#!/bin/sh\n") -> Path:
    write(path, text)
    path.chmod(0o755)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    fill_driver_root(folder, RHEL)
    return folder


@pytest.mark.parametrize("folder", ["usr/bin", "bin", "usr/lib/nvidia/current", "usr/local/nvidia/bin"])
def test_a_program_is_found_in_the_folders_of_each_layout(tmp_path: Path, folder: str) -> None:
    path = program(tmp_path / folder / CONTROL)

    assert programs.find(tmp_path, CONTROL) == path


def test_a_file_that_may_not_be_run_does_not_hide_one_that_may(root: Path) -> None:
    path = program(root / "bin" / CONTROL)  # usr/bin has one too, without the right

    assert programs.find(root, CONTROL) == path


def test_an_absolute_link_is_run_as_the_file_below_the_root(root: Path) -> None:
    path = program(root / "opt/nvidia" / CONTROL)
    (root / "bin").mkdir()
    (root / "bin" / CONTROL).symlink_to(f"/opt/nvidia/{CONTROL}")

    assert programs.find(root, CONTROL) == path


def test_a_program_outside_the_root_is_never_run_and_the_sentence_names_the_link(tmp_path: Path) -> None:
    root = tmp_path / "root"
    program(tmp_path / "outside" / CONTROL)
    (root / "usr/bin").mkdir(parents=True)
    (root / "usr/bin" / CONTROL).symlink_to(f"../../../outside/{CONTROL}")

    with pytest.raises(DeviceError) as refused:
        programs.find(root, CONTROL)

    assert str(refused.value) == (
        f"{root}/usr/bin/{CONTROL} is a link to ../../../outside/{CONTROL}, which is not below the driver root {root}; "
        "name the folder that holds the NVIDIA driver's own files as the driver root"
    )


def test_libraries_and_programs_of_the_root_are_linked_by_their_files(tmp_path: Path, root: Path) -> None:
    program(root / "opt" / SERVER)
    (root / "usr/bin" / SERVER).symlink_to(f"/opt/{SERVER}")
    write(tmp_path / "outside.so")
    (root / RHEL / "libnvidia-outside.so.1").symlink_to("../../../outside.so")

    env = programs.environment(root, tmp_path / "ours")

    links = {path.name: path.readlink() for path in (tmp_path / "ours").iterdir()}
    assert links[SERVER] == root / "opt" / SERVER
    assert links["libcuda.so.1"] == root / RHEL / f"libcuda.so.{VERSION}"
    assert "libnvidia-outside.so.1" not in links
    assert "libc.so.6" not in links
    assert "bash" not in links
    assert all(root in target.parents for target in links.values())
    assert env["LD_LIBRARY_PATH"] == str(tmp_path / "ours")
    assert env["PATH"].startswith(f"{tmp_path / 'ours'}:")
    assert str(root) not in env["PATH"]


def test_the_program_that_nvidia_s_program_starts_is_the_one_of_the_root(tmp_path: Path, root: Path) -> None:
    (root / "usr/bin" / CONTROL).unlink()
    control = program(root / "usr/bin" / CONTROL, f"#!/bin/sh\nexec {SERVER}\n")
    program(root / "opt" / SERVER, "#!/bin/sh\necho started\n")
    (root / "usr/bin" / SERVER).symlink_to(f"/opt/{SERVER}")

    status, text = programs.run([str(control)], timeout_s=10, env=programs.environment(root, tmp_path / "ours"))

    assert (status, text) == (0, "started\n")


def test_links_of_a_driver_that_was_replaced_are_made_again(tmp_path: Path, root: Path) -> None:
    ours = tmp_path / "ours"
    programs.environment(root, ours)
    (ours / "libnvidia-old.so.1").symlink_to("/gone/libnvidia-old.so.1")
    (root / RHEL / "libcuda.so.1").unlink()
    (root / RHEL / "libcuda.so.1").symlink_to(f"libnvidia-ml.so.{VERSION}")

    programs.environment(root, ours)

    assert (ours / "libcuda.so.1").readlink() == root / RHEL / f"libnvidia-ml.so.{VERSION}"
    assert not (ours / "libnvidia-old.so.1").is_symlink()


def test_the_node_s_own_root_needs_no_environment(tmp_path: Path) -> None:
    assert programs.environment(Path("/"), tmp_path / "ours") == {}
    assert not (tmp_path / "ours").exists()
