"""The Python of the image, run on this machine without a container. It compiles and compresses.

So the byte-code fits the image, and the results do not depend on the Python and the zlib of this machine. Byte-code is the
same for every architecture.
"""

from __future__ import annotations

import io
import os
import platform
import subprocess
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hack.lib.image.errors import ImageError
from hack.lib.image.recipe import ARCHITECTURES, PYTHON
from hack.lib.image.tree import Entry, Tree, archive, followed

# Byte-code without the time of its source (PEP 552): the root is read-only, so Python need not compare them.
_COMPILE = """\
import importlib.util, io, sys, tarfile
from importlib._bootstrap_external import _code_to_hash_pyc
sources = tarfile.open(fileobj=sys.stdin.buffer, mode="r|")
with tarfile.open(fileobj=sys.stdout.buffer, mode="w|") as out:
    for member in sources:
        if member.isfile():
            source = sources.extractfile(member).read()
            code = compile(source, "/" + member.name, "exec", dont_inherit=True)
            content = _code_to_hash_pyc(code, importlib.util.source_hash(source), False)
            made = tarfile.TarInfo(importlib.util.cache_from_source(member.name))
            made.size = len(content)
            out.addfile(made, io.BytesIO(content))
"""
_COMPRESS = """\
import gzip, sys
sys.stdout.buffer.write(gzip.compress(sys.stdin.buffer.read(), 9, mtime=0))
"""


@dataclass(frozen=True, slots=True)
class Python:
    """An interpreter of the same release as in the image."""

    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)

    def compiled(self, tree: Tree) -> Tree:
        """The byte-code of all modules in the tree. ImageError if one does not compile."""
        found = {
            path: followed(tree, path) for path in tree if path.endswith(".py")
        }  # Python sees the name of a link, not of its target
        sources = {path: Entry(entry.content) for path, entry in found.items() if entry is not None}
        with tarfile.open(fileobj=io.BytesIO(self._run(_COMPILE, archive(sources, 0)))) as made:
            return {member.name: Entry(_content(made, member)) for member in made}

    def compressed(self, content: bytes) -> bytes:
        """The content in gzip's format, without a time."""
        return self._run(_COMPRESS, content)

    def _run(self, script: str, given: bytes) -> bytes:
        # The results must not depend on the order of hashes.
        environment = {"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1", **self.environment}
        done = subprocess.run(
            [*self.command, "-S", "-s", "-c", script], input=given, capture_output=True, env=environment, check=False
        )
        if done.returncode:
            last = (done.stderr.decode(errors="replace").strip().splitlines() or [f"status {done.returncode}"])[-1]
            raise ImageError(f"the image's Python failed: {last}; hack/image works on Linux, on amd64 and arm64")
        return done.stdout


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = tar.extractfile(member)
    assert stream is not None
    return stream.read()


def native() -> str:
    """The architecture of this machine, as OCI names it. ImageError if there is no image for it."""
    found = next((name for name, machine in ARCHITECTURES.items() if machine == platform.machine()), None)
    if found is None:
        raise ImageError(f"this machine is {platform.machine()}; make the image on one of {', '.join(ARCHITECTURES)}")
    return found


def unpacked(root: Path) -> Python:
    """The Python in `root`, from unpacked packages for this machine's architecture. It needs no privileges."""
    folder = root / f"usr/lib/{ARCHITECTURES[native()]}-linux-gnu"
    loader = next(folder.glob("ld-linux-*.so.*"), None)
    if loader is None:
        raise ImageError(f"{folder} has no loader of programs; check that the recipe has libc6")
    command = (str(loader), "--library-path", str(folder), str(root / f"usr/bin/python{PYTHON}"))
    return Python(command, {"PYTHONHOME": str(root / "usr"), "PATH": os.defpath})
