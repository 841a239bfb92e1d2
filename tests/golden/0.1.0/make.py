"""Made the files of this folder, with the driver of release 0.1.0 (README.md). It runs over the tree of that release only."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

NODE = "h100x2"
# One claim of each mode. Modes of one card exclude each other, so there are two nodes.
NODES: dict[str, dict[str, dict[str, Any]]] = {
    "apart": {
        "whole": {"where": {"type": "gpu"}},
        "partition": {"where": {"type": "mig", "profile": "1g.10gb"}},
        "monitor": {"where": {"type": "monitor"}, "admin": True},
    },
    "shared": {
        "mps": {"where": {"type": "mps"}, "capacity": {"memory": "9Gi", "smPercent": "25"}},
        "time-slice": {"where": {"type": "timeslice"}, "capacity": {"memory": "9Gi"}},
    },
}


async def make(target: Path, wanted: dict[str, dict[str, Any]]) -> None:
    """The files of a node on which the old driver has prepared these claims, and has been killed."""
    old = import_module("driver.demo.cluster")
    request = import_module("driver.demo.scheduler").Request
    with tempfile.TemporaryDirectory(prefix="gs-") as name:
        folder = Path(name)
        async with old.Cluster(folder, NODE) as cluster:
            await cluster.supervise()
            driver = await cluster.start()
            answers = {}
            for claim, asked in wanted.items():
                ref = cluster.claim(claim, request(name="gpu", driver=old.DRIVER, **asked))
                await cluster.run(ref)
                answer = (await cluster.kubelet.prepare([ref]))[ref.uid]
                answers[claim] = [
                    {"pool": device.pool, "device": device.device, "cdi": device.cdi_ids} for device in answer.devices
                ]
            await driver.kill()
            seen = {
                "folder": str(folder),
                "claims": cluster.api.all("resourceclaims"),
                "slices": cluster.api.all("resourceslices"),
                "answers": answers,
            }
            plugin = cluster.plugins / old.DRIVER
            shutil.copytree(plugin, target / "plugin", ignore=lambda _, names: [n for n in names if unwanted(n)])
            shutil.copytree(cluster.cdi, target / "cdi")
        (target / "api.json").write_text(f"{json.dumps(seen, indent=1)}\n", encoding="utf-8")


def unwanted(name: str) -> bool:
    """Sockets and locks are of the processes, not of the node."""
    return name.endswith((".sock", ".lock", ".turn")) or name in ("locks", "cues", "events")


if __name__ == "__main__":
    here = Path(sys.argv[1])
    for node, claims in NODES.items():
        shutil.rmtree(here / node, ignore_errors=True)
        asyncio.run(make(here / node, claims))
