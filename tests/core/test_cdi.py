from __future__ import annotations

import json
from typing import cast

import pytest
from gpuslice.core import cdi
from gpuslice.core.cdi import CdiDevice, ContainerEdits, DeviceNode, Hook, Mount
from gpuslice.core.model import DeviceRef, PoolName
from gpuslice.errors import ConfigError, StateError
from hypothesis import given
from hypothesis import strategies as st

from tests.kit.cdi_rules import Body, faults

UID = "0d9c2f7e-5a0b-4c53-9a39-6a0f6f0f9d11"
KIND = "gpuslice.dev/claim"
COMMON = ContainerEdits(
    nodes=(DeviceNode("/dev/nvidiactl", 195, 255), DeviceNode("/dev/nvidia-uvm", 508, 0)),
    mounts=(
        Mount("/run/nvidia/driver/usr/lib64/libcuda.so.580.65.06", "/usr/lib64/libcuda.so.580.65.06", ("ro", "rbind")),
        Mount("/run/nvidia/driver/usr/bin/nvidia-smi", "/usr/bin/nvidia-smi", ("ro", "rbind")),
    ),
    hooks=(
        Hook("createContainer", "/usr/bin/nvidia-cdi-hook", ("nvidia-cdi-hook", "create-symlinks")),
        Hook("createContainer", "/usr/bin/nvidia-cdi-hook", ("nvidia-cdi-hook", "update-ldcache")),
    ),
)


def a_card(index: int, env: dict[str, str] | None = None) -> CdiDevice:
    node = DeviceNode(f"/dev/nvidia{index}", 195, index)
    return CdiDevice(cdi.device_name(UID, index), ContainerEdits(nodes=(node,), env=env or {}))


def edits(body: Body, device: int = 0) -> dict[str, list[Body]]:
    devices = cast(list[dict[str, dict[str, list[Body]]]], body["devices"])
    return devices[device]["containerEdits"]


def test_a_runtime_accepts_the_file_of_a_claim() -> None:
    body = cdi.spec(UID, KIND, [a_card(0, {"GPUSLICE_GPU_UUID": "GPU-1"}), a_card(1)], COMMON)

    assert faults(body) == []


@pytest.mark.contract(34)
def test_names_of_file_and_devices_hold_the_claim_uid_and_differ() -> None:
    assert cdi.file_name(KIND, UID) == f"gpuslice.dev-claim_{UID}.json"
    assert cdi.qualified(KIND, cdi.device_name(UID, 1)) == f"gpuslice.dev/claim={UID}-1"
    assert cdi.device_name(UID, 0) != cdi.device_name(UID, 1)


def test_each_device_alone_is_enough() -> None:
    body = cdi.spec(UID, KIND, [a_card(0), a_card(1)], COMMON)

    for device in (0, 1):
        paths = [node["path"] for node in edits(body, device)["deviceNodes"]]
        assert paths == sorted([f"/dev/nvidia{device}", "/dev/nvidia-uvm", "/dev/nvidiactl"])
        assert len(edits(body, device)["mounts"]) == 2
        assert len(edits(body, device)["hooks"]) == 2


def test_the_legacy_hook_is_told_to_inject_nothing() -> None:
    body = cdi.spec(UID, KIND, [a_card(0)], ContainerEdits())

    assert cast(list[object], edits(body)["env"]) == ["NVIDIA_VISIBLE_DEVICES=void"]


def test_the_text_does_not_depend_on_the_order_of_the_edits() -> None:
    shuffled = ContainerEdits(nodes=COMMON.nodes[::-1], mounts=COMMON.mounts[::-1], hooks=COMMON.hooks)

    one = cdi.spec(UID, KIND, [a_card(0, {"B": "1", "A": "2"})], COMMON)
    two = cdi.spec(UID, KIND, [a_card(0, {"A": "2", "B": "1"})], shuffled)

    assert json.dumps(one) == json.dumps(two)


def test_hooks_keep_their_order_for_links_come_before_the_cache() -> None:
    hooks = edits(cdi.spec(UID, KIND, [a_card(0)], COMMON))["hooks"]

    assert [cast(list[str], hook["args"])[1] for hook in hooks] == ["create-symlinks", "update-ldcache"]


def test_a_node_of_the_host_under_another_name_is_written_with_its_host_path() -> None:
    node = DeviceNode("/dev/gpu", 1, 3, host_path="/dev/null", permissions="r")

    body = cdi.spec(UID, KIND, [CdiDevice(cdi.device_name(UID, 0), ContainerEdits(nodes=(node,)))], ContainerEdits())

    wanted = {"path": "/dev/gpu", "hostPath": "/dev/null", "type": "c", "major": 1, "minor": 3, "permissions": "r"}
    assert edits(body)["deviceNodes"] == [wanted]


def test_two_different_things_for_one_place_are_refused() -> None:
    clash = ContainerEdits(nodes=(DeviceNode("/dev/nvidiactl", 1, 3),))

    with pytest.raises(StateError, match="/dev/nvidiactl"):
        cdi.spec(UID, KIND, [CdiDevice(cdi.device_name(UID, 0), clash)], COMMON)


