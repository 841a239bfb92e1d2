"""`hack/image`: the image of the driver, without Docker. See docs/development.md."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from hack.lib.image import assembly, lock, python, recipe, sources, tree, wheels
from hack.lib.image.assembly import Layer
from hack.lib.image.errors import ImageError
from hack.lib.image.lock import Lock
from hack.lib.image.oci import Layout, Packed
from hack.lib.image.python import Python
from hack.lib.signals import interrupt_on

_ABOUT = """\
Make the image of the driver for amd64 and arm64 from the versions in hack/lib/image/lock.json. The same lock and the same
work tree always make the same digest. SOURCE_DATE_EPOCH sets the time of all files (default: 0).

  hack/image                     write build/image/oci (a folder) and build/image/gpuslice.tar (for ctr images import)
  hack/image --update            look up the newest versions and write the lock again
  hack/image --rootfs FOLDER     unpack the files of one architecture only, as the Dockerfile does
"""
_MB = 1e6


def main(arguments: Sequence[str]) -> None:
    asked = parser().parse_args(arguments)
    epoch_s, name = _epoch_s(), _checked(asked.name or default_name())
    if asked.update:
        locked = sources.update(_say)
        lock.LOCK.write_text(locked.text(), encoding="utf-8")
        _say(f"{lock.LOCK.relative_to(wheels.REPOSITORY)} has {len(locked.items)} files; now make the image again")
        return
    locked = lock.read()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        if asked.rootfs:
            _check_empty(asked.rootfs)
            only = (asked.architecture or [python.native()])[0]
            for layer in _images(locked, [only], folder, epoch_s)[only]:
                tree.write(layer.tree, asked.rootfs)
            return
        wanted = list(dict.fromkeys(asked.architecture or recipe.ARCHITECTURES))
        begun = time.monotonic()
        images = _images(locked, wanted, folder, epoch_s)
        digest = _write(images, asked.out, name, _interpreter(locked, folder), epoch_s)
    _say(f"{asked.out} is ready, {time.monotonic() - begun:.0f} s")
    print(digest)


def _images(locked: Lock, wanted: Sequence[str], work: Path, epoch_s: int) -> dict[str, list[Layer]]:
    """The layers of each architecture."""
    sources.ensure(locked, dict.fromkeys((python.native(), *wanted)), _say)
    interpreter = _interpreter(locked, work)
    own = wheels.own(work / "own", locked.builder, epoch_s)
    made = {}
    for architecture in wanted:
        _say(f"assembling {architecture}")
        packages = assembly.debian_files(locked.of(architecture, "deb"), sources.read)
        dependencies = [sources.read(item) for item in locked.of(architecture, "wheel")]
        name = f"gpuslice-{version()}-{architecture}"
        made[architecture] = assembly.layers(packages, dependencies, own, interpreter, name, epoch_s)
    return made


def _interpreter(locked: Lock, work: Path) -> Python:
    root = work / "python"
    if not root.exists():
        for part in assembly.debian_files(locked.of(python.native(), "deb"), sources.read).values():
            tree.write(part, root)
    return python.unpacked(root)


def _write(images: dict[str, list[Layer]], out: Path, name: str, interpreter: Python, epoch_s: int) -> str:
    project = wheels.project()
    labels = recipe.labels(version(), project["description"], project["license"])
    layout, manifests = Layout(), []
    for architecture, layers in images.items():
        archives = [tree.archive(layer.tree, epoch_s) for layer in layers]
        packed = [Packed(archive, interpreter.compressed(archive)) for archive in archives]
        manifests.append(layout.add_image(architecture, packed, labels, epoch_s))
        _show(architecture, layers, packed)
        out.mkdir(parents=True, exist_ok=True)
        (out / f"sbom-{architecture}.spdx.json").write_bytes(layers[-1].tree[recipe.SBOM].content)
    digest = layout.finish(name, manifests)
    layout.write(out / "oci")
    layout.write_archive(out / "gpuslice.tar", epoch_s)
    return digest


def _show(architecture: str, layers: Sequence[Layer], packed: Sequence[Packed]) -> None:
    """Print the size of each part, large ones first, in MB of 1,000,000 bytes. ImageError if the whole is too large."""
    for layer, pack in zip(layers, packed, strict=True):
        _row(architecture, layer.name, tree.size(layer.tree), f"{len(pack.compressed) / _MB:.1f} MB compressed")
        for part, size in sorted(layer.parts.items(), key=lambda item: -item[1]):
            _row("", f"  {part}", size, "")
    whole, compressed = sum(tree.size(layer.tree) for layer in layers), sum(len(pack.compressed) for pack in packed)
    _row(architecture, "all", whole, f"{compressed / _MB:.1f} MB compressed")
    check_size(architecture, whole / _MB, compressed / _MB)


def check_size(architecture: str, size_mb: float, compressed_mb: float) -> None:
    """ImageError if the image is larger than we promise, compressed or on the disk of a node."""
    if size_mb > recipe.LIMIT_MB or compressed_mb > recipe.LIMIT_COMPRESSED_MB:
        raise ImageError(
            f"the image for {architecture} has {size_mb:.1f} MB, compressed {compressed_mb:.1f} MB, more than the limits of "
            f"{recipe.LIMIT_MB} and {recipe.LIMIT_COMPRESSED_MB} MB; leave more out in recipe.py"
        )


def _row(architecture: str, part: str, size: int, more: str) -> None:
    print(f"{architecture:6} {part:32} {size / _MB:7.1f} MB  {more}".rstrip(), file=sys.stderr)


def version() -> str:
    """The version of the driver, as in its package."""
    text = (wheels.REPOSITORY / "driver/gpuslice/__init__.py").read_text(encoding="utf-8")
    return text.partition('__version__ = "')[2].partition('"')[0]


def default_name() -> str:
    """The full name of the image in the chart's default values. The runtime asks for the image by this name."""
    return f"docker.io/library/gpuslice:{version()}"


def _checked(name: str) -> str:
    """The same name. ImageError for a short name: the runtime asks for the full name, and the archive has it as given."""
    if not re.fullmatch(r"[a-z0-9.:-]+(/[a-z0-9._-]+)+:[\w.-]+", name):
        raise ImageError(f"{name!r} is no full name of an image; write registry, path and tag: {default_name()}")
    return name


def _epoch_s() -> int:
    text = os.environ.get("SOURCE_DATE_EPOCH", "0")
    if not text.isdecimal():
        raise ImageError(f"SOURCE_DATE_EPOCH is {text!r}; it must be a number of seconds")
    return int(text)


def _check_empty(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise ImageError(f"{folder} is not empty; name a new folder with --rootfs")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hack/image", description=_ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("build/image"),
        metavar="FOLDER",
        help="folder for the image; default: %(default)s",
    )
    parser.add_argument(
        "--architecture",
        action="append",
        choices=recipe.ARCHITECTURES,
        help="make the image for this one only; repeatable; default: all",
    )
    parser.add_argument("--name", metavar="IMAGE", help=f"full name of the image; default: {default_name()}")
    parser.add_argument("--update", action="store_true", help="write the lock again, with the newest versions")
    parser.add_argument("--rootfs", type=Path, metavar="FOLDER", help="unpack the files into a new folder, and no more")
    return parser


def _say(text: str) -> None:
    print(f"hack/image: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    interrupt_on(signal.SIGTERM)
    try:
        main(sys.argv[1:])
    except ImageError as e:
        _say(str(e))
        sys.exit(1)
    except KeyboardInterrupt:
        _say("stopped")
        sys.exit(130)
