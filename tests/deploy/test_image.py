"""The image. The Dockerfile agrees with the recipe of hack/image, and the real image starts (as root, with a network)."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import gpuslice
import pytest
from packaging.utils import canonicalize_name

from hack.lib.image import debian, lock, python, recipe, wheels
from hack.lib.image.__main__ import default_name
from hack.lib.image.errors import ImageError

ROOT = Path(__file__).parents[2]
PATH = "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


# ---------------------------------------------------------------- the Dockerfile


@cache
def instructions() -> list[tuple[str, str]]:
    """(instruction, argument) of each line of the Dockerfile."""
    text = re.sub(r"\\\n\s*", " ", DOCKERFILE)
    rows = [line.partition(" ") for line in text.splitlines() if line and not line.startswith("#")]
    return [(name, argument) for name, _, argument in rows]


def last(instruction: str) -> str:
    return [argument for name, argument in instructions() if name == instruction][-1]


def pairs(instruction: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in shlex.split(last(instruction)))


def test_the_dockerfile_takes_the_files_of_the_recipe_and_no_others() -> None:
    runs = [argument for name, argument in instructions() if name == "RUN"]

    assert runs[-1] == "python3 -m hack.lib.image --rootfs /rootfs"
    assert [argument for name, argument in instructions() if name == "FROM"][-1] == "scratch"
    assert [argument for name, argument in instructions() if name == "COPY"][-1] == "--from=build /rootfs /"


def test_the_dockerfile_has_the_settings_of_the_recipe() -> None:
    project = wheels.project()

    assert pairs("ENV") == recipe.ENVIRONMENT
    assert tuple(json.loads(last("ENTRYPOINT"))) == recipe.ENTRYPOINT
    assert tuple(json.loads(last("CMD"))) == recipe.COMMAND
    assert last("USER") == recipe.USER
    assert pairs("LABEL") == recipe.labels(gpuslice.__version__, project["description"], project["license"])


def test_the_dockerfile_starts_on_the_release_of_debian_that_the_image_has() -> None:
    assert instructions()[0] == ("FROM", f"debian:{recipe.SUITE}-slim AS build")


def test_the_context_of_the_dockerfile_has_all_that_its_command_reads() -> None:
    shown = [line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[0] == "!"]

    project = wheels.project()
    needed = {"driver", "hack/lib", "pyproject.toml", project["readme"], *project["license-files"]}
    assert needed == set(shown)


def test_the_default_name_is_the_one_of_the_chart() -> None:
    assert default_name() == f"docker.io/library/gpuslice:{gpuslice.__version__}"
    assert f"image: gpuslice:{gpuslice.__version__}" in (ROOT / "deploy/daemonset.yaml").read_text(encoding="utf-8")


# ---------------------------------------------------------------- the real image, of this machine's architecture


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    if os.geteuid():
        pytest.skip("the image is not started: chroot needs root")
    try:
        python.native()
    except ImageError as e:
        pytest.skip(f"the image is not started: {e}")
    root = tmp_path_factory.mktemp("image") / "root"
    command = [sys.executable, "-P", "-m", "hack.lib.image", "--rootfs", str(root)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=with_hack())
    if done.returncode:
        skip_without_network(tmp_path_factory.mktemp("probe"))
    assert done.returncode == 0, done.stderr
    yield root
    shutil.rmtree(root)


def skip_without_network(folder: Path) -> None:
    locked = lock.read()
    try:
        wheels.download([locked.builder], python.native(), folder, with_dependencies=False)
        for name, address in debian.mirrors().items():
            debian.fetch(f"{address}/dists/{debian.ARCHIVES[name]}/InRelease")
    except ImageError as e:
        pytest.skip(f"the image is not made: {e}")


def with_hack() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def inside(root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the image, with only the environment of the image."""
    whole = [shutil.which("chroot") or "/usr/sbin/chroot", str(root), *command]
    return subprocess.run(whole, capture_output=True, text=True, check=False, env=recipe.ENVIRONMENT)


