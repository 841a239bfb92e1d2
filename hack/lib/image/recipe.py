"""The contents of the image: Debian packages, Python packages, our own files. `hack/image` and the Dockerfile both use it.

Debian bookworm, because the tests run with its Python 3.11. No Alpine, because protobuf has no wheel for musl, and NVML is
linked against glibc. NVIDIA's own libraries come from the node at run time (DRIVER_ROOT_CTR_PATH).
There is no shell, no package manager, no pip and no compiler, because the driver starts none of them.
"""

from __future__ import annotations

from fnmatch import fnmatch

from hack.lib.image.tree import Entry, Tree, folder, link

SUITE = "bookworm"
PYTHON = "3.11"
SITE = f"usr/local/lib/python{PYTHON}/dist-packages"
STATUS = "var/lib/dpkg/status.d"  # the list of packages for scanners, in an image without dpkg
SBOM = "usr/share/gpuslice/sbom.spdx.json"

# OCI's name of each architecture, and the names of Python's wheels and of Debian's folder for libraries.
ARCHITECTURES = {"amd64": "x86_64", "arm64": "aarch64"}

PACKAGES = (
    *("base-files", "netbase", "media-types"),
    *("libc6", "gcc-12-base", "libgcc-s1"),
    "libstdc++6",  # for grpc
    *(f"python{PYTHON}-minimal", f"libpython{PYTHON}-minimal", f"libpython{PYTHON}-stdlib"),
    *("libbz2-1.0", "libexpat1", "libffi8", "liblzma5", "libssl3", "libuuid1", "zlib1g"),
    "coreutils",  # only `env`, which starts the control program of MPS (gpuslice/mps/control.py)
)
# Dependencies of these packages that are not in the image, because the image leaves out the files that need them.
NOT_TAKEN = (
    *("libcrypt1", "libdb5.3", "libncursesw6", "libnsl2", "libreadline8", "libsqlite3-0", "libtinfo6", "libtirpc3"),
    *("libacl1", "libattr1", "libgmp10", "libselinux1"),  # for coreutils, but not for `env`
    *("awk", "dpkg", "debconf", "libcrypt1", "mime-support"),  # for installation scripts
)

# The image has only the named files of these packages, and no file of LEFT_OUT. Licences always stay.
_ONLY = {
    "base-files": ("etc/debian_version", "etc/os-release", "usr/lib/os-release", "usr/share/common-licenses/*"),
    "coreutils": ("usr/bin/env",),
}
_STDLIB = f"usr/lib/python{PYTHON}"
_DYNLOAD = f"{_STDLIB}/lib-dynload"
LEFT_OUT = (
    *(f"usr/share/{part}" for part in ("binfmts", "bug", "gcc", "gdb", "info", "lintian", "locale", "man", "pixmaps")),
    *("usr/share/applications", "usr/lib/binfmt.d", "usr/lib/*/gconv", "usr/lib/mime", "etc/init.d", "etc/python3*"),
    # Parts of Python: other programs, tests, and modules whose libraries are not in the image.
    *(
        f"{_STDLIB}/{part}"
        for part in ("ensurepip", "idlelib", "lib2to3", "pydoc_data", "tkinter", "turtle.py", "venv")
    ),
    *(f"{_STDLIB}/{part}" for part in ("config-*", "curses", "sqlite3", "sitecustomize.py", "EXTERNALLY-MANAGED")),
    *(f"{_DYNLOAD}/{part}" for part in ("_crypt.*", "_curses*", "_dbm.*", "_sqlite3.*", "nis.*", "readline.*")),
    *(f"{_DYNLOAD}/{part}" for part in ("_ctypes_test.*", "_test*", "_xx*", "ossaudiodev.*", "xxlimited*")),
)
_COPYRIGHT = "usr/share/doc/*/copyright"

# The plugin and the supervisor run as root, because only root may open the device nodes that make partitions, mount, and
# write below the kubelet's and the runtime's folders. All other commands (`gpuslice devices`) run as nobody too.
USER = "0:0"
ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin",
    "PYTHONUNBUFFERED": "1",
    "GRPC_VERBOSITY": "NONE",  # otherwise standard error has lines that are no log lines
}
ENTRYPOINT = ("python3", "-m", "gpuslice")
COMMAND = ("run",)

LIMIT_MB, LIMIT_COMPRESSED_MB = 160, 45  # MB of 1,000,000 bytes


def kept(package: str, path: str, *, is_link: bool = False) -> bool:
    """Whether the image has this file of a Debian package."""
    if path.startswith("usr/share/doc/"):
        return fnmatch(path, _COPYRIGHT) or (
            is_link and path.count("/") == 3
        )  # a link to the licence of another package
    if only := _ONLY.get(package):
        return any(fnmatch(path, pattern) for pattern in only)
    return not any(fnmatch(path, pattern) or fnmatch(path, f"{pattern}/*") for pattern in LEFT_OUT)


def own_files() -> Tree:
    """The files of no package. Mount points are not here: a container runtime makes them, also below a read-only root."""
    return {
        **{name: link(f"usr/{name}") for name in ("bin", "lib", "lib64", "sbin")},
        **{name: folder() for name in ("dev", "proc", "run", "sys", "usr/sbin", "usr/lib64")},
        "root": folder(0o700),
        "tmp": folder(0o1777),
        "var/run": link("/run"),
        "var/tmp": folder(0o1777),
        "etc/group": Entry(b"root:x:0:\nnogroup:x:65534:\n"),
        "etc/nsswitch.conf": Entry(b"passwd: files\ngroup: files\nhosts: files dns\n"),
        "etc/passwd": Entry(
            b"root:x:0:0:root:/root:/usr/sbin/nologin\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"
        ),
        "usr/bin/python3": link(f"python{PYTHON}"),
    }


def labels(version: str, description: str, licences: str) -> dict[str, str]:
    """The labels of the image, with the names of OCI's specification."""
    values = {"title": "gpuslice", "description": description, "version": version, "licenses": licences}
    return {f"org.opencontainers.image.{name}": value for name, value in values.items()}
