"""Python packages: wheels of the package index, and our own wheel."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Sequence
from configparser import ConfigParser
from pathlib import Path
from typing import Any

from hack.lib.image.errors import ImageError
from hack.lib.image.recipe import ARCHITECTURES, PYTHON, SITE
from hack.lib.image.tree import Entry, Tree
from hack.lib.unused import unused

REPOSITORY = Path(__file__).resolve().parents[3]
_MANYLINUX = ("manylinux2014", "manylinux_2_17", "manylinux_2_28")  # bookworm has glibc 2.36
_FOLDERS = {"purelib": SITE, "platlib": SITE}  # folders of `NAME.data` in a wheel


def files(wheel: bytes) -> Tree:
    """The files of a wheel that the image keeps, below the folder for Python packages."""
    tree: Tree = {}
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        for name in archive.namelist():
            if not name.endswith(("/", ".dist-info/RECORD")) and not unused(name):
                tree[_place(name)] = Entry(archive.read(name))
    return tree


def is_needed(wheel: bytes) -> bool:
    """Whether the image keeps more of this wheel than its description."""
    return any(".dist-info/" not in path for path in files(wheel))


def record(tree: Tree) -> tuple[str, Entry]:
    """The path and the content of RECORD, the list of a package's files with their sums."""
    info = next(path.rpartition("/")[0] for path in tree if path.endswith(".dist-info/METADATA"))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for path, entry in sorted(tree.items()):
        writer.writerow((os.path.relpath(path, SITE), sha256(entry.content), len(entry.content)))
    writer.writerow((f"{os.path.relpath(info, SITE)}/RECORD", "", ""))
    return f"{info}/RECORD", Entry(out.getvalue().encode())


def sha256(content: bytes) -> str:
    """A sum in the format of RECORD (packaging.python.org, "Recording installed projects")."""
    return f"sha256={base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b'=').decode()}"


def _place(name: str) -> str:
    if found := re.fullmatch(r"[^/]+\.data/(\w+)/(.+)", name):
        if found[1] not in _FOLDERS:
            raise ImageError(f"a wheel has {name}, and the image has no place for it; add it to wheels.py")
        return f"{_FOLDERS[found[1]]}/{found[2]}"
    return f"{SITE}/{name}"


def commands(tree: Tree) -> Tree:
    """The programs of a package, as pip writes them."""
    texts = [entry.content.decode() for path, entry in tree.items() if path.endswith(".dist-info/entry_points.txt")]
    parser = ConfigParser(delimiters=("=",))
    parser.read_string("".join(texts))
    section = parser["console_scripts"] if parser.has_section("console_scripts") else {}
    made: Tree = {}
    for name, target in section.items():
        module, _, function = target.partition(":")
        text = f"#!/usr/bin/python3\nimport sys\n\nfrom {module} import {function}\n\nsys.exit({function}())\n"
        made[f"usr/local/bin/{name}"] = Entry(text.encode(), 0o755)
    return made


# ---------------------------------------------------------------- pip


def project() -> dict[str, Any]:
    """The section `project` of pyproject.toml."""
    return dict(_pyproject()["project"])


def builder() -> list[str]:
    """The packages that build our wheel, as pyproject.toml requires them."""
    return list(_pyproject()["build-system"]["requires"])


def _pyproject() -> dict[str, Any]:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))


def download(requirements: Sequence[str], architecture: str, folder: Path, *, with_dependencies: bool) -> list[Path]:
    """Wheels for the image's Python, from the package index. ImageError if pip refuses."""
    machine = ARCHITECTURES[architecture]
    _pip(
        *("download", "--quiet", "--dest", str(folder), "--python-version", PYTHON, "--only-binary", ":all:"),
        *(word for tag in _MANYLINUX for word in ("--platform", f"{tag}_{machine}")),
        *(() if with_dependencies else ("--no-deps",)),
        *requirements,
    )
    return sorted(folder.glob("*.whl"))


def own(folder: Path, builder: str, epoch_s: int) -> bytes:
    """Our own wheel, built from this work tree. `builder` is a requirement with one version: hatchling==1.27.0."""
    folder.mkdir(parents=True, exist_ok=True)
    constraint = folder / "builder.txt"
    constraint.write_text(f"{builder}\n", encoding="utf-8")
    at = str(max(epoch_s, 315532800))  # a wheel is a zip file, and zip has no time before 1980
    _pip(
        *("wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(REPOSITORY)),
        PIP_CONSTRAINT=str(constraint),
        SOURCE_DATE_EPOCH=at,
    )
    found = sorted(folder.glob("gpuslice-*.whl"))
    if len(found) != 1:
        raise ImageError(f"pip made {len(found)} wheels of this project; check that `pip wheel .` makes one")
    return found[0].read_bytes()


def _pip(command: str, *arguments: str, **more: str) -> None:
    # Wheels of a local folder have other sums than those of the index.
    environment = {name: value for name, value in os.environ.items() if name != "PIP_FIND_LINKS"}
    whole = [sys.executable, "-m", "pip", "--disable-pip-version-check", command, *arguments]
    done = subprocess.run(whole, capture_output=True, text=True, check=False, env={**environment, **more})
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ImageError(f"pip {command} failed: {last}; check that the package index can be reached")
