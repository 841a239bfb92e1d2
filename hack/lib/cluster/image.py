"""The one container image: busybox, and an `nvidia-smi` that prints what the driver added to the container.

The image has the names that deploy/examples use. So the examples run unchanged on a machine that can pull no image.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hack.lib.cluster.parts import PAUSE

# Full names, because the kubelet asks the runtime for full names.
NAMES = ("docker.io/library/ubuntu:24.04", "docker.io/library/busybox:latest", PAUSE)

_NVIDIA_SMI = b"""\
#!/bin/sh
echo "No NVIDIA program and no GPU here: a stand-in. The driver put into this container:"
env | grep -E '^(GPUSLICE|CUDA|NVIDIA)_' | sort
"""


def write(
    archive: Path, busybox: Path, links: list[str], programs: Sequence[str] = (), *, simulated: bool = True
) -> None:
    """Write an OCI archive for `ctr images import`. `programs`: programs of this machine; their libraries are added."""
    files = {f"usr/bin/{Path(program).name}": Path(program) for program in programs}
    files |= {str(path).lstrip("/"): path for program in programs for path in _libraries(program)}
    contents = {name: path.read_bytes() for name, path in files.items()} | {"bin/busybox": busybox.read_bytes()}
    if simulated:
        contents["usr/bin/nvidia-smi"] = _NVIDIA_SMI
    layer = _layer(contents, links)
    command = {"Env": ["PATH=/usr/bin:/bin"], "Cmd": ["sleep", "2147483647"]}
    rootfs = {"type": "layers", "diff_ids": [_digest(layer)]}
    config = json.dumps({"architecture": _architecture(), "os": "linux", "config": command, "rootfs": rootfs}).encode()
    oci = "application/vnd.oci.image"
    manifest = _json(
        schemaVersion=2,
        mediaType=f"{oci}.manifest.v1+json",
        config=_about(config, f"{oci}.config.v1+json"),
        layers=[_about(layer, f"{oci}.layer.v1.tar")],
    )
    named = [
        {**_about(manifest, f"{oci}.manifest.v1+json"), "annotations": {"io.containerd.image.name": name}}
        for name in NAMES
    ]
    with tarfile.open(archive, "w") as tar:
        _add(tar, "oci-layout", _json(imageLayoutVersion="1.0.0"))
        _add(tar, "index.json", _json(schemaVersion=2, manifests=named))
        for blob in (layer, config, manifest):
            _add(tar, f"blobs/sha256/{_digest(blob).removeprefix('sha256:')}", blob)


def _libraries(program: str) -> list[Path]:
    """The libraries that a program is linked with, the C library and the loader included, by the paths in the program.

    Format of ldd(1): "libc.so.6 => /lib/…/libc.so.6 (0x…)", and for the loader the path only.
    """
    listing = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout
    words = [word for line in listing.splitlines() for word in line.split() if word.startswith("/")]
    # NVIDIA's libraries in the container need these libraries too, and the program does not name them.
    folders = sorted({Path(word).parent for word in words if Path(word).name == "libc.so.6"})
    more = [
        folder / name for folder in folders for name in ("libdl.so.2", "libpthread.so.0", "librt.so.1", "libm.so.6")
    ]
    return [path for path in dict.fromkeys([*map(Path, words), *more]) if path.exists()]


def _layer(contents: Mapping[str, bytes], links: list[str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("bin", "usr", "usr/bin", "tmp", "etc", *_folders(contents)):
            folder = tarfile.TarInfo(name)
            folder.type, folder.mode = tarfile.DIRTYPE, 0o1777 if name == "tmp" else 0o755
            tar.addfile(folder)
        for name, content in contents.items():
            _add(tar, name, content, 0o755)
        for name in sorted({*links} - {"busybox"}):
            link = tarfile.TarInfo(f"bin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
    return buffer.getvalue()


def _folders(contents: Mapping[str, bytes]) -> list[str]:
    """The folders of these files that an image does not have yet, outer folders first."""
    parents = {str(parent) for name in contents for parent in Path(name).parents}
    return sorted(parents - {".", "bin", "usr", "usr/bin"})


def _architecture() -> str:
    """The architecture of this machine, as Go names it."""
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())


def _add(tar: tarfile.TarFile, name: str, content: bytes, mode: int = 0o644) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(content), mode
    tar.addfile(member, io.BytesIO(content))


def _json(**values: Any) -> bytes:
    return json.dumps(values).encode()


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _about(content: bytes, kind: str) -> dict[str, Any]:
    return {"mediaType": kind, "digest": _digest(content), "size": len(content)}
