"""The programs of a cluster, built from Go modules into a cache folder for each version."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hack.lib.cluster.errors import PlaygroundError
from hack.lib.cluster.versions import CNI, CNI_GO, CONTAINERD, HELM_GO, HELM_KUBE, HELMS, KUBE, TOOLKIT, module_file

_GIB = 1 << 30
_BUILD_GIB = 8  # sources, Go's build cache and programs; 6 were measured
_TOOLKIT_PROGRAMS = ("nvidia-cdi-hook", "nvidia-ctk")
_CNI_PROGRAMS = ("main/bridge", "ipam/host-local")
_CONTAINERD_PROGRAMS = ("containerd", "containerd-shim-runc-v2", "ctr")


def cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpuslice" / "cluster"


@dataclass(frozen=True, slots=True)
class Binaries:
    """The folders for the programs of one version."""

    version: str

    @property
    def folder(self) -> Path:
        return cache() / f"v{self.version}"

    @property
    def kube(self) -> Path:
        return self.folder / "kube"

    @property
    def runtime(self) -> Path:
        """Folder of containerd's programs."""
        return cache() / f"containerd-{CONTAINERD}"

    def missing(self) -> list[Path]:
        programs = [self.runtime / name for name in _CONTAINERD_PROGRAMS]
        return [path for path in (self.kube, *programs) if not path.exists()]

    def ensure(self) -> None:
        """Build the missing programs, with progress on standard error. PlaygroundError if that is not possible."""
        missing = self.missing()
        if not missing:
            return
        _check_go(f"Kubernetes {self.version}", _least_go(self.version))
        _check_room()
        if any(path.parent == self.runtime for path in missing):
            _say(
                f"building containerd {CONTAINERD} into {self.runtime}; this happens once and takes 2 minutes on two cores"
            )
            self._build_containerd()
        if self.kube in missing:
            _say(
                f"building Kubernetes {self.version} into {self.folder}; this happens once and takes 9 minutes on two cores"
            )
            self._build_kube()

    def _build_kube(self) -> None:
        modules = str(KUBE / module_file(self.version))
        major, minor, _ = self.version.split(".")
        package = "k8s.io/component-base/version"
        stamped = {"gitVersion": f"v{self.version}", "gitMajor": major, "gitMinor": minor, "gitTreeState": "clean"}
        # Clients read the version; our driver does too.
        flags = " ".join(["-s -w", *(f"-X {package}.{key}={value}" for key, value in stamped.items())])
        total = _count(["go", "list", "-deps", "-modfile", modules, "."], KUBE)
        with _built_into(self.folder) as made:
            command = ["go", "build", "-v", "-trimpath", "-mod=readonly", "-modfile", modules, "-ldflags", flags]
            _build([*command, "-o", str(made / "kube"), "."], KUBE, total)

    def _build_containerd(self) -> None:
        with _built_into(self.runtime) as made:
            programs = [f"github.com/containerd/containerd/v2/cmd/{name}@{CONTAINERD}" for name in _CONTAINERD_PROGRAMS]
            _build(
                ["go", "install", "-v", "-trimpath", "-ldflags", "-s -w", *programs], Path("/"), 1100, GOBIN=str(made)
            )


def helm(major: str = "3") -> Path:
    """The path of this release of Helm, also before it is built."""
    return cache() / f"helm-{HELMS[major]}" / "helm"


def cni() -> Path:
    """The folder of the plugins that connect pods, also before they are built."""
    return cache() / f"cni-{CNI}"


def missing_for_install() -> list[Path]:
    """What a cluster needs besides, if the driver is installed in pods."""
    programs = [helm(), *(cni() / name.rpartition("/")[2] for name in _CNI_PROGRAMS)]
    return [path for path in programs if not path.exists()]


def ensure_cni() -> None:
    """Build the missing CNI plugins. PlaygroundError if that is not possible."""
    if any(path.parent == cni() for path in missing_for_install()):
        _check_go(f"the CNI plugins {CNI}", CNI_GO)
        _check_room()
        _say(f"building the CNI plugins {CNI} into {cni()}; this happens once and takes half a minute on two cores")
        with _built_into(cni()) as made:
            programs = [f"github.com/containernetworking/plugins/plugins/{name}@{CNI}" for name in _CNI_PROGRAMS]
            command = ["go", "install", "-v", "-trimpath", "-ldflags", "-s -w", *programs]
            _build(command, Path("/"), 200, GOBIN=str(made))


def ensure_helm() -> None:
    """Build the missing releases of Helm. PlaygroundError if that is not possible."""
    for major, version in HELMS.items():
        if not helm(major).exists():
            _check_go(f"Helm {version}", HELM_GO)
            _check_room()
            _build_helm(major, version)


def _build_helm(major: str, version: str) -> None:
    folder, module = helm(major).parent, f"helm.sh/helm/v{major}"
    _say(f"building Helm {version} into {folder}; this happens once and takes a minute on two cores")
    stamped = {"internal/version.version": version}
    if major == "3":
        # As in Helm's Makefile. Without this, Helm renders for Kubernetes 1.20, and our chart refuses that.
        for package in ("chartutil", "lint/rules"):
            stamped |= {f"pkg/{package}.k8sVersionMajor": "1", f"pkg/{package}.k8sVersionMinor": HELM_KUBE}
    flags = " ".join(["-s -w", *(f"-X {module}/{key}={value}" for key, value in stamped.items())])
    with _built_into(folder) as made:
        command = ["go", "install", "-v", "-trimpath", "-ldflags", flags, f"{module}/cmd/helm@{version}"]
        _build(command, Path("/"), 800, GOBIN=str(made))


