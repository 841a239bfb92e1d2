"""RealHost on trees that look like nodes, SimHost on a folder; golden files of whole CDI specs."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from gpuslice.core import cdi
from gpuslice.core.cdi import CdiDevice, ContainerEdits, DeviceNode
from gpuslice.core.model import Gpu, GpuUuid
from gpuslice.errors import DeviceError, StateError
from gpuslice.system.host import Host, RealHost, SimHost, check_hook

from tests.kit.cdi_rules import faults
from tests.kit.node_tree import DEBIAN, RHEL, VERSION, fill_driver_root, fill_proc, write

GOLDEN = Path(__file__).parents[1] / "golden"
UID = "0d9c2f7e-5a0b-4c53-9a39-6a0f6f0f9d11"
CARD = Gpu(
    uuid=GpuUuid("GPU-1"),
    index=5,
    bus_id="0000:3b:00.0",
    product="NVIDIA H100 80GB HBM3",
    architecture="Hopper",
    compute_capability="9.0",
    memory_bytes=80 << 30,
    driver_version=VERSION,
    cuda_version="13.0",
)


@pytest.fixture
def node(tmp_path: Path) -> Path:
    fill_proc(tmp_path / "proc")
    fill_driver_root(tmp_path / "root")
    (tmp_path / "dev").mkdir()
    return tmp_path


def host_of(node: Path, host_root: Path | None = None, hook: Path | None = None) -> RealHost:
    return RealHost(
        node / "root", host_root=host_root, proc=node / "proc", sys=node / "sys", dev=node / "dev", cdi_hook=hook
    )


def mounted(injection: ContainerEdits) -> dict[str, str]:
    return {mount.container_path: mount.host_path for mount in injection.mounts}


@contextmanager
def a_socket(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        yield


# ---------------------------------------------------------------- files of the driver


@pytest.mark.parametrize("folder", [DEBIAN, RHEL, "usr/lib/x86_64-linux-gnu/nvidia/current", "lib64"])
def test_the_libraries_of_the_driver_are_found_in_the_folders_of_each_distribution(node: Path, folder: str) -> None:
    other = node / "other"
    fill_driver_root(other, folder)

    common = RealHost(other, proc=node / "proc", dev=node / "dev").common()

    library = f"{folder}/libnvidia-ptxjitcompiler.so.{VERSION}"
    assert mounted(common)[f"/{library}"] == str(other / library)
    assert f"/{folder}/vdpau/libvdpau_nvidia.so.{VERSION}" in mounted(common)
    assert {mount.options for mount in common.mounts} == {("ro", "nosuid", "nodev", "rbind", "rprivate")}


def test_programs_and_firmware_come_along_and_nothing_of_the_operating_system(node: Path) -> None:
    paths = mounted(host_of(node).common()).keys()

    assert {"/usr/bin/nvidia-smi", f"/lib/firmware/nvidia/{VERSION}/gsp_ga10x.bin"} <= paths
    assert not {"/usr/bin/bash", f"/{DEBIAN}/libc.so.6"} & paths


def test_with_a_driver_container_the_host_path_has_its_root_and_the_container_path_has_not(node: Path) -> None:
    common = host_of(node, host_root=Path("/run/nvidia/driver")).common()

    assert mounted(common)[f"/{DEBIAN}/libcuda.so.{VERSION}"] == f"/run/nvidia/driver/{DEBIAN}/libcuda.so.{VERSION}"


def test_the_version_of_the_loaded_kernel_module_wins_over_a_newer_one_on_disk(node: Path) -> None:
    fill_driver_root(node / "root", RHEL, "999.1")

    paths = mounted(host_of(node).common()).keys()

    assert f"/{DEBIAN}/libcuda.so.{VERSION}" in paths
    assert not [path for path in paths if path.endswith("999.1")]


def test_the_newest_version_is_taken_by_number_when_the_module_does_not_say(node: Path) -> None:
    fill_driver_root(node / "root", RHEL, "1000.1")
    (node / "proc/driver/nvidia/version").unlink()

    assert f"/{RHEL}/libcuda.so.1000.1" in mounted(host_of(node).common())


def fill_own_folder(root: Path, version: str = VERSION) -> None:
    """A driver in a folder of its own, as seen on a virtual machine with driver 580: /usr/local/nvidia."""
    for name in ("cuda", "nvidia-ml"):
        write(root / f"lib64/lib{name}.so.{version}")
        (root / f"lib64/lib{name}.so.1").symlink_to(f"lib{name}.so.{version}")
    (root / "lib").symlink_to("lib64")
    write(root / "glibc/libc.so.6")
    write(root / "bin/nvidia-smi")
    write(root / f"firmware/nvidia/{version}/gsp_ga10x.bin")
    write(root / "share/vulkan/icd.d/nvidia_icd.json")
    write(root / "share/vulkan/implicit_layer.d/nvidia_layers.json")
    write(root / "share/glvnd/egl_vendor.d/10_nvidia.json")


def test_a_root_that_is_the_driver_s_alone_gives_its_data_where_containers_look(node: Path) -> None:
    root = node / "own"
    fill_own_folder(root)

    paths = mounted(RealHost(root, proc=node / "proc", dev=node / "dev").common())

    assert paths[f"/lib64/libcuda.so.{VERSION}"] == f"{root}/lib64/libcuda.so.{VERSION}"
    assert paths["/bin/nvidia-smi"] == f"{root}/bin/nvidia-smi"
    assert paths[f"/lib/firmware/nvidia/{VERSION}/gsp_ga10x.bin"] == f"{root}/firmware/nvidia/{VERSION}/gsp_ga10x.bin"
    assert paths["/usr/share/vulkan/icd.d/nvidia_icd.json"] == f"{root}/share/vulkan/icd.d/nvidia_icd.json"
    assert "/usr/share/vulkan/implicit_layer.d/nvidia_layers.json" in paths
    assert "/usr/share/glvnd/egl_vendor.d/10_nvidia.json" in paths
    assert not [path for path in paths if "libc.so" in path]


def test_links_of_the_node_into_the_driver_s_own_folder_are_followed(node: Path) -> None:
    root = node / "linked"
    fill_own_folder(root / "opt/vendor/nvidia")
    for name, target in (
        (
            "usr/lib/libcuda.so.1",
            "/opt/vendor/nvidia/lib64/libcuda.so.1",
        ),  # absolute: below the root, as in a container
        ("usr/lib/libnvidia-ml.so.1", "../../opt/vendor/nvidia/lib64/libnvidia-ml.so.1"),
        ("usr/bin/nvidia-smi", "/opt/vendor/nvidia/bin/nvidia-smi"),
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(target)

    paths = mounted(RealHost(root, proc=node / "proc", dev=node / "dev").common())

    library = f"opt/vendor/nvidia/lib64/libcuda.so.{VERSION}"
    assert paths[f"/{library}"] == str(root / library)
    assert paths["/usr/bin/nvidia-smi"] == f"{root}/opt/vendor/nvidia/bin/nvidia-smi"  # on the PATH of a container


def test_a_root_with_links_that_lead_out_of_it_is_refused_by_the_link(node: Path) -> None:
    root = node / "outward"
    (root / "usr/lib").mkdir(parents=True)
    (root / "usr/lib/libcuda.so.1").symlink_to("../../../elsewhere/libcuda.so.580.1")
    write(node / "elsewhere/libcuda.so.580.1")

    with pytest.raises(DeviceError) as refused:
        RealHost(root, proc=node / "proc", dev=node / "dev").common()

    assert str(refused.value) == (
        f"{root}/usr/lib/libcuda.so.1 is a link to ../../../elsewhere/libcuda.so.580.1, which is not below the driver root "
        f"{root}; name the folder that holds the NVIDIA driver's own files as the driver root"
    )


def test_a_root_of_another_version_than_the_kernel_module_is_refused_with_both(node: Path) -> None:
    root = node / "newer"
    fill_driver_root(root, RHEL, "999.1")

    with pytest.raises(
        DeviceError, match=rf"is version 999\.1, but the loaded kernel module is version {VERSION}, so CUDA"
    ):
        RealHost(root, proc=node / "proc", dev=node / "dev").common()


def test_a_driver_that_was_upgraded_under_us_is_read_again(node: Path) -> None:
    host = host_of(node)
    host.common()
    fill_driver_root(node / "root", RHEL, "590.10")
    fill_proc(node / "proc", "590.10")

    paths = mounted(host.common()).keys()

    assert f"/{RHEL}/libcuda.so.590.10" in paths
    assert not [path for path in paths if path.endswith(VERSION)]


def test_what_did_not_change_is_not_searched_again(node: Path) -> None:
    host = host_of(node)
    first = host.common()
    write(node / "root" / DEBIAN / f"libnvidia-late.so.{VERSION}")

    assert host.common() == first


def test_sockets_of_the_node_are_given_when_they_are_there_but_never_a_foreign_mps_daemon(
    node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = host_of(node)
    host.common()
    (node / "root/tmp/nvidia-mps").mkdir(parents=True)
    monkeypatch.chdir(node / "root")  # a bound path holds 107 bytes at most

    with a_socket(Path("run/nvidia-persistenced/socket")):
        mounts = {mount.container_path: mount for mount in host.common().mounts}

    assert mounts["/run/nvidia-persistenced/socket"].options == ("nosuid", "nodev", "noexec", "rbind", "rprivate")
    assert not [path for path in mounts if "mps" in path and not path.startswith("/usr/bin/")]


@pytest.mark.parametrize("there", [True, False])
def test_a_node_without_a_driver_is_told_in_one_sentence(tmp_path: Path, there: bool) -> None:
    root = tmp_path / "root"
    if there:
        root.mkdir()

    with pytest.raises(DeviceError, match=str(root)) as caught:
        RealHost(root, proc=tmp_path, dev=tmp_path).common()

    assert "; " in str(caught.value)


# ---------------------------------------------------------------- the hook, and the way without it


def test_the_installed_hook_makes_links_and_the_cache_of_the_loader(node: Path) -> None:
    write(node / "root/usr/bin/nvidia-cdi-hook")

    common = host_of(node, host_root=Path("/run/nvidia/driver")).common()

    links, cache = common.hooks
    assert {links.path, cache.path} == {"/run/nvidia/driver/usr/bin/nvidia-cdi-hook"}
    assert links.args[:2] == ("nvidia-cdi-hook", "create-symlinks")
    assert f"libcuda.so.{VERSION}::/{DEBIAN}/libcuda.so.1" in links.args
    assert cache.args[:4] == ("nvidia-cdi-hook", "update-ldcache", "--folder", f"/{DEBIAN}")
    assert "LD_LIBRARY_PATH" not in common.env


def test_a_hook_that_the_operator_names_is_used_unseen(node: Path) -> None:
    host = host_of(node, hook=Path("/opt/tools/nvidia-cdi-hook"))

    assert {hook.path for hook in host.common().hooks} == {"/opt/tools/nvidia-cdi-hook"}
    assert host.advice() == ()


def test_a_hook_that_is_installed_later_is_used_from_then_on(node: Path) -> None:
    host = host_of(node)
    assert host.common().hooks == ()

    write(node / "root/usr/local/nvidia/toolkit/nvidia-cdi-hook")

    assert len(host.common().hooks) == 2


def test_without_the_hook_a_library_appears_under_all_its_names(node: Path) -> None:
    host = host_of(node)

    common = host.common()

    source = str(node / "root" / DEBIAN / f"libcuda.so.{VERSION}")
    names = {path for path, host_path in mounted(common).items() if host_path == source}
    assert names == {f"/{DEBIAN}/libcuda.so.{VERSION}", f"/{DEBIAN}/libcuda.so.1", f"/{DEBIAN}/libcuda.so"}
    assert common.env == {"LD_LIBRARY_PATH": f"/{DEBIAN}:/{DEBIAN}/vdpau"}
    assert "nvidia-cdi-hook" in host.advice()[0]


def test_links_that_point_out_of_a_driver_container_are_followed_by_name(node: Path) -> None:
    link = node / "root" / DEBIAN / "libnvidia-encode.so.1"
    link.unlink()
    link.symlink_to(f"/{DEBIAN}/libnvidia-encode.so.{VERSION}")

    assert f"/{DEBIAN}/libnvidia-encode.so.1" in mounted(host_of(node).common())


def test_a_root_without_any_links_still_gives_the_names_that_cuda_needs(node: Path) -> None:
    for link in (node / "root" / DEBIAN).glob("*.so*"):
        if link.is_symlink():
            link.unlink()

    names = {Path(path).name for path in mounted(host_of(node).common())}

    assert {"libcuda.so", "libcuda.so.1", "libnvidia-ml.so.1"} <= names


# ---------------------------------------------------------------- device nodes


def test_control_nodes_have_the_numbers_of_the_running_kernel(node: Path) -> None:
    assert host_of(node).common().nodes == (
        DeviceNode("/dev/nvidiactl", 195, 255),
        DeviceNode("/dev/nvidia-uvm", 508, 0),
        DeviceNode("/dev/nvidia-uvm-tools", 508, 1),
    )


def test_modeset_is_given_where_the_node_has_it(node: Path) -> None:
    write(node / "dev/nvidia-modeset")

    assert DeviceNode("/dev/nvidia-modeset", 195, 254) in host_of(node).common().nodes


def test_a_kernel_without_nvidia_uvm_is_refused_with_the_remedy(node: Path) -> None:
    write(node / "proc/devices", "Character devices:\n195 nvidia\n\nBlock devices:\n  8 nvidia-uvm\n")

    with pytest.raises(DeviceError, match=r"nvidia-uvm.*nvidia-modprobe"):
        host_of(node).common()


def test_a_whole_card_is_its_own_node(node: Path) -> None:
    assert host_of(node).nodes(3) == (DeviceNode("/dev/nvidia3", 195, 3),)


def test_two_partitions_of_one_card_share_its_node_and_have_capabilities_of_their_own(node: Path) -> None:
    host = host_of(node)

    one, two = host.nodes(1, gi=1, ci=0), host.nodes(1, gi=2, ci=0)

    assert one == (
        DeviceNode("/dev/nvidia1", 195, 1),
        DeviceNode("/dev/nvidia-caps/nvidia-cap147", 236, 147),
        DeviceNode("/dev/nvidia-caps/nvidia-cap148", 236, 148),
    )
    assert set(one) & set(two) == {DeviceNode("/dev/nvidia1", 195, 1)}


def test_a_partition_that_the_kernel_cannot_have_is_refused(node: Path) -> None:
    with pytest.raises(DeviceError, match="gpu1/gi99/access"):
        host_of(node).nodes(1, gi=99, ci=0)


# ---------------------------------------------------------------- links of device nodes

CAP = "nvidia-caps/nvidia-cap147"
NODES = {"nvidiactl": "195:255", "nvidia-uvm": "508:0", "nvidia-uvm-tools": "508:1", "nvidia-modeset": "195:254"}
NODES |= {"nvidia0": "195:0", "nvidia1": "195:1", CAP: "236:147"}


def a_node_with_devices(node: Path, *without: str) -> RealHost:
    """With all kinds of device nodes, a hook, and links for all nodes but these."""
    write(node / "root/usr/bin/nvidia-cdi-hook")
    write(node / "dev/char/1:3")
    for name, numbers in NODES.items():
        write(node / "dev" / name)
        link = node / "dev/char" / numbers
        link.symlink_to(f"../{name}" if name not in without else "../gone")
    return host_of(node)


@pytest.mark.parametrize("name", NODES)
def test_a_device_node_without_its_link_is_told_at_start(node: Path, name: str) -> None:
    """A link into nothing is none: runc asks whether the path exists."""
    (sentence,) = a_node_with_devices(node, name).advice()

    assert sentence.startswith(f"no link in /dev/char for /dev/{name}: ")
    assert "nvidia-ctk system create-dev-char-symlinks --create-all" in sentence


def test_the_sentence_about_links_names_three_and_counts_the_others(node: Path) -> None:
    (sentence,) = a_node_with_devices(node, *NODES).advice()

    assert "for /dev/nvidiactl, /dev/nvidia-uvm, /dev/nvidia-uvm-tools and 4 more: " in sentence


def test_where_all_links_are_there_nothing_is_told(node: Path) -> None:
    assert a_node_with_devices(node).advice() == ()


def test_other_devices_of_nvidia_need_no_link(node: Path) -> None:
    write(node / "root/usr/bin/nvidia-cdi-hook")
    for other in ("nvidia-nvswitchctl", "nvidia0.old", "nvidia-caps-imex-channels"):
        write(node / "dev" / other)

    assert host_of(node).advice() == ()


def test_cards_are_told_where_nvidia_uvm_is_not_loaded(node: Path) -> None:
    host = a_node_with_devices(node, "nvidia0")
    write(node / "proc/devices", "Character devices:\n195 nvidia\n236 nvidia-caps\n")

    (sentence,) = host.advice()

    assert "for /dev/nvidia0: " in sentence


# ---------------------------------------------------------------- boot and place


def test_the_boot_id_is_the_kernels(node: Path) -> None:
    assert host_of(node).boot_id() == "5f2b5f52-1111-4e1c-8d5b-000000000000"


def test_no_boot_id_is_an_error_not_an_empty_one(tmp_path: Path) -> None:
    hosts: list[Host] = [RealHost(proc=tmp_path), SimHost(tmp_path)]
    for host in hosts:
        with pytest.raises(StateError, match="boot id"):
            host.boot_id()


def test_a_card_is_located_by_the_first_folder_on_its_way_through_sysfs(node: Path) -> None:
    device = node / "sys/devices/pci0000:37/0000:37:01.0/0000:3b:00.0"
    write(device / "numa_node", "1\n")
    link = node / "sys/bus/pci/devices/0000:3b:00.0"
    link.parent.mkdir(parents=True)
    link.symlink_to("../../../devices/pci0000:37/0000:37:01.0/0000:3b:00.0")

    assert host_of(node).locate(CARD) == replace(CARD, numa_node=1, pcie_root="pci0000:37")


@pytest.mark.parametrize("way", ["devices/platform/0000:3b:00.0", "devices/pci0000:37/elsewhere", "bus"])
def test_a_way_that_is_not_one_of_pci_gives_no_root_and_minus_one_no_numa_node(node: Path, way: str) -> None:
    write(node / "sys" / way / "numa_node", "-1\n")
    link = node / "sys/bus/pci/devices/0000:3b:00.0"
    link.parent.mkdir(parents=True)
    link.symlink_to(node / "sys" / way)

    assert host_of(node).locate(CARD) == CARD


def test_a_card_that_sysfs_does_not_know_has_no_place(node: Path) -> None:
    assert host_of(node).locate(CARD) == CARD


# ---------------------------------------------------------------- the simulated node


def test_a_simulated_node_shows_a_container_what_it_was_given(tmp_path: Path) -> None:
    write(tmp_path / "boot_id", "boot-1\n")
    host = SimHost(tmp_path)

    names = [node.path for node in host.nodes(2, gi=7, ci=0)]

    assert host.boot_id() == "boot-1"
    assert names == ["/dev/gpuslice-sim2", "/dev/gpuslice-sim2-gi7", "/dev/gpuslice-sim2-gi7-ci0"]
    assert {(node.major, node.minor) for node in host.nodes(2, gi=7, ci=0)} == {(1, 3)}
    assert host.common().mounts == ()


def test_simulated_cards_have_places_like_real_ones(tmp_path: Path) -> None:
    assert SimHost(tmp_path).locate(CARD) == replace(CARD, numa_node=1, pcie_root="pci0000:3b")


# ---------------------------------------------------------------- whole files


@pytest.mark.contract(34)
@pytest.mark.parametrize(
    ("name", "hook", "given"),
    [
        ("cdi-card-and-partition-with-hook", True, [(0, None, None), (1, 1, 0)]),
        ("cdi-partitions-without-hook", False, [(1, 1, 0), (1, 2, 0)]),
    ],
)
def test_the_file_of_a_claim_is_the_golden_one(
    node: Path, name: str, hook: bool, given: list[tuple[int, int | None, int | None]]
) -> None:
    if hook:
        write(node / "root/usr/bin/nvidia-cdi-hook")
    host = host_of(node, host_root=Path("/run/nvidia/driver"))
    edits = [ContainerEdits(nodes=host.nodes(*numbers)) for numbers in given]
    devices = [CdiDevice(cdi.device_name(UID, index), edit) for index, edit in enumerate(edits)]

    body = cdi.spec(UID, "gpuslice.dev/claim", devices, host.common())

    assert faults(body) == []
    assert json.dumps(body, indent=1) + "\n" == (GOLDEN / f"{name}.json").read_text()


def test_the_file_of_a_simulated_claim_is_one_that_runtimes_accept(tmp_path: Path) -> None:
    host = SimHost(tmp_path)
    devices = [CdiDevice(cdi.device_name(UID, 0), ContainerEdits(nodes=host.nodes(0)))]

    assert faults(cdi.spec(UID, "gpuslice.dev/claim", devices, host.common())) == []


def test_a_hook_that_is_not_below_the_driver_root_is_refused(node: Path) -> None:
    write(node / "root/usr/bin/nvidia-cdi-hook")
    there, gone = Path("/run/nvidia/driver/usr/bin/nvidia-cdi-hook"), Path("/run/nvidia/driver/usr/bin/nvidia-hook")

    check_hook(there, node / "root", Path("/run/nvidia/driver"))

    with pytest.raises(
        DeviceError, match="--nvidia-cdi-hook-path is /run/nvidia/driver/usr/bin/nvidia-hook, and there is no"
    ):
        check_hook(gone, node / "root", Path("/run/nvidia/driver"))


def test_a_hook_that_is_gone_is_named_before_a_runtime_fails_with_it(node: Path) -> None:
    hook = node / "root/usr/bin/nvidia-cdi-hook"
    write(hook)
    host = host_of(node, host_root=Path("/run/nvidia/driver"), hook=Path("/run/nvidia/driver/usr/bin/nvidia-cdi-hook"))
    assert host.common().hooks

    hook.unlink()

    with pytest.raises(DeviceError, match="there is no such program"):
        host.common()


def test_a_hook_outside_of_the_driver_root_cannot_be_seen_and_is_taken(node: Path) -> None:
    check_hook(Path("/opt/toolkit/nvidia-cdi-hook"), node / "root", Path("/run/nvidia/driver"))
