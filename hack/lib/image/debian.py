"""Debian packages: their files, their archives, and their newest versions.

Formats: deb(5), deb-control(5), and Debian's repository format (wiki.debian.org/DebianRepository/Format).
"""

from __future__ import annotations

import hashlib
import io
import lzma
import re
import shutil
import subprocess
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

from hack.lib.image.errors import ImageError
from hack.lib.image.recipe import ARCHITECTURES, NOT_TAKEN, PACKAGES, STATUS, SUITE, kept
from hack.lib.image.tree import Entry, Tree, link

ARCHIVES = {"debian": SUITE, "debian-security": f"{SUITE}-security"}  # name of an archive → its suite
KEYS = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_MERGED = ("bin", "lib", "lib32", "lib64", "sbin")  # links to usr/… in today's Debian, folders in packages
_TIMEOUT_S = 60


def files(name: str, package: bytes) -> Tree:
    """The files of one package that the image keeps, and the entry of the package in the list of packages."""
    parts = dict(_members(package))
    tree: Tree = {}
    with _tar(parts, "data") as tar:
        for member in tar:
            path = _merged(member.name.removeprefix("./"))
            if member.isdir() or not kept(name, path, is_link=member.issym()):
                continue
            if member.issym():
                tree[path] = link(member.linkname)
            elif stream := tar.extractfile(member):  # a hard link too
                tree[path] = Entry(stream.read(), member.mode & 0o755)
    with _tar(parts, "control") as tar:
        control = tar.extractfile("./control")
        assert control is not None
        tree[f"{STATUS}/{name}"] = Entry(control.read())
    return tree


def listed(name: str, tree: Tree) -> Entry:
    """The list of a package's files in the format of dpkg: MD5 sum and path."""
    sums = (
        f"{hashlib.md5(entry.content, usedforsecurity=False).hexdigest()}  {path}\n"
        for path, entry in sorted(tree.items())
        if entry.is_file and path != f"{STATUS}/{name}"
    )
    return Entry("".join(sums).encode())


def _members(package: bytes) -> Iterator[tuple[str, bytes]]:
    """The members of an ar(5) archive."""
    place = 8
    while place < len(package):
        header = package[place : place + 60]
        size = int(header[48:58])
        yield header[:16].decode().strip().rstrip("/"), package[place + 60 : place + 60 + size]
        place += 60 + size + size % 2


def _tar(parts: Mapping[str, bytes], name: str) -> tarfile.TarFile:
    found = next((content for part, content in parts.items() if part.startswith(f"{name}.tar")), None)
    if found is None:
        raise ImageError(f"a package has no {name}.tar, so it is no Debian package; get it again")
    return tarfile.open(fileobj=io.BytesIO(found))


def _merged(path: str) -> str:
    return f"usr/{path}" if path.partition("/")[0] in _MERGED else path


# ---------------------------------------------------------------- the mirror


def mirrors() -> dict[str, str]:
    """The address of each archive: the mirror of this machine's apt, or else deb.debian.org."""
    found = {name: f"http://deb.debian.org/{name}" for name in ARCHIVES}
    if shutil.which("apt-get"):
        command = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"]
        printed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        for address in (line.rstrip("/") for line in printed.splitlines() if line.startswith("http")):
            if (name := address.rpartition("/")[2]) in found:
                found[name] = address
    return found


def fetch(address: str) -> bytes:
    """The file at this address. ImageError if the server does not send it."""
    try:
        with urllib.request.urlopen(address, timeout=_TIMEOUT_S) as answer:
            content: bytes = answer.read()
            return content
    except (OSError, urllib.error.URLError) as e:
        raise ImageError(f"{address} cannot be read: {e}; check the network and apt's mirror") from e


# ---------------------------------------------------------------- the newest versions


def newest(architecture: str) -> list[dict[str, str]]:
    """The newest version of each package of the recipe: its control fields, and `Archive`.

    ImageError if a signature or a sum is wrong, if a package does not exist, or if the recipe lacks one that it needs.
    """
    found: dict[str, dict[str, str]] = {}
    addresses = mirrors()
    for archive, suite in ARCHIVES.items():
        for fields in _index(f"{addresses[archive]}/dists/{suite}", architecture):
            name = fields["Package"]
            if name in PACKAGES and (name not in found or _newer(fields["Version"], found[name]["Version"])):
                found[name] = {**fields, "Archive": archive}
    if missing := set(PACKAGES) - set(found):
        raise ImageError(
            f"Debian {SUITE} has no package {min(missing)} for {architecture}; correct PACKAGES in recipe.py"
        )
    check_dependencies(found)
    return [found[name] for name in PACKAGES]


def _index(address: str, architecture: str) -> Iterator[dict[str, str]]:
    release = _signed(fetch(f"{address}/InRelease"))
    place = f"main/binary-{architecture}/Packages.xz"
    sums = release.partition("\nSHA256:")[2]
    expected = re.search(rf"^ ([0-9a-f]{{64}}) +\d+ {re.escape(place)}$", sums, re.MULTILINE)
    packed = fetch(f"{address}/{place}")
    if expected is None or hashlib.sha256(packed).hexdigest() != expected[1]:
        raise ImageError(
            f"{address}/{place} has another sum than its signed list says; the mirror changes now: try again"
        )
    for paragraph in lzma.decompress(packed).decode().split("\n\n"):
        if paragraph.strip():
            yield dict(re.findall(r"^([\w-]+): (.*)$", paragraph, re.MULTILINE))


def _signed(text: bytes) -> str:
    """The signed text. ImageError if it has no valid signature of Debian."""
    if shutil.which("gpgv") is None or not KEYS.exists():
        raise ImageError(f"--update needs gpgv and {KEYS}; install gpgv and debian-archive-keyring")
    with tempfile.NamedTemporaryFile() as signed:
        signed.write(text)
        signed.flush()
        command = ["gpgv", "--quiet", "--keyring", str(KEYS), "--output", "-", signed.name]
        done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        raise ImageError("the mirror's list has no valid signature of Debian; use another mirror")
    return done.stdout.decode()


def _newer(one: str, other: str) -> bool:
    return subprocess.run(["dpkg", "--compare-versions", one, "gt", other], check=False).returncode == 0


def check_dependencies(found: Mapping[str, Mapping[str, str]]) -> None:
    """ImageError if a package needs another one that is neither in PACKAGES nor in NOT_TAKEN."""
    known = {*PACKAGES, *NOT_TAKEN}
    for name, fields in found.items():
        for need in filter(None, re.split(r", *", f"{fields.get('Pre-Depends', '')},{fields.get('Depends', '')}")):
            options = {re.split(r"[ :(]", option.strip())[0] for option in need.split("|")}
            if not options & known:
                raise ImageError(
                    f"{name} needs {need}, which the image would not have; add it to PACKAGES or to NOT_TAKEN in recipe.py"
                )


def architectures(fields: Mapping[str, str], architecture: str) -> list[str]:
    """The architectures of the image that this package is for."""
    return list(ARCHITECTURES) if fields["Architecture"] == "all" else [architecture]