def paths(root: Path) -> dict[str, Path]:
    found = (path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    return {str(path.relative_to(root)): path for path in found}


pytestmark = pytest.mark.timeout(400)  # the first run fetches the packages


def test_the_command_of_the_image_starts(root: Path) -> None:
    done = inside(root, *recipe.ENTRYPOINT, "--help")

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: gpuslice")
    assert inside(root, "gpuslice", "--version").stdout == f"gpuslice {gpuslice.__version__}\n"


def test_the_driver_with_simulated_cards_starts_as_far_as_its_node(root: Path) -> None:
    """Before this point it imports everything: grpc, the Kubernetes client, the simulator."""
    script = "import gpuslice.app, gpuslice.nvml.real, gpuslice.nvml.sim.nvml, gpuslice.plugin.server, gpuslice.kube"

    assert inside(root, "python3", "-c", script).stderr == ""
    done = inside(root, *recipe.ENTRYPOINT, "run", "--simulate", "h100x2")
    assert done.stderr == (
        "gpuslice: the name of the node is missing; use --node-name or NODE_NAME (in a pod: fieldRef spec.nodeName)\n"
    )


def read_only(root: Path, mounts: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`gpuslice` with these arguments as user 65534, as in a container with a read-only root."""
    script = (
        f"mount --bind $0 $0; mount -o remount,bind,ro $0; {mounts} exec chroot --userspec=65534:65534 $0 gpuslice $@"
    )
    command = ["unshare", "--mount", "sh", "-ec", script, str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=recipe.ENVIRONMENT | {"PATH": PATH})


def test_a_user_without_rights_sees_simulated_cards_under_a_read_only_root(root: Path) -> None:
    done = read_only(root, "mount -t tmpfs none $0/tmp;", "devices", "--simulate", "h100x2")

    assert done.stderr == ""
    assert done.stdout.count("H100") >= 2


def test_under_a_read_only_root_without_temporary_files_the_remedy_is_named(root: Path) -> None:
    done = read_only(root, "", "devices", "--simulate", "h100x2")

    assert done.stderr.endswith("need one; set TMPDIR to a writable folder\n")
    assert len(done.stderr.splitlines()) == 1


def test_nothing_is_compiled_at_a_start(root: Path) -> None:
    """`python -v` names the file of each module's code (docs.python.org/3.11/using/cmdline.html#cmdoption-v)."""
    done = inside(root, "python3", "-v", *recipe.ENTRYPOINT[1:], "devices", "--simulate", "h100x2")

    origins = re.findall(r"^# code object from '(.+)'$", done.stderr, re.MULTILINE)
    assert len(origins) > 100
    assert [path for path in origins if not path.endswith(".pyc")] == []


def test_logins_by_openid_connect_find_their_library(root: Path) -> None:
    """`gpuslice/client_library.py` imports it at the first such login."""
    done = inside(root, "python3", "-c", "import requests_oauthlib; requests_oauthlib.OAuth2Session()")

    assert done.stderr == ""


def test_the_program_that_starts_mps_is_there(root: Path) -> None:
    """`gpuslice/mps/control.py` runs `env NAME=VALUE PROGRAM`."""
    done = inside(
        root,
        "env",
        "CUDA_MPS_PIPE_DIRECTORY=/x",
        "python3",
        "-c",
        "import os; print(os.environ['CUDA_MPS_PIPE_DIRECTORY'])",
    )

    assert done.stdout == "/x\n"


def test_every_library_finds_the_libraries_that_it_needs(root: Path) -> None:
    loader = next(path for path in paths(root) if re.search(r"/ld-linux-[^/]+\.so\.\d$", path))
    libraries = [path for path in paths(root) if re.search(r"\.so(\.|$)", path) and path != loader]

    assert len(libraries) > 50
    for path in libraries:
        done = inside(root, f"/{loader}", "--list", f"/{path}")
        assert "not found" not in done.stdout + done.stderr, f"{path}: {done.stdout}{done.stderr}"


def test_every_module_has_its_byte_code(root: Path) -> None:
    modules = {str(path.relative_to(root)) for path in root.rglob("*.py")}  # links too

    compiled = {re.sub(r"__pycache__/(.+)\.cpython-\d+\.pyc$", r"\1.py", p) for p in paths(root) if p.endswith(".pyc")}
    assert compiled == modules


def test_there_is_no_shell_no_package_manager_and_no_compiler(root: Path) -> None:
    programs = {path.rpartition("/")[2] for path in paths(root) if re.match(r"usr/(local/)?s?bin/", path)}

    assert programs == {"env", "python3.11", "gpuslice"}
    modules = {
        path.name for folder in (recipe.SITE, f"usr/lib/python{recipe.PYTHON}") for path in (root / folder).iterdir()
    }
    assert not modules & {"aiohttp", "ensurepip", "pip", "setuptools", "wheel"}


def test_nothing_has_the_rights_of_its_owner(root: Path) -> None:
    assert not [path for path, place in paths(root).items() if place.stat().st_mode & 0o6022]


def test_the_sbom_names_what_the_lists_of_the_image_name(root: Path) -> None:
    body = json.loads((root / recipe.SBOM).read_text(encoding="utf-8"))

    named = {package["externalRefs"][0]["referenceLocator"].partition("?")[0] for package in body["packages"]}
    script = "import importlib.metadata as m; print(*(f'{d.name} {d.version}' for d in m.distributions()), sep=chr(10))"
    installed = inside(root, "python3", "-c", script).stdout.splitlines()
    lists = [path for path in (root / recipe.STATUS).iterdir() if path.suffix != ".md5sums"]
    assert len(named) == len(installed) + len(lists)
    assert {canonicalize_name(line.split()[0]) for line in installed} | {path.name for path in lists} == {
        package["name"] for package in body["packages"]
    }


def test_every_package_has_its_licence(root: Path) -> None:
    body = json.loads((root / recipe.SBOM).read_text(encoding="utf-8"))
    for package in body["packages"]:
        name, purl = package["name"], package["externalRefs"][0]["referenceLocator"]
        if purl.startswith("pkg:deb/"):
            assert inside(root, "python3", "-c", f"open('/usr/share/doc/{name}/copyright')").stderr == ""
        else:
            info = next(path for path in paths(root) if _is_of(path, name, package["versionInfo"]))
            assert "licen" in (root / info).read_text(encoding="utf-8").lower(), info


def _is_of(path: str, name: str, version: str) -> bool:
    folder = path.rpartition("/")[0].rpartition("/")[2].lower().replace("_", "-").replace(".", "-")
    return path.endswith("/METADATA") and folder == f"{name}-{version}-dist-info".replace(".", "-")


def test_the_image_is_small(root: Path) -> None:
    size_mb = sum(place.stat().st_size for place in paths(root).values()) / 1e6

    assert size_mb <= recipe.LIMIT_MB
