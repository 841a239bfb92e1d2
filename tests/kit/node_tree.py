"""Trees of files like those of a node with the NVIDIA driver: its root, its procfs."""

from __future__ import annotations

from pathlib import Path

VERSION = "580.65.06"
DEBIAN, RHEL = "usr/lib/x86_64-linux-gnu", "usr/lib64"


def write(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def fill_driver_root(root: Path, folder: str = DEBIAN, version: str = VERSION) -> None:
    """Libraries, links, programs and firmware in the layout of NVIDIA's installer."""
    for name in ("cuda", "nvidia-ml", "nvidia-ptxjitcompiler", "nvidia-encode"):
        write(root / folder / f"lib{name}.so.{version}")
        (root / folder / f"lib{name}.so.1").symlink_to(f"lib{name}.so.{version}")
    (root / folder / "libcuda.so").symlink_to("libcuda.so.1")
    write(root / folder / f"vdpau/libvdpau_nvidia.so.{version}")
    write(root / folder / "libc.so.6")
    write(root / "usr/bin/nvidia-smi")
    write(root / "usr/bin/nvidia-cuda-mps-control")
    write(root / "usr/bin/bash")
    write(root / f"lib/firmware/nvidia/{version}/gsp_ga10x.bin")


def fill_proc(proc: Path, version: str = VERSION) -> None:
    write(proc / "sys/kernel/random/boot_id", "5f2b5f52-1111-4e1c-8d5b-000000000000\n")
    devices = "  1 mem\n195 nvidia\n236 nvidia-caps\n508 nvidia-uvm\n\nBlock devices:\n  8 nvidia-uvm\n"
    write(proc / "devices", f"Character devices:\n{devices}")
    module = f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {version}  Release Build\nGCC version: 12\n"
    write(proc / "driver/nvidia/version", module)
    caps = ["config 1", "monitor 2"]
    for gpu, base in ((0, 3), (1, 138)):
        for gi in range(15):
            caps.append(f"gpu{gpu}/gi{gi}/access {base + 9 * gi}")
            caps += [f"gpu{gpu}/gi{gi}/ci{ci}/access {base + 9 * gi + 1 + ci}" for ci in range(8)]
    write(proc / "driver/nvidia-caps/mig-minors", "\n".join(caps) + "\n")
