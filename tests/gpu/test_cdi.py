"""What a container would be given on this machine: everything named is there."""

from __future__ import annotations

import os
from pathlib import Path

from gpuslice.nvml.api import Nvml
from gpuslice.system.host import RealHost

from tests.gpu.conftest import driver_root


def test_every_real_file_of_the_driver_that_a_container_gets_is_there(real: Nvml) -> None:
    common = RealHost(driver_root()).common()

    assert any("libcuda.so" in mount.container_path for mount in common.mounts)
    assert [mount.host_path for mount in common.mounts if not Path(mount.host_path).exists()] == []
    assert [hook.path for hook in common.hooks if not Path(hook.path).exists()] == []


def test_every_device_node_of_a_real_card_has_the_numbers_that_the_kernel_gave_it(real: Nvml) -> None:
    host = RealHost(driver_root())
    for gpu in real.gpus():
        for node in (*host.common().nodes, *host.nodes(real.minor(gpu.uuid))):
            there = Path(node.path)
            if there.exists():
                numbers = there.stat().st_rdev
                assert (node.major, node.minor) == (os.major(numbers), os.minor(numbers))


def test_a_real_card_is_where_the_kernel_says_it_is(real: Nvml) -> None:
    for gpu in real.gpus():
        located = RealHost(driver_root()).locate(gpu)
        assert Path(f"/sys/bus/pci/devices/{gpu.bus_id}").exists() == (located.pcie_root is not None)
