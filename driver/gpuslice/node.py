"""The node that a command works on: its GPUs, its policy, the inventory of the last start, and one look from outside."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from gpuslice import hardware
from gpuslice.checkpoint import Records
from gpuslice.config import Config
from gpuslice.core import gpucodec, health
from gpuslice.core.health import Taints
from gpuslice.core.inventory import Inventory
from gpuslice.core.model import ClaimUid, Gpu, GpuUuid, LiveGpu
from gpuslice.core.policy.rules import Policy
from gpuslice.core.record import Record
from gpuslice.errors import ConfigError, DeviceError, StateError
from gpuslice.nvml.api import Nvml
from gpuslice.system import documents, files
from gpuslice.system.host import Host

log = logging.getLogger(__name__)


def read_policy(path: Path | None) -> Policy:
    """The policy file, or the default of everything. ConfigError names the file."""
    if path is None:
        return Policy.default()
    body = documents.read(path, "policy file", "docs/policy.md")
    try:
        return Policy.parse({} if body is None else body)
    except ConfigError as e:
        raise _of_file(path, e) from e


def inventory(gpus: Iterable[Gpu], policy: Policy, config: Config, *, static: bool = False) -> Inventory:
    """What the node offers. ConfigError names the policy file, where what it says does not fit these cards."""
    try:
        return Inventory.of(gpus, policy, config.node_name, static=static)
    except ConfigError as e:
        raise (_of_file(config.policy, e) if config.policy else e) from e


def _of_file(path: Path, error: ConfigError) -> ConfigError:
    return ConfigError(f"policy file {path}: {str(error).removeprefix('policy: ')}")


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
    return tuple(gpu for _, gpu in sorted({**(before if lost else {}), **here}.items()))


def save_gpus(gpus: Iterable[Gpu], path: Path) -> None:
    """Write down what `known_gpus` falls back on at the next start."""
    files.write_atomic(path, json.dumps(gpucodec.encode(tuple(gpus))))


def _last_seen(path: Path) -> tuple[Gpu, ...]:
    try:
        return gpucodec.decode(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return ()  # the first start, or a torn file of a power loss: then only what is here now is known


# ---------------------------------------------------------------- a look from outside


@dataclass(frozen=True, slots=True)
class Node:
    """What the commands `devices` and `claims` show of a node. `notes`: what is wrong beside that, one sentence each."""

    inventory: Inventory
    live: Mapping[GpuUuid, LiveGpu]
    records: Mapping[ClaimUid, Record]
    taints: Taints
    notes: tuple[str, ...] = ()


@contextlib.contextmanager
def snapshot(config: Config) -> Iterator[Node]:
    """One look at the node, while a driver may run; changes nothing. Settings that are not given are those of `run`."""
    config = _as_running(config)
    policy = read_policy(config.policy)
    with hardware.visit(config) as nvml:
        seen = inventory(nvml.gpus(), policy, config)
        live: dict[GpuUuid, LiveGpu] = {}
        for pool in seen.pools:
            with contextlib.suppress(DeviceError):
                live[pool.gpu.uuid] = nvml.look(pool.gpu.uuid)
        found, notes = _records(config)
        notes = (*nvml.lost(), *policy.unused(pool.gpu for pool in seen.pools), *notes)
        yield Node(seen, live, found, health.taints(seen, live, {}, found.values(), {}), notes)


def records(config: Config) -> tuple[Mapping[ClaimUid, Record], tuple[str, ...]]:
    """What is prepared on the node, and a sentence for whatever cannot be read. Needs no GPU and no NVML."""
    try:
        found, notes = _records(_as_running(config))
    except StateError as e:
        found, notes = _records(config)
        return found, (str(e), *notes)
    return found, notes if found or config.plugin_folder.exists() else (_nothing_here(config),)


def _records(config: Config) -> tuple[Mapping[ClaimUid, Record], tuple[str, ...]]:
    folder = config.plugin_folder / "claims"
    try:
        if not folder.is_dir():
            return {}, ()
    except OSError as e:
        raise StateError(files.unreadable(folder, e)) from e
    kept = Records(folder / hardware.boot_id(config))
    return kept.records(), kept.broken()


def _nothing_here(config: Config) -> str:
    return (
        f"no driver has run with the folder {config.plugin_folder}; if one has run with another folder, give its "
        "--kubelet-plugins-directory-path and --driver-name"
    )


def save_settings(config: Config) -> None:
    """Save the settings, so that `devices` and `claims` need no flags on the node of a running driver."""
    settings = {
        "node_name": config.node_name,
        "policy": str(config.policy.absolute() if config.policy else ""),
        "simulate": _absolute(config.simulate),
        "simulate_folder": str(config.simulate_folder.absolute() if config.simulate_folder else ""),
        "simulate_latency": config.simulate_latency,
    }
    files.write_atomic(config.plugin_folder / "running.json", json.dumps(settings))


def _absolute(simulate: str) -> str:
    """A node file is named by its whole path, because the next command is typed elsewhere."""
    return str(Path(simulate).absolute()) if "/" in simulate or Path(simulate).suffix else simulate


def _as_running(config: Config) -> Config:
    path = config.plugin_folder / "running.json"
    settings = None if config.node_name or config.simulate else _settings(path)
    if settings is None:
        return replace(config, node_name=config.node_name or "this-node")
    try:
        return replace(
            config,
            node_name=settings["node_name"] or "this-node",
            policy=config.policy or (Path(settings["policy"]) if settings["policy"] else None),
            simulate=settings["simulate"],
            simulate_folder=Path(settings["simulate_folder"]) if settings["simulate_folder"] else None,
            simulate_latency=settings.get("simulate_latency", config.simulate_latency),
        )
    except (LookupError, ConfigError) as e:
        what = f"lacks {e}" if isinstance(e, LookupError) else str(e)
        raise StateError(f"{path} is not what a driver writes ({what}); {_INSTEAD}") from e


_INSTEAD = "start the driver again, or give --node-name, and --simulate if the node is simulated"


def _settings(path: Path) -> Mapping[str, str] | None:
    """What the driver wrote down of its own settings; None where no driver has run."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as e:
        raise StateError(files.unreadable(path, e)) from e
    except (ValueError, RecursionError) as e:
        raise StateError(f"{path} is not JSON ({e}); {_INSTEAD}") from e
    odd = [key for key, value in body.items() if not isinstance(value, str)] if isinstance(body, dict) else ["it"]
    if odd or not isinstance(body, dict):
        raise StateError(f"{path} is not what a driver writes ({odd[0]} is not a text); {_INSTEAD}")
    return body