def toolkit() -> list[Path]:
    """NVIDIA's `nvidia-cdi-hook` and `nvidia-ctk`, for real cards. Missing ones are built (a minute)."""
    folder = cache() / f"toolkit-{TOOLKIT}"
    if missing := [name for name in _TOOLKIT_PROGRAMS if not (folder / name).exists()]:
        _check_room()
        _say(
            f"building {' and '.join(missing)} {TOOLKIT} into {folder}; this happens once and takes a minute on two cores"
        )
        with _built_into(folder) as made:
            programs = [
                f"github.com/NVIDIA/nvidia-container-toolkit/cmd/{name}@{TOOLKIT}" for name in _TOOLKIT_PROGRAMS
            ]
            # It finds NVML at run time. So the start must not bind symbols of a library that is not there yet.
            flags = "-s -w -extldflags=-Wl,-z,lazy"
            command = ["go", "install", "-v", "-trimpath", "-ldflags", flags, *programs]
            _build(command, Path("/"), 300, GOBIN=str(made), CGO_ENABLED="1", CGO_CFLAGS="-w")
    return [folder / name for name in _TOOLKIT_PROGRAMS]


@contextlib.contextmanager
def _built_into(folder: Path) -> Iterator[Path]:
    """A folder to build in, beside `folder`. If the build succeeds, its files are moved to `folder`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=folder.parent) as made:
        yield Path(made)
        folder.mkdir(exist_ok=True)
        for path in Path(made).iterdir():
            path.rename(folder / path.name)


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    # Go must not fetch another toolchain silently. Nothing needs the C compiler.
    return {**os.environ, "CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOFLAGS": "", "GOWORK": "off", **more}


def _count(command: Sequence[str], folder: Path) -> int:
    """An upper limit of the packages to compile. The first call fetches the sources."""
    _say("fetching the sources of Kubernetes and containerd")
    done = subprocess.run(command, cwd=folder, env=_environment({}), capture_output=True, text=True, check=False)
    if done.returncode:
        raise PlaygroundError(_reason("its sources cannot be fetched", done.stderr.splitlines()))
    return len(done.stdout.splitlines())


def _build(command: Sequence[str], folder: Path, total: int, **more: str) -> None:
    """Run a build that prints each package that it compiles."""
    lines: list[str] = []
    with subprocess.Popen(
        ["nice", *command], cwd=folder, env=_environment(more), stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                lines.append(line.rstrip())
                _progress(len(lines), total)
        except BaseException:
            process.terminate()
            raise
    if sys.stderr.isatty():
        print(file=sys.stderr)
    if process.returncode:
        raise PlaygroundError(_reason("the build failed", lines))


def _progress(done: int, total: int) -> None:
    """On a terminal one line that moves, otherwise one line per tenth. With a warm build cache it ends below the total."""
    if sys.stderr.isatty():
        print(f"\r  {done} of at most {total} packages", end="", file=sys.stderr, flush=True)
    elif done % max(1, total // 10) == 0:
        _say(f"  {done} of at most {total} packages")


def _reason(what: str, lines: Sequence[str]) -> str:
    reasons = [line for line in lines if line.startswith(("go: ", "#")) or ": " in line]
    last = reasons[-1] if reasons else "Go gave no reason"
    return f"{what}: {last}; check that Go's module proxy can be reached (go env GOPROXY) and try again"


def _least_go(version: str) -> tuple[int, int]:
    """The oldest release of Go that builds this Kubernetes."""
    found = re.search(r"^go (\d+)\.(\d+)", (KUBE / module_file(version)).read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]), int(found[2])


def _check_go(what: str, least: tuple[int, int]) -> None:
    words = f"building {what} needs Go {least[0]}.{least[1]} or later"
    if shutil.which("go") is None:
        raise PlaygroundError(f"{words}, but there is no go on PATH; install Go (go.dev/dl) or add it to PATH")
    done = subprocess.run(["go", "env", "GOVERSION"], env=_environment({}), capture_output=True, text=True, check=False)
    has = re.match(r"go(\d+)\.(\d+)", done.stdout)
    if has is None or (int(has[1]), int(has[2])) < least:
        raise PlaygroundError(
            f"{words}, but go on PATH is {done.stdout.strip() or 'broken'}; put a newer Go first on PATH"
        )


def _check_room() -> None:
    cache().mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache()).free / _GIB
    if free < _BUILD_GIB:
        raise PlaygroundError(
            f"a build needs {_BUILD_GIB} GiB of disk, but {cache()} has only {free:.1f} GiB; free some space, or set "
            "XDG_CACHE_HOME and "
            "GOCACHE to a larger disk"
        )


def _say(text: str) -> None:
    print(f"hack/cluster: {text}", file=sys.stderr, flush=True)
