"""The node that a command works on: its GPUs, its policy, the inventory of the last start, and one look from outside."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from gpuslice import hardware
from gpuslice.checkpoint import Checkpoint
from gpuslice.config import Config
from gpuslice.core import cards, gpucodec, health
from gpuslice.core.health import Taints
from gpuslice.core.inventory import Inventory
from gpuslice.core.model import ClaimUid, Gpu, GpuUuid, LiveGpu, Taint
from gpuslice.core.policy.rules import Policy
from gpuslice.core.record import Record
from gpuslice.core.typed import Fields
from gpuslice.errors import ConfigError, StateError
from gpuslice.nvml.api import Nvml
from gpuslice.nvml.listing import LIMIT_S, Listing
from gpuslice.system import files
from gpuslice.system.host import Host

log = logging.getLogger(__name__)


def read_policy(path: Path | None) -> Policy:
    """The policy file, or the default of everything. ConfigError names the file."""
    if path is None:
        return Policy.default()
    try:
        body = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise ConfigError(f"policy file {path} cannot be read ({' '.join(str(e).split())}); see docs/policy.md") from e
    try:
        return Policy.parse({} if body is None else body)
    except ConfigError as e:
        raise ConfigError(f"policy file {path}: {e}") from e


class Cards:
    """The cards of the node. One that cannot be read now is as it was when last seen, so that its pool stays."""

    def __init__(self, nvml: Nvml, host: Host, folder: Path, limit_s: float = 2 * LIMIT_S) -> None:
        """`folder` is the plugin's. `limit_s` is for listing all cards, of which each has a limit of its own."""
        self._nvml, self._host = nvml, host
        self._path, self._claims = folder / "gpus.json", folder / "claims"
        self._listing: Listing[tuple[Gpu, ...]] = Listing(limit_s, name=lambda _: "the list of this node's GPUs")

    def known(self) -> tuple[tuple[Gpu, ...], tuple[str, ...]]:
        """In bus order, with one sentence for each thing that is not as it should be. Nothing is written."""
        listed, hung = self._listed()
        lost = hung or self._nvml.lost()
        # A folder of this boot says that a driver of ours ran in it, so a card that is missing was lost while it ran.
        same_boot = (self._claims / self._host.boot_id()).is_dir()
        gpus, sentences = cards.known(listed, _last_seen(self._path), keep_missing=same_boot or bool(lost))
        return gpus, (*lost, *sentences, *cards.none_of(gpus))

    def remember(self) -> tuple[Gpu, ...]:
        """Those that are known, which are written down for the next start; what is wrong is logged."""
        gpus, sentences = self.known()
        for sentence in (*sentences, *self._nvml.notes()):
            log.warning("%s", sentence)
        files.write_atomic(self._path, json.dumps(gpucodec.encode(gpus)))
        return gpus

    def news(self, served: Iterable[Gpu]) -> str:
        """Why a process that serves these cards should start anew: cards that it does not know. "" if there are none."""
        listed, _ = self._listed()
        names = ", ".join(f"{gpu.uuid} ({gpu.product}, {gpu.bus_id})" for gpu in cards.new(listed, served))
        return f"{names}: new on this node; the process starts anew to offer the new cards" if names else ""

    def _listed(self) -> tuple[tuple[Gpu, ...], tuple[str, ...]]:
        found, hung = self._listing.read((0,), lambda _: self._nvml.gpus())
        return tuple(self._host.locate(gpu) for gpus in found for gpu in gpus), hung


def _last_seen(path: Path) -> tuple[Gpu, ...]:
    try:
        if not path.is_file():
            return ()  # the first start; or a pipe, which has no end
        return gpucodec.decode(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return ()  # a torn file of a power loss: then only what is here now is known


# ---------------------------------------------------------------- a look from outside


@dataclass(frozen=True, slots=True)
class Node:
    """What the commands `devices` and `claims` show of a node."""

    inventory: Inventory
    live: Mapping[GpuUuid, LiveGpu]
    records: Mapping[ClaimUid, Record]
    taints: Taints
    notes: tuple[str, ...]  # what is wrong with cards, one sentence each


@contextlib.contextmanager
def snapshot(config: Config) -> Iterator[Node]:
    """One look at the node, while a driver may run; changes nothing. Settings that are not given are those of `run`."""
    config = _as_running(config)
    nvml, host = hardware.open_node(config)
    try:
        gpus, sentences = Cards(nvml, host, config.plugin_folder).known()
        inventory = Inventory.of(gpus, read_policy(config.policy), config.node_name)
        folder = config.plugin_folder / "claims" / host.boot_id()
        checkpoint = Checkpoint(folder.parent, folder.name) if folder.is_dir() else None
        live, unwell = _looks(nvml, [pool.gpu.uuid for pool in inventory.pools])
        records = checkpoint.records() if checkpoint is not None else {}
        found = health.taints(inventory, live, unwell, records.values(), {})
        yield Node(inventory, live, records, found, (*sentences, *inventory.notes))
    finally:
        nvml.close()


def _looks(nvml: Nvml, gpus: Sequence[GpuUuid]) -> tuple[Mapping[GpuUuid, LiveGpu], Mapping[GpuUuid, Taint]]:
    """What each card shows, and why one shows nothing."""
    looks: Listing[tuple[GpuUuid, LiveGpu]] = Listing(name=lambda index: f"GPU {gpus[index]}")
    found, lost = looks.read(range(len(gpus)), lambda index: (gpus[index], nvml.look(gpus[index])))
    live = dict(found)
    silent = [uuid for uuid in gpus if uuid not in live]
    return live, {uuid: Taint("gpu", "lost", reason=why) for uuid, why in zip(silent, lost, strict=True)}


def save_settings(config: Config) -> None:
    """Save the settings, so that `devices` and `claims` need no flags on the node of a running driver."""
    settings = {
        "node_name": config.node_name,
        "policy": str(config.policy or ""),
        "simulate": config.simulate,
        "simulate_folder": str(config.simulate_folder or ""),
        "simulate_latency": config.simulate_latency,
    }
    files.write_atomic(config.plugin_folder / "running.json", json.dumps(settings))


def _as_running(config: Config) -> Config:
    path = config.plugin_folder / "running.json"
    if config.node_name or config.simulate or not path.exists():
        return replace(config, node_name=config.node_name or "this-node")
    try:
        settings = Fields(json.loads(path.read_text(encoding="utf-8")), "")
        return replace(config, **_settings(settings, config))
    except (OSError, ValueError, RecursionError) as e:
        raise StateError(
            f"{path} cannot be read ({type(e).__name__}: {e}); give --node-name, and --simulate if the node is simulated"
        ) from e


def _settings(settings: Fields, config: Config) -> dict[str, Any]:
    policy, folder = settings.optional_text("policy", empty=True), settings.optional_text("simulate_folder", empty=True)
    return {
        "node_name": settings.text("node_name"),
        "policy": config.policy or (Path(policy) if policy else None),
        "simulate": settings.optional_text("simulate", empty=True) or "",
        "simulate_folder": Path(folder) if folder else None,
        "simulate_latency": settings.optional_text("simulate_latency") or config.simulate_latency,
    }
