"""hack/image without a network: small packages, the real recipe. tests/deploy/test_image.py starts the real image."""

from __future__ import annotations

import csv
import gzip
import hashlib
import http.server
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from hack.lib.image import assembly, debian, lock, recipe, sbom, sources, wheels
from hack.lib.image import tree as trees
from hack.lib.image.__main__ import check_size
from hack.lib.image.assembly import Layer
from hack.lib.image.errors import ImageError
from hack.lib.image.lock import Item
from hack.lib.image.oci import Layout, Packed
from hack.lib.image.python import Python
from hack.lib.image.recipe import ARCHITECTURES, PACKAGES, SITE, STATUS
from hack.lib.image.tree import Entry, Tree

ROOT = Path(__file__).parents[2]
PYTHON = Python((sys.executable,))
STDLIB = "usr/lib/python3.11"

PACKAGED: dict[str, dict[str, bytes]] = {
    "libpython3.11-stdlib": {
        f"./{STDLIB}/queue.py": b"def known(name):\n    return name in {'a', 'b', 'c', None}\n",
        f"./{STDLIB}/ensurepip/__init__.py": b"",
        "./usr/share/doc/libpython3.11-stdlib/copyright": b"the licence",
        "./usr/share/man/man1/python3.11.1.gz": b"a page",
    },
    "libc6": {"./lib/x86_64-linux-gnu/libc.so.6": b"\x7fELF", "./usr/share/doc/libc6/copyright": b"the licence"},
    "coreutils": {"./usr/bin/env": b"\x7fELF", "./bin/cat": b"\x7fELF"},
}


