"""The machine and its permissions: kernel, namespaces, cgroups, device nodes, files of NVIDIA's driver."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from hack.lib.gpu import driver
from hack.lib.gpu.results import Results


@dataclass(frozen=True, slots=True)
class Machine:
    """Facts of the machine that `hack/gpu run` knows before a stage begins."""

    driver_root: Path | None  # None: there is no NVIDIA driver
    programs: Path | None  # None: not packed, or not unpacked yet
    out: Path

    @staticmethod
    def of_environment() -> Machine:
        root, programs = (os.environ.get(name) for name in ("GPU_DRIVER_ROOT", "GPU_PROGRAMS"))
        return Machine(Path(root) if root else None, Path(programs) if programs else None, Path(os.environ["GPU_OUT"]))

    def program_environment(self) -> dict[str, str]:
        """The environment of a CUDA program that runs outside of a container."""
        folders = [str(folder) for folder in driver.libraries(self.driver_root)] if self.driver_root else []
        path = ":".join([*folders, os.environ.get("LD_LIBRARY_PATH", "")]).strip(":")
        mine = {name: value for name, value in os.environ.items() if not name.startswith("CUDA_")}
        return {**mine, "LD_LIBRARY_PATH": path} if path else mine


def run(machine: Machine, results: Results) -> None:
    kernel = Path("/proc/version").read_text(encoding="utf-8").strip()
    results.check("the kernel is Linux, not gVisor", "gVisor" not in kernel and not _prints("dmesg", "gVisor"), kernel)
    results.check("we are root", os.geteuid() == 0, f"uid {os.geteuid()}")
    for flag, name in (("m", "mount"), ("n", "network"), ("p", "pid"), ("u", "uts"), ("i", "ipc"), ("C", "cgroup")):
        done = _sh(f"unshare -{flag} {'-f ' if flag == 'p' else ''}true")
        results.check(f"a {name} namespace can be made", done.returncode == 0, done.stderr)
    _cgroups(results)
    for what, command in _MOUNTS.items():
        done = _sh(f"unshare -m sh -ec '{command}'")
        results.check(f"{what} can be mounted", done.returncode == 0, done.stderr)
    routes = Path("/proc/net/route").read_text(encoding="utf-8")
    results.check("there is a default route", any(line.split()[1] == "0" * 8 for line in routes.splitlines()[1:]))
    nodes = sorted(str(path) for path in (*Path("/dev").glob("nvidia*"), *Path("/dev/nvidia-caps").glob("*")))
    results.check("there are device nodes of NVIDIA's", bool(nodes), " ".join(nodes))
    minors = Path("/proc/driver/nvidia-caps/mig-minors")
    results.check("the table of capabilities is there", minors.exists(), minors)
    _driver(machine, results)


_MOUNTS = {
    "tmpfs": "mount -t tmpfs none /mnt",
    "an overlay": "mount -t tmpfs none /mnt; mkdir /mnt/l /mnt/u /mnt/w /mnt/m; "
    "mount -t overlay -o lowerdir=/mnt/l,upperdir=/mnt/u,workdir=/mnt/w none /mnt/m",
    "a shared mount": "mount -t tmpfs none /mnt; mount --make-rshared /mnt",
    "cgroup v2": "mount -t cgroup2 none /mnt",
}


def _cgroups(results: Results) -> None:
    lines = Path("/proc/mounts").read_text(encoding="utf-8").splitlines()
    there = {line.split()[2] for line in lines if line.split()[1].startswith("/sys/fs/cgroup")}
    results.check("cgroup v2 is mounted at /sys/fs/cgroup", "cgroup2" in there and "cgroup" not in there, sorted(there))
    controllers = Path("/sys/fs/cgroup/cgroup.controllers")
    text = controllers.read_text(encoding="utf-8").strip() if controllers.exists() else "none at the root"
    results.check("its controllers are there", {"cpu", "memory", "pids"} <= set(text.split()), text)


def _driver(machine: Machine, results: Results) -> None:
    version = Path("/proc/driver/nvidia/version")
    results.check("NVIDIA's kernel module is loaded", version.exists(), _text(version))
    if machine.driver_root is None:
        results.leave_out("NVIDIA's files are there", "no libcuda.so.1 in the usual places nor known to the loader")
        return
    root = machine.driver_root
    found = sorted(path for path in root.glob("**/*nvidia-cuda-mps-*") if path.is_file())
    results.check("the MPS programs are among the driver's files", len(found) > 1, " ".join(map(str, found)))
    listing = _sh(
        f"ls -lR {root}/lib64 {root}/bin {root}/share 2>/dev/null | head -150; ldconfig -p | grep -E 'cuda|nvidia'"
    )
    (machine.out / "driver-files.txt").write_text(listing.stdout, encoding="utf-8")
    for path in sorted(Path("/proc/driver/nvidia").rglob("*")):
        if path.is_file():
            print(f"-- {path}\n{_text(path)}")
    done = _sh("nvidia-smi -q || LD_LIBRARY_PATH= nvidia-smi")
    results.check("nvidia-smi runs", done.returncode == 0, done.stderr)
    print(done.stdout)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError as e:
        return str(e)


def _prints(command: str, word: str) -> bool:
    return word in _sh(command).stdout


def _sh(command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False, timeout=10)
