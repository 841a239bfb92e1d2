"""The interfaces of hack/cluster, in a network of their own, so that nothing of them stays on this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from tests.kit.markdown import ROOT

_APART = ["unshare", "--net", "--mount", "--propagation", "private"]
_UP = "network.ensure(); network.ensure_bridge()"


def test_a_cluster_starts_although_a_killed_one_has_left_its_interfaces() -> None:
    programs = all(map(shutil.which, ("unshare", "busybox")))
    if os.geteuid() or not programs or subprocess.run([*_APART, "true"], check=False).returncode:
        pytest.skip("interfaces need root, CAP_SYS_ADMIN, unshare(1) and busybox")
    script = f"from hack.lib.cluster import network; {_UP}; {_UP}"
    command = 'mount -t sysfs sys /sys && exec "$@"'  # /sys/class/net of the new network

    done = subprocess.run(
        [*_APART, "sh", "-c", command, "sh", sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )

    assert done.returncode == 0, done.stderr
