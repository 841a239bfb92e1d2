"""Fetches the files for the image once, into a cache. Looks up new versions for a new lock."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from hack.lib.image import debian, lock, wheels
from hack.lib.image.errors import ImageError
from hack.lib.image.lock import Item, Lock
from hack.lib.image.recipe import ARCHITECTURES

Say = Callable[[str], None]
_SNAPSHOT = "http://snapshot.debian.org/archive"  # keeps the versions that mirrors drop


def cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpuslice" / "image"


def read(item: Item) -> bytes:
    """A file of the cache. ImageError if it differs from the lock."""
    return item.check((cache() / item.sha256).read_bytes())


def ensure(locked: Lock, architectures: Iterable[str], say: Say) -> None:
    """Fetch the files that the cache does not have. ImageError if a file is not available or has a wrong sum."""
    for architecture in architectures:
        if packages := lock.missing(cache(), [*locked.of(architecture, "deb")]):
            say(f"fetching {len(packages)} packages of Debian for {architecture}")
            addresses = debian.mirrors()
            for item in packages:
                lock.store(cache(), item, _package(item, addresses, locked.made))
        if needed := lock.missing(cache(), [*locked.of(architecture, "wheel")]):
            say(f"fetching {len(needed)} Python packages for {architecture}")
            _fetch_wheels(needed, architecture)


def _package(item: Item, addresses: dict[str, str], made: str) -> bytes:
    archive, _, path = item.place.partition("/")
    try:
        return debian.fetch(f"{addresses[archive]}/{path}")
    except ImageError as first:
        try:
            return debian.fetch(f"{_SNAPSHOT}/{archive}/{made}/{path}")
        except ImageError:
            raise ImageError(
                f"{first}; Debian drops older versions: hack/image --update takes the present ones"
            ) from first


def _fetch_wheels(items: list[Item], architecture: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        names = [f"{item.name}=={item.version}" for item in items]
        found = {
            path.name: path for path in wheels.download(names, architecture, Path(folder), with_dependencies=False)
        }
        for item in items:
            if item.file not in found:
                raise ImageError(f"the package index has no {item.file}; renew the lock with hack/image --update")
            lock.store(cache(), item, found[item.file].read_bytes())


# ---------------------------------------------------------------- a new lock


def update(say: Say) -> Lock:
    """The newest versions that the recipe and pyproject.toml allow. Their files go into the cache."""
    made = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    found: dict[tuple[str, str], Item] = {}
    for architecture in ARCHITECTURES:
        say(f"looking up the packages of Debian for {architecture}")
        for fields in debian.newest(architecture):
            place = f"{fields['Archive']}/{fields['Filename']}"
            item = Item("deb", fields["Package"], fields["Version"], (architecture,), place, fields["SHA256"])
            _add(found, item)
        say(f"looking up Python packages for {architecture}")
        for item in _wheels(architecture):
            _add(found, item)
    return Lock(made, _builder(), tuple(sorted(found.values())))


def _add(found: dict[tuple[str, str], Item], item: Item) -> None:
    """Add an item. A file for several architectures becomes one item."""
    key = item.place, item.sha256
    before = found[key].architectures if key in found else ()
    both = tuple(dict.fromkeys((*before, *item.architectures)))
    found[key] = Item(item.kind, item.name, item.version, both, item.place, item.sha256)


def _wheels(architecture: str) -> list[Item]:
    requirements: list[str] = wheels.project()["dependencies"]
    with tempfile.TemporaryDirectory() as folder:
        paths = wheels.download(requirements, architecture, Path(folder), with_dependencies=True)
        contents = {path.name: path.read_bytes() for path in paths}
    items = [_locked(name, content, architecture) for name, content in contents.items() if wheels.is_needed(content)]
    for item in items:
        lock.store(cache(), item, contents[item.file])
    return items


def _locked(file: str, content: bytes, architecture: str) -> Item:
    name, version = file.split("-")[:2]
    return Item("wheel", name, version, (architecture,), file, lock.digest(content))


def _builder() -> str:
    """The newest version of the package that builds our wheel, as a requirement."""
    with tempfile.TemporaryDirectory() as folder:
        paths = wheels.download(wheels.builder(), next(iter(ARCHITECTURES)), Path(folder), with_dependencies=False)
        return "==".join(paths[0].name.split("-")[:2])
