"""Images in OCI's format: github.com/opencontainers/image-spec, image-layout.md, manifest.md, config.md."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hack.lib.image.recipe import COMMAND, ENTRYPOINT, ENVIRONMENT, USER

_OCI = "application/vnd.oci.image"


@dataclass(frozen=True, slots=True)
class Packed:
    """One layer: a tar archive, plain and compressed."""

    archive: bytes
    compressed: bytes


@dataclass(slots=True)
class Layout:
    """The files of a layout, by name."""

    files: dict[str, bytes] = field(default_factory=dict)

    def add(self, content: bytes, kind: str) -> dict[str, Any]:
        """Add a blob. Returns its descriptor."""
        digest = hashlib.sha256(content).hexdigest()
        self.files[f"blobs/sha256/{digest}"] = content
        return {"mediaType": f"{_OCI}.{kind}", "digest": f"sha256:{digest}", "size": len(content)}

    def add_image(self, architecture: str, layers: Sequence[Packed], labels: Mapping[str, str], epoch_s: int) -> Any:
        """Add the image of one architecture. Returns the descriptor of its manifest."""
        config = self.add(_json(_config(architecture, layers, labels, epoch_s)), "config.v1+json")
        manifest = {
            "schemaVersion": 2,
            "mediaType": f"{_OCI}.manifest.v1+json",
            "config": config,
            "layers": [self.add(layer.compressed, "layer.v1.tar+gzip") for layer in layers],
        }
        platform = {"architecture": architecture, "os": "linux"}
        return {**self.add(_json(manifest), "manifest.v1+json"), "platform": platform}

    def finish(self, name: str, images: Sequence[Mapping[str, Any]]) -> str:
        """Add the index of all architectures. Returns its digest, which is the digest of the image."""
        body = {"schemaVersion": 2, "mediaType": f"{_OCI}.index.v1+json", "manifests": [*images]}
        index = self.add(_json(body), "index.v1+json")
        # containerd reads the first name (ctr images import), other programs read the second.
        names = {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": name.rpartition(":")[2]}
        self.files["index.json"] = _json({**body, "manifests": [{**index, "annotations": names}]})
        self.files["oci-layout"] = _json({"imageLayoutVersion": "1.0.0"})
        return str(index["digest"])

    def write(self, folder: Path) -> None:
        """Write the layout as a folder. Older blobs in the folder go."""
        for name, content in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        for path in (folder / "blobs/sha256").iterdir():
            if f"blobs/sha256/{path.name}" not in self.files:
                path.unlink()

    def write_archive(self, path: Path, epoch_s: int) -> None:
        """Write the layout as one file, for `ctr images import`."""
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
            for name, content in sorted(self.files.items()):
                member = tarfile.TarInfo(name)
                member.size, member.mtime = len(content), epoch_s
                tar.addfile(member, io.BytesIO(content))


def _config(architecture: str, layers: Sequence[Packed], labels: Mapping[str, str], epoch_s: int) -> dict[str, Any]:
    run = {
        "User": USER,
        "Env": [f"{name}={value}" for name, value in ENVIRONMENT.items()],
        "Entrypoint": [*ENTRYPOINT],
        "Cmd": [*COMMAND],
        "WorkingDir": "/",
        "Labels": dict(labels),
    }
    return {
        "created": datetime.fromtimestamp(epoch_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "architecture": architecture,
        "os": "linux",
        "config": run,
        "rootfs": {
            "type": "layers",
            "diff_ids": [f"sha256:{hashlib.sha256(layer.archive).hexdigest()}" for layer in layers],
        },
    }


def _json(body: Any) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