def a_tar(files: Mapping[str, bytes], time_s: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime, member.uid = len(content), time_s, 1000
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def a_deb(name: str, files: Mapping[str, bytes], time_s: int = 0) -> bytes:
    control = f"Package: {name}\nVersion: 1:2+deb12u3\nArchitecture: amd64\nDescription: {name}\n".encode()
    parts = {
        "debian-binary": b"2.0\n",
        "control.tar.xz": a_tar({"./control": control}, time_s),
        "data.tar.xz": a_tar(files, time_s),
    }
    whole = b"!<arch>\n"
    for part, content in parts.items():
        whole += f"{part:16}{time_s:<12}{0:<6}{0:<6}{'100644':8}{len(content):<10}`\n".encode() + content
        whole += b"\n" * (len(content) % 2)
    return whole


def a_wheel(name: str, files: Mapping[str, bytes]) -> bytes:
    info = f"{name}-1.0.dist-info"
    metadata = f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\nLicense-Expression: MIT\n\nName: another\n".encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path, content in {**files, f"{info}/METADATA": metadata, f"{info}/RECORD": b"old,,\n"}.items():
            archive.writestr(path, content)
    return buffer.getvalue()


OURS = a_wheel(
    "gpuslice",
    {
        "gpuslice/__init__.py": b"",
        "gpuslice-1.0.dist-info/entry_points.txt": b"[console_scripts]\ngpuslice = gpuslice.__main__:main\n",
        "gpuslice-1.0.dist-info/licenses/LICENSE": b"the licence",
    },
)
THEIRS = [
    a_wheel("kubernetes", {"kubernetes/config/__init__.py": b"", "kubernetes/aio/__init__.py": b""}),
    a_wheel(
        "wsgi", {"wsgi/__init__.py": b"", "wsgi-1.0.dist-info/entry_points.txt": b"[console_scripts]\nwsgi = wsgi:go\n"}
    ),
]


def assembled(packaged: Mapping[str, Mapping[str, bytes]] = PACKAGED, time_s: int = 0) -> list[Layer]:
    packages = {name: debian.files(name, a_deb(name, files, time_s)) for name, files in packaged.items()}
    return assembly.layers(packages, THEIRS, OURS, PYTHON, "an image", 0)


def whole(layers: list[Layer]) -> Tree:
    return {path: entry for layer in layers for path, entry in layer.tree.items()}


def laid_out(layers: list[Layer]) -> tuple[str, Layout]:
    layout = Layout()
    archives = [trees.archive(layer.tree, 0) for layer in layers]
    packed = [Packed(archive, PYTHON.compressed(archive)) for archive in archives]
    labels = recipe.labels("1", "an image", "MIT")
    return layout.finish("docker.io/library/x:1", [layout.add_image("amd64", packed, labels, 0)]), layout


# ---------------------------------------------------------------- one digest


def test_the_same_contents_make_the_same_digest() -> None:
    other_order = {name: dict(reversed(files.items())) for name, files in reversed(PACKAGED.items())}

    first, _ = laid_out(assembled())
    second, _ = laid_out(assembled(other_order, time_s=1_700_000_000))

    assert first == second


def test_another_content_makes_another_digest() -> None:
    first, _ = laid_out(assembled())
    second, _ = laid_out(assembled({**PACKAGED, "netbase": {"./etc/protocols": b"tcp"}}))

    assert first != second


def test_a_layer_is_sorted_belongs_to_root_and_has_one_time() -> None:
    with tarfile.open(fileobj=io.BytesIO(trees.archive(whole(assembled()), 5))) as tar:
        members = tar.getmembers()

    assert [member.name for member in members] == sorted(member.name for member in members)
    assert {(member.uid, member.gid, member.uname, member.mtime) for member in members} == {(0, 0, "", 5)}


def test_a_compressed_layer_has_no_time() -> None:
    assert PYTHON.compressed(b"text")[4:8] == bytes(4)


def test_byte_code_is_never_compared_with_its_source() -> None:
    """PEP 552: bit 0 says that there is a hash, bit 1 that Python checks it."""
    code = whole(assembled())[f"{STDLIB}/__pycache__/queue.cpython-{sys.version_info[0]}{sys.version_info[1]}.pyc"]

    assert int.from_bytes(code.content[4:8], "little") == 0b01


# ---------------------------------------------------------------- OCI's layout


def _blob(layout: Layout, descriptor: Mapping[str, Any]) -> bytes:
    content = layout.files[f"blobs/sha256/{descriptor['digest'].removeprefix('sha256:')}"]
    assert len(content) == descriptor["size"]
    assert hashlib.sha256(content).hexdigest() == descriptor["digest"].removeprefix("sha256:")
    return content


def test_a_layout_leads_from_its_name_to_each_layer() -> None:
    digest, layout = laid_out(assembled())

    index = json.loads(layout.files["index.json"])["manifests"][0]
    image = json.loads(_blob(layout, index))["manifests"][0]
    manifest = json.loads(_blob(layout, image))
    config = json.loads(_blob(layout, manifest["config"]))
    layers = [gzip.decompress(_blob(layout, layer)) for layer in manifest["layers"]]

    assert (index["digest"], index["annotations"]["io.containerd.image.name"]) == (digest, "docker.io/library/x:1")
    assert image["platform"] == {"architecture": "amd64", "os": "linux"}
    assert config["rootfs"]["diff_ids"] == [f"sha256:{hashlib.sha256(layer).hexdigest()}" for layer in layers]
    assert config["config"]["Entrypoint"] == ["python3", "-m", "gpuslice"]


def test_a_folder_loses_the_blobs_of_an_older_image(tmp_path: Path) -> None:
    _, older = laid_out(assembled())
    older.write(tmp_path)
    _, newer = laid_out(assembled({}))

    newer.write(tmp_path)

    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert found == set(newer.files)


# ---------------------------------------------------------------- the contents


def test_licences_stay_and_what_nobody_needs_goes() -> None:
    tree = whole(assembled())

    present = {path for path in tree if "doc/" in path or "bin/" in path or "LICENSE" in path}
    assert present == {
        "usr/share/doc/libpython3.11-stdlib/copyright",
        "usr/share/doc/libc6/copyright",
        "usr/bin/env",
        "usr/bin/python3",
        "usr/local/bin/gpuslice",
        f"{SITE}/gpuslice-1.0.dist-info/licenses/LICENSE",
    }
    assert not [path for path in tree if "aio" in path or "/man/" in path or "ensurepip" in path]


def test_libraries_of_old_folders_are_below_usr() -> None:
    tree = whole(assembled())

    assert "usr/lib/x86_64-linux-gnu/libc.so.6" in tree
    assert tree["lib"].target == "usr/lib"


def test_the_sbom_names_exactly_the_packages_in_the_image() -> None:
    tree = whole(assembled())

    body = json.loads(tree[recipe.SBOM].content)

    named = {(package["name"], package["versionInfo"], package["licenseDeclared"]) for package in body["packages"]}
    packages = {(name, "1:2+deb12u3", "NOASSERTION") for name in PACKAGED}
    assert named == packages | {(name, "1.0", "MIT") for name in ("gpuslice", "kubernetes", "wsgi")}
    purls = [package["externalRefs"][0]["referenceLocator"] for package in body["packages"]]
    assert "pkg:deb/debian/libc6@1%3A2%2Bdeb12u3?arch=amd64&distro=debian-12" in purls
    assert "pkg:pypi/kubernetes@1.0" in purls


def test_a_package_lists_exactly_its_files_with_their_sums() -> None:
    tree = whole(assembled())

    rows = [*csv.reader(io.StringIO(tree[f"{SITE}/gpuslice-1.0.dist-info/RECORD"].content.decode()))]

    named = {os.path.normpath(f"{SITE}/{path}") for path, _, _ in rows}
    assert named == {path for path in tree if "/gpuslice" in path} - {recipe.SBOM}
    assert "usr/local/bin/gpuslice" in named


def test_a_file_that_no_package_brings_is_refused() -> None:
    tree = {**whole(assembled()), "usr/bin/gcc": Entry(b"\x7fELF")}

    with pytest.raises(ImageError, match=r"^no package brings usr/bin/gcc; see that its package's list"):
        sbom.components(tree)


@pytest.mark.parametrize("path", [f"{STDLIB}/queue.py", f"{SITE}/gpuslice/__init__.py"])
def test_a_file_that_is_not_as_its_list_says_is_refused(path: str) -> None:
    tree = {**whole(assembled()), path: Entry(b"changed")}

    with pytest.raises(ImageError, match=f"^{path} is not in the image as its package's list says"):
        sbom.components(tree)


@pytest.mark.parametrize("target", ["real.py", "../lib/real.py", "/lib/real.py"])
def test_a_link_to_a_module_has_byte_code_by_its_own_name(target: str) -> None:
    code = PYTHON.compiled({"lib/real.py": Entry(b"A = 1\n"), "lib/other.py": trees.link(target)})

    assert {path.partition(".")[0] for path in code} == {"lib/__pycache__/real", "lib/__pycache__/other"}


def test_a_module_that_cannot_be_compiled_is_refused() -> None:
    with pytest.raises(ImageError, match="the image's Python failed: SyntaxError: invalid syntax"):
        PYTHON.compiled({"a.py": Entry(b"a b\n")})


def test_what_is_no_package_of_debian_is_refused() -> None:
    with pytest.raises(ImageError, match=r"a package has no data\.tar, so it is no Debian package"):
        debian.files("libc6", b"!<arch>\n")


# ---------------------------------------------------------------- the lock


def test_the_lock_has_each_package_of_the_recipe_for_each_architecture() -> None:
    locked = lock.read()

    for architecture in ARCHITECTURES:
        assert sorted(item.name for item in locked.of(architecture, "deb")) == sorted(PACKAGES)


def test_the_lock_has_our_dependencies_in_versions_that_we_allow() -> None:
    """Only of our direct dependencies. pip chooses the versions of theirs."""
    locked = lock.read()
    requirements = [Requirement(text) for text in wheels.project()["dependencies"]]

    for architecture in ARCHITECTURES:
        versions = {canonicalize_name(item.name): item.version for item in locked.of(architecture, "wheel")}
        wrong = [r for r in requirements if not r.specifier.contains(versions.get(canonicalize_name(r.name), "0"))]
        assert not wrong, "renew the lock: hack/image --update"


def test_both_architectures_have_the_same_packages() -> None:
    locked = lock.read()

    one, other = ({item.name for item in locked.items if name in item.architectures} for name in ARCHITECTURES)
    assert one == other


def test_a_lock_is_written_as_it_is_read() -> None:
    assert lock.read().text() == lock.LOCK.read_text(encoding="utf-8")


def test_what_is_no_lock_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "lock.json"
    path.write_text('{"made": "20260101T000000Z"}', encoding="utf-8")

    with pytest.raises(ImageError, match=r"lock\.json is no lock file: 'items'; renew it with hack/image --update"):
        lock.read(path)


def test_a_file_with_a_wrong_sum_never_enters_the_cache(tmp_path: Path) -> None:
    item = Item("wheel", "a", "1", ("amd64",), "a-1.whl", lock.digest(b"right"))

    with pytest.raises(
        ImageError, match=r"^a-1\.whl has the SHA-256 sum [0-9a-f]{64}, but the lock says [0-9a-f]{64}; "
    ):
        lock.store(tmp_path, item, b"wrong")

    assert not [*tmp_path.iterdir()]


def hack_image(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "hack.lib.image", *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, check=False)


def test_a_cached_file_with_a_wrong_sum_is_refused_in_one_sentence(tmp_path: Path) -> None:
    cache = tmp_path / "gpuslice/image"
    cache.mkdir(parents=True)
    for item in lock.read().items:
        (cache / item.sha256).write_bytes(b"something else")

    done = hack_image("--out", tmp_path / "out", XDG_CACHE_HOME=str(tmp_path))

    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "has the SHA-256 sum" in done.stderr
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- wrong inputs


def test_a_root_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    done = hack_image("--rootfs", tmp_path)

    assert done.stderr == f"hack/image: {tmp_path} is not empty; name a new folder with --rootfs\n"


@pytest.mark.parametrize("name", ["gpuslice", "gpuslice:0.1.0", "localhost:5000/gpuslice", "docker.io/library/Gpu:1"])
def test_a_name_that_no_runtime_would_ask_for_is_refused(tmp_path: Path, name: str) -> None:
    done = hack_image("--out", tmp_path, "--name", name)

    assert done.returncode == 1
    assert done.stderr.startswith(f"hack/image: '{name}' is no full name of an image; write registry, path and tag: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_time_that_is_no_number_is_refused(tmp_path: Path) -> None:
    done = hack_image("--out", tmp_path, SOURCE_DATE_EPOCH="today")

    assert done.stderr == "hack/image: SOURCE_DATE_EPOCH is 'today'; it must be a number of seconds\n"


@pytest.mark.parametrize(("size_mb", "compressed_mb"), [(160.1, 20), (80, 45.1)])
def test_an_image_that_is_too_large_is_refused(size_mb: float, compressed_mb: float) -> None:
    with pytest.raises(
        ImageError, match=r"^the image for amd64 has .* more than the limits of 160 and 45 MB; leave more out"
    ):
        check_size("amd64", size_mb, compressed_mb)


def test_a_package_that_needs_another_than_the_recipe_knows_is_refused() -> None:
    found = {"libc6": {"Depends": "libgcc-s1, libnew (>= 1) | libnewer"}}

    with pytest.raises(ImageError, match=r"^libc6 needs libnew \(>= 1\) \| libnewer, which the image would not have"):
        debian.check_dependencies(found)


# ---------------------------------------------------------------- where packages come from


def an_apt(folder: Path, printed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "apt-get"
    program.write_text(f"#!/bin/sh\nprintf '{printed}'\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_packages_come_from_the_mirror_of_this_machines_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    an_apt(tmp_path, "http://mirror.example/debian/\\nhttp://other.example/ubuntu/\\n", monkeypatch)

    assert debian.mirrors() == {
        "debian": "http://mirror.example/debian",
        "debian-security": "http://deb.debian.org/debian-security",
    }


def test_without_apt_packages_come_from_debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    assert debian.mirrors()["debian"] == "http://deb.debian.org/debian"


class Unsigned(http.server.BaseHTTPRequestHandler):
    """A mirror that answers each request with an unsigned list."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"SHA256:\n")

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.skipif(not shutil.which("gpgv") or not debian.KEYS.exists(), reason="no gpgv, or no keys of Debian")
def test_a_list_without_a_signature_of_debian_makes_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), Unsigned) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        an_apt(tmp_path, f"http://127.0.0.1:{server.server_port}/debian\\n", monkeypatch)
        monkeypatch.setenv("no_proxy", "127.0.0.1")

        with pytest.raises(ImageError, match="the mirror's list has no valid signature of Debian; use another mirror"):
            debian.newest("amd64")


def test_a_package_that_cannot_be_fetched_is_named_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    an_apt(tmp_path, "http://127.0.0.1:1/debian/\\n", monkeypatch)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    with pytest.raises(
        ImageError, match=r"^http://127\.0\.0\.1:1/debian/pool/\S+\.deb cannot be read: .* --update takes"
    ):
        sources.ensure(lock.read(), ["amd64"], lambda _: None)


def test_only_the_needed_lists_are_lists_of_packages() -> None:
    found = {path for path in whole(assembled()) if path.startswith(STATUS)}

    assert found == {f"{STATUS}/{name}{end}" for name in PACKAGED for end in ("", ".md5sums")}