@pytest.mark.parametrize("env", [{"NVIDIA_VISIBLE_DEVICES": "all"}, {"A=B": "1"}, {"": "1"}])
def test_environment_that_contradicts_or_is_misspelt_is_refused(env: dict[str, str]) -> None:
    with pytest.raises(StateError, match="environment variable"):
        cdi.spec(UID, KIND, [a_card(0, env)], COMMON)


def test_device_names_of_another_claim_or_given_twice_are_refused() -> None:
    stranger = CdiDevice("another-claim-0", ContainerEdits())

    for devices in ([a_card(0), a_card(0)], [stranger], []):
        with pytest.raises(StateError, match=UID):
            cdi.spec(UID, KIND, devices, COMMON)


@pytest.mark.parametrize("driver_name", ["x", "", "4gpu.dev", "gpu_.", "gpu/slice", "gpu slice"])
def test_a_driver_name_that_cdi_forbids_stops_the_start(driver_name: str) -> None:
    with pytest.raises(ConfigError, match="CDI kind"):
        cdi.kind_of(driver_name)


@pytest.mark.parametrize("kind", ["gpuslice.dev/c", "gpuslice.dev/a.b", "gpuslice.dev/claim/x", "gpuslice.dev"])
def test_a_class_of_one_letter_or_with_a_dot_is_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match="CDI kind"):
        cdi.file_name(kind, UID)


@pytest.mark.parametrize("uid", ["", "../../etc", "a/b", ".hidden"])
def test_a_uid_never_leads_out_of_the_cdi_folder(uid: str) -> None:
    with pytest.raises(StateError, match="UID"):
        cdi.file_name(KIND, uid)


def test_a_program_is_told_its_budget_under_the_name_of_its_request() -> None:
    device = DeviceRef(PoolName("node-a/0000-3b-00-0"), "mig-1g-19-0")

    (label,) = cdi.labels(["small-gpu"])

    env = cdi.limit_env(label, device=device, uuid="MIG-1", enforcement="hardware", memory_mib=9856, profile="1g.10gb")

    assert env == {
        "GPUSLICE_SMALL_GPU_DEVICE": "node-a/0000-3b-00-0/mig-1g-19-0",
        "GPUSLICE_SMALL_GPU_UUID": "MIG-1",
        "GPUSLICE_SMALL_GPU_MEMORY_MIB": "9856",
        "GPUSLICE_SMALL_GPU_MEMORY_ENFORCEMENT": "hardware",
        "GPUSLICE_SMALL_GPU_PROFILE": "1g.10gb",
    }


def test_what_a_device_does_not_have_is_not_told() -> None:
    env = cdi.limit_env("GPU", device=DeviceRef(PoolName("p"), "monitor"), uuid="GPU-1", enforcement="none")

    assert env.keys() == {"GPUSLICE_GPU_DEVICE", "GPUSLICE_GPU_UUID", "GPUSLICE_GPU_MEMORY_ENFORCEMENT"}


@pytest.mark.contract(35)
def test_a_share_is_told_its_own_figures_and_by_what_means_they_hold() -> None:
    device = DeviceRef(PoolName("p"), "mps")

    env = cdi.limit_env("GPU", device=device, uuid="GPU-1", enforcement="mps", memory_mib=10240, percent=25)

    assert env["GPUSLICE_GPU_MEMORY_MIB"] == "10240"
    assert env["GPUSLICE_GPU_MEMORY_ENFORCEMENT"] == "mps"
    assert env["GPUSLICE_GPU_SM_PERCENT"] == "25"


def test_a_request_with_several_devices_is_numbered() -> None:
    assert cdi.labels(["gpu", "other", "gpu"]) == ("GPU_0", "OTHER", "GPU_1")


def test_a_request_that_is_named_like_a_number_of_another_keeps_its_name() -> None:
    assert cdi.labels(["gpu", "gpu", "gpu-0"]) == ("GPU_1", "GPU_2", "GPU_0")
    assert cdi.labels(["gpu-0", "gpu", "gpu"]) == ("GPU_0", "GPU_1", "GPU_2")


@given(st.lists(st.sampled_from(["a", "a-0", "a-1", "a-0-0", "b", "a.0", "A-0"]), max_size=12))
def test_labels_are_unique_and_the_same_each_time(requests: list[str]) -> None:
    labels = cdi.labels(requests)

    assert len(set(labels)) == len(requests)
    assert labels == cdi.labels(requests)


@given(st.lists(st.sampled_from(["gpu", "gpu-0", "gpu-device", "gpu-memory", "mib", "gpu-uuid"]), max_size=8))
def test_no_two_devices_of_a_claim_share_a_variable(requests: list[str]) -> None:
    ref = DeviceRef(PoolName("p"), "gpu")

    names = [
        name
        for label in cdi.labels(requests)
        for name in cdi.limit_env(
            label, device=ref, uuid="GPU-1", enforcement="mps", memory_mib=1, percent=1, profile="x"
        )
    ]

    assert len(set(names)) == len(names)
