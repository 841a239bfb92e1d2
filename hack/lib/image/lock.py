"""The versions in the image: hack/lib/image/lock.json, with the SHA-256 sum of each file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hack.lib.image.errors import ImageError

LOCK = Path(__file__).parent / "lock.json"
_REMEDY = "renew it with hack/image --update"


@dataclass(frozen=True, slots=True, order=True)
class Item:
    """One file for the image."""

    kind: str  # "deb" or "wheel"
    name: str
    version: str
    architectures: tuple[str, ...]
    place: str  # for a Debian package its archive and the path there; for a wheel its name
    sha256: str

    @property
    def file(self) -> str:
        return self.place.rpartition("/")[2]

    def check(self, content: bytes) -> bytes:
        """`content`, or ImageError if it is not what the lock names."""
        found = digest(content)
        if found != self.sha256:
            raise ImageError(
                f"{self.file} has the SHA-256 sum {found}, but the lock says {self.sha256}; do not use this file: get it "
                "from another mirror, or, if it changed for a good reason, renew the lock with hack/image --update"
            )
        return content


@dataclass(frozen=True, slots=True)
class Lock:
    """The locked versions.

    `made`: the time of the lookup (20261130T000000Z), which is also an address of snapshot.debian.org.
    `builder`: the requirement for the package that builds our wheel.
    """

    made: str
    builder: str
    items: tuple[Item, ...]

    def of(self, architecture: str, kind: str) -> Iterator[Item]:
        return (item for item in self.items if item.kind == kind and architecture in item.architectures)

    def text(self) -> str:
        rows = ",\n".join(f"  {json.dumps(asdict(item))}" for item in sorted(self.items))
        return f'{{"made": "{self.made}", "builder": "{self.builder}", "items": [\n{rows}\n]}}\n'


def digest(content: bytes) -> str:
    """The SHA-256 sum, in the format of the lock."""
    return hashlib.sha256(content).hexdigest()


def read(path: Path = LOCK) -> Lock:
    """The lock in this file. ImageError if the file is missing or is no lock."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        items = [Item(**{**row, "architectures": tuple(row["architectures"])}) for row in body["items"]]
        return Lock(body["made"], body["builder"], tuple(sorted(items)))
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ImageError(f"{path} is no lock file: {e}; {_REMEDY}") from e


def missing(folder: Path, items: Sequence[Item]) -> list[Item]:
    """The items that the cache in `folder` does not have yet."""
    return [item for item in items if not (folder / item.sha256).is_file()]


def store(folder: Path, item: Item, content: bytes) -> None:
    """Put a checked file into the cache, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{item.sha256}-{os.getpid()}"
    part.write_bytes(item.check(content))
    part.rename(folder / item.sha256)
