"""The node that a command works on: its GPUs, its policy, the inventory of the last start, and one look from outside."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from gpuslice import hardware
from gpuslice.checkpoint import Checkpoint
from gpuslice.config import Config
from gpuslice.core import gpucodec, health
from gpuslice.core.health import Taints
from gpuslice.core.inventory import Inventory
from gpuslice.core.model import ClaimUid, Gpu, GpuUuid, LiveGpu
from gpuslice.core.policy.rules import Policy
from gpuslice.core.record import Record
from gpuslice.core.typed import Fields
from gpuslice.errors import ConfigError, DeviceError, StateError
from gpuslice.nvml.api import Nvml
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


def known_gpus(nvml: Nvml, host: Host, path: Path) -> tuple[Gpu, ...]:
    """The cards in bus order. A card that cannot be read now has its values of the last start, and keeps its pool."""
    seen = tuple(host.locate(gpu) for gpu in nvml.gpus())
    lost = nvml.lost()
    for sentence in (*lost, *nvml.notes()):
        log.warning("%s", sentence)
    before = {gpu.bus_id: gpu for gpu in _last_seen(path)}
    here = {gpu.bus_id: gpu for gpu in seen}
    # Drivers of about 535 list no profiles while MIG mode is off (NVML field 199): then the list of last time counts.
    for bus_id, gpu in here.items():
        if not gpu.profiles and bus_id in before and before[bus_id].uuid == gpu.uuid:
            here[bus_id] = replace(gpu, profiles=before[bus_id].profiles)
    gpus = tuple(gpu for _, gpu in sorted({**(before if lost else {}), **here}.items()))
    files.write_atomic(path, json.dumps(gpucodec.encode(gpus)))
    return gpus


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


@contextlib.contextmanager
def snapshot(config: Config) -> Iterator[Node]:
    """One look at the node, while a driver may run; changes nothing. Settings that are not given are those of `run`."""
    config = _as_running(config)
    nvml, host = hardware.open_node(config)
    try:
        inventory = Inventory.of(nvml.gpus(), read_policy(config.policy), config.node_name)
        folder = config.plugin_folder / "claims" / host.boot_id()
        checkpoint = Checkpoint(folder.parent, folder.name) if folder.is_dir() else None
        live: dict[GpuUuid, LiveGpu] = {}
        for pool in inventory.pools:
            with contextlib.suppress(DeviceError):
                live[pool.gpu.uuid] = nvml.look(pool.gpu.uuid)
        records = checkpoint.records() if checkpoint is not None else {}
        yield Node(inventory, live, records, health.taints(inventory, live, {}, records.values(), {}))
    finally:
        nvml.close()


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
