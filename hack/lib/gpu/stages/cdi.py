"""Compare our CDI file, file by file, with the output of NVIDIA's `nvidia-ctk cdi generate`."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

from hack.lib.gpu.results import Results
from hack.lib.gpu.stages.machine import Machine

FILE = "cdi.json"


def run(machine: Machine, results: Results) -> None:
    if machine.driver_root is None:
        results.leave_out("our CDI file names files that are there", "no NVIDIA driver here")
        return
    from gpuslice.system.host import RealHost

    root = machine.driver_root
    hook = machine.programs / "bin" / "nvidia-cdi-hook" if machine.programs else None
    common = RealHost(root, host_root=root, cdi_hook=hook).common()
    results.check("hooks of ours", True, "; ".join(" ".join(one.args[1:])[:120] for one in common.hooks))
    ours = {mount.container_path: mount.host_path for mount in common.mounts}
    missing = [path for path in ours.values() if not _exists(path)]
    results.check("our CDI file names files that are there", not missing, f"{len(ours)} mounts; missing: {missing}")
    tool = machine.programs / "bin" / "nvidia-ctk" if machine.programs else None
    if tool is None:
        results.leave_out(
            "it gives what NVIDIA's generator gives", "nvidia-ctk is not in this pack, or not unpacked yet"
        )
        return
    command = [str(tool), "cdi", "generate", "--format=json", "--driver-root", str(root), "--dev-root=/", "--output="]
    done = subprocess.run(command, env=machine.program_environment(), capture_output=True, text=True, check=False)
    (machine.out / FILE).write_text(
        json.dumps({"ours": ours, "theirs": done.stdout, "errors": done.stderr[-4000:]}, indent=1)
    )
    if done.returncode:
        results.check("nvidia-ctk cdi generate runs here", False, done.stderr[-500:])
        return
    _compare(ours, json.loads(done.stdout[done.stdout.index("{") :]), results)


def _compare(ours: Mapping[str, str], theirs: Mapping[str, Any], results: Results) -> None:
    mounts = {
        mount["containerPath"]: mount["hostPath"] for edits in _edits(theirs) for mount in edits.get("mounts") or ()
    }
    mine, other = set(map(_name, ours)), set(map(_name, mounts))
    results.check("every file that NVIDIA's generator mounts is mounted by ours", other <= mine, sorted(other - mine))
    results.check("ours mounts no file that NVIDIA's generator leaves out", mine <= other, sorted(mine - other))
    nodes = sorted({node["path"] for edits in _edits(theirs) for node in edits.get("deviceNodes") or ()})
    results.check("nodes of NVIDIA's generator", True, " ".join(nodes))
    hooks = [" ".join(hook["args"][1:])[:120] for edits in _edits(theirs) for hook in edits.get("hooks") or ()]
    results.check("hooks of NVIDIA's generator", True, "; ".join(hooks))
    paths = {_name(path): path for path in mounts}
    moved = sorted(f"{path} is {paths[_name(path)]} there" for path in ours if paths.get(_name(path), path) != path)
    results.check("files have the same paths in the container", not moved, moved[:12])


def _edits(spec: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield spec.get("containerEdits") or {}
    for device in spec.get("devices") or ():
        yield device.get("containerEdits") or {}


def _name(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def _exists(path: str) -> bool:
    from pathlib import Path

    return Path(path).exists()
