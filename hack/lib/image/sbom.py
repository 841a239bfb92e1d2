"""An SBOM of the image, from the package lists in the image itself. Its format is SPDX 2.3 (ISO/IEC 5962)."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os.path
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.message import Message
from email.parser import BytesParser
from urllib.parse import quote

from hack.lib.image.errors import ImageError
from hack.lib.image.recipe import SITE, STATUS, own_files
from hack.lib.image.tree import Entry
from hack.lib.image.wheels import sha256

_NONE = "NOASSERTION"
_EXPRESSION = re.compile(r"[\w.+() -]+")


@dataclass(frozen=True, slots=True)
class Component:
    """One package in the image, and its files."""

    name: str
    version: str
    purl: str
    licence: str
    files: tuple[str, ...]

    @property
    def identity(self) -> str:
        return f"SPDXRef-{re.sub('[^A-Za-z0-9.-]', '-', self.purl.partition('?')[0].removeprefix('pkg:'))}"


def components(tree: Mapping[str, Entry]) -> list[Component]:
    """Every package that a list in the image names. ImageError if no list has a file, or if a file differs from its list."""
    found = [*_debian(tree), *_python(tree)]
    listed = {path for component in found for path in component.files}
    ours = {path for path, entry in own_files().items() if entry.is_file}
    unknown = {path for path, entry in tree.items() if entry.is_file} - listed - ours
    if unknown:
        raise ImageError(f"no package brings {min(unknown)}; see that its package's list of files names it")
    return found


def document(tree: Mapping[str, Entry], name: str, epoch_s: int) -> bytes:
    """The SBOM of a tree: each package with its version, its address (purl) and its licence, if it declares one."""
    packages = [
        {
            "SPDXID": component.identity,
            "name": component.name,
            "versionInfo": component.version,
            "downloadLocation": _NONE,
            "filesAnalyzed": False,
            "licenseConcluded": _NONE,
            "licenseDeclared": component.licence,
            "copyrightText": _NONE,
            "externalRefs": [
                {"referenceCategory": "PACKAGE-MANAGER", "referenceType": "purl", "referenceLocator": component.purl}
            ],
        }
        for component in components(tree)
    ]
    body = {
        "spdxVersion": "SPDX-2.3",
        "dataLicense": "CC0-1.0",
        "SPDXID": "SPDXRef-DOCUMENT",
        "name": name,
        "documentNamespace": f"https://gpuslice.dev/sbom/{hashlib.sha256(json.dumps(packages).encode()).hexdigest()}",
        "creationInfo": {
            "created": datetime.fromtimestamp(epoch_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "creators": ["Tool: gpuslice-hack-image"],
        },
        "packages": packages,
        "relationships": [
            {
                "spdxElementId": "SPDXRef-DOCUMENT",
                "relationshipType": "DESCRIBES",
                "relatedSpdxElement": package["SPDXID"],
            }
            for package in packages
        ],
    }
    return json.dumps(body, indent=1).encode() + b"\n"


def _debian(tree: Mapping[str, Entry]) -> Iterator[Component]:
    for path in sorted(tree):
        if path.rpartition("/")[0] != STATUS or path.endswith(".md5sums"):
            continue
        fields = _fields(tree[path])
        rows = [line.split("  ", 1) for line in tree[f"{path}.md5sums"].content.decode().splitlines()]
        for digest, file in rows:
            _check(tree, file, hashlib.md5(_content(tree, file), usedforsecurity=False).hexdigest() == digest)
        name, version = fields["Package"], fields["Version"]
        purl = f"pkg:deb/debian/{quote(name)}@{quote(version)}?arch={fields['Architecture']}&distro=debian-12"
        files = (*(file for _, file in rows), path, f"{path}.md5sums")
        yield Component(name, version, purl, _NONE, files)


def _python(tree: Mapping[str, Entry]) -> Iterator[Component]:
    for path in sorted(tree):
        if not path.endswith(".dist-info/METADATA"):
            continue
        fields = _fields(tree[path])
        record = f"{path.rpartition('/')[0]}/RECORD"
        files = []
        for file, digest, _size in csv.reader(io.StringIO(tree[record].content.decode())):
            place = os.path.normpath(f"{SITE}/{file}")
            files.append(place)
            _check(tree, place, not digest or digest == sha256(_content(tree, place)))
        name, version = re.sub(r"[-_.]+", "-", fields["Name"]).lower(), fields["Version"]
        licence = fields.get("License-Expression", "")
        declared = licence if _EXPRESSION.fullmatch(licence) else _NONE
        yield Component(name, version, f"pkg:pypi/{quote(name)}@{quote(version)}", declared, tuple(files))


def _fields(entry: Entry) -> Message:
    return BytesParser().parsebytes(entry.content, headersonly=True)


def _content(tree: Mapping[str, Entry], path: str) -> bytes:
    return tree[path].content if path in tree else b""


def _check(tree: Mapping[str, Entry], path: str, equal: bool) -> None:
    if path not in tree or not equal:
        raise ImageError(f"{path} is not in the image as its package's list says; make the list after the files")
