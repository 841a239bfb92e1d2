"""Makes the layers of one image from the locked files and our wheel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from hack.lib.image import debian, sbom, wheels
from hack.lib.image.lock import Item
from hack.lib.image.python import Python
from hack.lib.image.recipe import SBOM, STATUS, own_files
from hack.lib.image.tree import Entry, Tree, size

Read = Callable[[Item], bytes]


@dataclass(frozen=True, slots=True)
class Layer:
    """A part of the image that a node fetches by itself. `parts`: the unpacked bytes of each package in it."""

    name: str
    tree: Tree
    parts: Mapping[str, int]


def debian_files(items: Iterable[Item], read: Read) -> dict[str, Tree]:
    """The files of each Debian package, without byte-code."""
    return {item.name: debian.files(item.name, read(item)) for item in items}


def layers(
    packages: Mapping[str, Tree], dependencies: Sequence[bytes], own: bytes, python: Python, name: str, epoch_s: int
) -> list[Layer]:
    """Three layers: Debian and Python, the dependencies of the driver, the driver. The last one changes most often.

    ImageError if a module does not compile, or if a file is in no package's list.
    """
    base = _debian_layer(packages, python)
    more = _python_layer("dependencies", [wheels.files(wheel) for wheel in dependencies], python)
    ours = wheels.files(own)
    driver = _python_layer("driver", [{**ours, **wheels.commands(ours)}], python)  # nothing calls other commands
    whole = {**base.tree, **more.tree, **driver.tree}
    driver.tree[SBOM] = Entry(sbom.document(whole, name, epoch_s))
    return [base, more, driver]


def _debian_layer(packages: Mapping[str, Tree], python: Python) -> Layer:
    made = _compiled(packages, python)
    for name, tree in made.items():
        tree[f"{STATUS}/{name}.md5sums"] = debian.listed(name, tree)
    return _layer("debian", made, own_files())


def _python_layer(name: str, trees: Sequence[Tree], python: Python) -> Layer:
    named = {wheels.record(tree)[0].split("/")[-2].removesuffix(".dist-info"): tree for tree in trees}
    made = _compiled(named, python)
    for tree in made.values():
        path, entry = wheels.record(tree)
        tree[path] = entry
    return _layer(name, made, {})


def _compiled(trees: Mapping[str, Tree], python: Python) -> dict[str, Tree]:
    """Each package with its byte-code. One process compiles all of them."""
    owner = {path: name for name, tree in trees.items() for path in tree}
    made = {name: dict(tree) for name, tree in trees.items()}
    code = python.compiled({path: entry for tree in trees.values() for path, entry in tree.items()})
    for path, entry in code.items():
        folder, _, file = path.rpartition("/__pycache__/")
        made[owner[f"{folder}/{file.partition('.')[0]}.py"]][path] = entry
    return made


def _layer(name: str, packages: Mapping[str, Tree], more: Tree) -> Layer:
    tree = {path: entry for part in packages.values() for path, entry in part.items()} | more
    return Layer(name, tree, {package: size(part) for package, part in packages.items()})
