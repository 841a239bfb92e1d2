"""The node that a command works on: its GPUs, its policy, the inventory of the last start, and one look from outside."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpuslice import hardware
from gpuslice.checkpoint import Records
from gpuslice.config import Config
from gpuslice.core import cards, gpucodec, health
from gpuslice.core.health import Taints
from gpuslice.core.inventory import Inventory
from gpuslice.core.model import ClaimUid, Gpu, GpuUuid, LiveGpu, Taint
from gpuslice.core.policy.rules import Misfit, Policy
from gpuslice.core.record import Record
from gpuslice.core.typed import Fields
from gpuslice.errors import ConfigError, DeviceError, StateError
from gpuslice.nvml.api import Nvml
from gpuslice.nvml.listing import LIMIT_S, Attempt, Listing
from gpuslice.system import documents, files, refusals
from gpuslice.system.host import Host

_CARDS = "gpus.json"
_OF_POLICY = "policy: "  # the beginning of sentences about a policy


def read_policy(path: Path | None) -> Policy:
    """The policy file, or the default of everything. ConfigError names the file."""
    if path is None:
        return Policy.default()
    body = documents.read(path, "policy file", "docs/policy.md")
    try:
        return Policy.parse({} if body is None else body)
    except ConfigError as e:
        raise ConfigError(_of_file(path, f"{_OF_POLICY}{str(e).removeprefix(_OF_POLICY)}")) from e


def sentences(misfits: Iterable[Misfit], path: Path | None) -> tuple[str, ...]:
    """The settings of the policy that these cards cannot follow: each sentence once, with the file."""
    return tuple(_of_file(path, sentence) for sentence in dict.fromkeys(misfit.sentence for misfit in misfits))


def _of_file(path: Path | None, sentence: str) -> str:
    of_policy = sentence.removeprefix(_OF_POLICY)
    return sentence if path is None or of_policy == sentence else f"policy file {path}: {of_policy}"


class Cards:
    """The cards of the node. A card that is unreadable now is as it was last seen, so that its pool stays."""

    def __init__(self, nvml: Nvml, host: Host, folder: Path, limit_s: float = 2 * LIMIT_S) -> None:
        """`folder` is the plugin's. `limit_s` is for the list of all cards; each card has its own limit, too."""
        self._nvml, self._host = nvml, host
        self._folder, self._claims = folder, folder / "claims"
        self._list, self._limit_s = _list(nvml), limit_s

    def known(self) -> tuple[tuple[Gpu, ...], tuple[str, ...]]:
        """The cards in bus order, with one sentence for each problem. Nothing is written."""
        listed, hung = self._listed()
        lost = hung or self._nvml.lost()
        # A folder of this boot shows that a driver ran in this boot, so a missing card was lost while it ran.
        same_boot = _is_folder(self._claims / self._host.boot_id())
        gpus, sentences = cards.known(listed, last_seen(self._folder), keep_missing=same_boot or bool(lost))
        return gpus, (*lost, *sentences, *cards.none_of(gpus))

    def save(self, gpus: Iterable[Gpu]) -> None:
        """Save the cards that `known` uses at the next start, if NVML does not list them."""
        files.write_atomic(self._folder / _CARDS, json.dumps(gpucodec.encode(tuple(gpus))))

    def news(self, served: Iterable[Gpu]) -> str:
        """Why a process that serves these cards should restart: cards that it does not know. "" if there are none."""
        listed, _ = self._listed()
        names = ", ".join(f"{gpu.uuid} ({gpu.product}, {gpu.bus_id})" for gpu in cards.new(listed, served))
        return f"{names}: new on this node; the process restarts to offer the new cards" if names else ""

    def _listed(self) -> tuple[tuple[Gpu, ...], tuple[str, ...]]:
        """All cards, and a sentence if NVML does not list them."""
        try:
            return tuple(map(self._host.locate, self._list.result(self._limit_s))), ()
        except DeviceError as e:
            return (), (str(e),)


def listed(nvml: Nvml, limit_s: float = 2 * LIMIT_S) -> tuple[tuple[Gpu, ...], tuple[str, ...]]:
    """The cards, for one look, and a sentence for each card that cannot be read. DeviceError if NVML does not list them
    within `limit_s`."""
    return _list(nvml).result(limit_s), nvml.lost()


def _list(nvml: Nvml) -> Attempt[tuple[Gpu, ...]]:
    return Attempt("the list of this node's GPUs", nvml.gpus)


def last_seen(folder: Path) -> tuple[Gpu, ...]:
    """The cards of the last start, in this folder of the plugin. Empty if none are known."""
    try:
        return gpucodec.decode(json.loads(files.read_plain(folder / _CARDS)))
    except (OSError, ValueError, RecursionError):
        return ()  # an incomplete file of a power loss: only the listed cards are known


# ---------------------------------------------------------------- a look from outside


@dataclass(frozen=True, slots=True)
class Node:
    """What the commands `devices` and `claims` show of a node. `notes`: one sentence for each further problem."""

    inventory: Inventory
    live: Mapping[GpuUuid, LiveGpu]
    records: Mapping[ClaimUid, Record]
    taints: Taints
    notes: tuple[str, ...] = ()


@contextlib.contextmanager
def snapshot(config: Config) -> Iterator[Node]:
    """One look at the node, while a driver may run. It changes nothing. Missing settings are those of the running driver."""
    config = _as_running(config)
    policy = read_policy(config.policy)
    with hardware.visit(config) as (nvml, host):
        gpus, lost = Cards(nvml, host, config.plugin_folder).known()
        inventory = Inventory.of(gpus, policy, config.node_name)
        live, unwell = _looks(nvml, [pool.gpu.uuid for pool in inventory.pools])
        found, broken = _records(config)
        taints = health.taints(inventory, live, unwell, found.values(), {})
        notes = (*lost, *policy.unused(gpus), *sentences(inventory.notes, config.policy), *broken)
        yield Node(inventory, live, found, taints, notes)


def records(config: Config) -> tuple[Mapping[ClaimUid, Record], tuple[str, ...]]:
    """The records of the node, and a sentence for each unreadable one. Needs no GPU and no NVML."""
    try:
        found, notes = _records(_as_running(config))
    except StateError as e:
        found, notes = _records(config)
        return found, (str(e), *notes)
    return found, notes if found or config.plugin_folder.exists() else (_nothing_here(config),)


def records_folder(config: Config) -> Path | None:
    """The folder with the records of this boot; None if no driver has run in this boot. Missing settings are those of the
    driver that ran; if its file is damaged, as after a loss of power, `config` alone counts."""
    try:
        running = _as_running(config)
    except StateError:
        running = config
    return _records_folder(running)


def _records(config: Config) -> tuple[Mapping[ClaimUid, Record], tuple[str, ...]]:
    folder = _records_folder(config)
    if folder is None:
        return {}, ()
    kept = Records(folder)
    return kept.records(), kept.broken()


def _records_folder(config: Config) -> Path | None:
    folder = config.plugin_folder / "claims"
    if not _is_folder(folder) or not _is_folder(folder := folder / hardware.boot_id(config)):
        return None
    return folder


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as e:
        raise StateError(refusals.unreadable(path, e)) from e


def _nothing_here(config: Config) -> str:
    return (
        f"no driver has run with the folder {config.plugin_folder}; if one has run with another folder, use its "
        "--kubelet-plugins-directory-path and --driver-name"
    )


def _looks(nvml: Nvml, gpus: Sequence[GpuUuid]) -> tuple[Mapping[GpuUuid, LiveGpu], Mapping[GpuUuid, Taint]]:
    """The state of each card, and the reason for each card without a state."""
    looks: Listing[tuple[GpuUuid, LiveGpu]] = Listing(name=lambda index: f"GPU {gpus[index]}")
    found, lost = looks.read(range(len(gpus)), lambda index: (gpus[index], nvml.look(gpus[index])))
    live = dict(found)
    silent = [uuid for uuid in gpus if uuid not in live]
    return live, {uuid: Taint("gpu", "lost", reason=why) for uuid, why in zip(silent, lost, strict=True)}


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
    """The whole path of a node file, because the next command may run in another folder."""
    return str(Path(simulate).absolute()) if "/" in simulate or Path(simulate).suffix else simulate


def _as_running(config: Config) -> Config:
    path = config.plugin_folder / "running.json"
    if config.node_name or config.simulate:
        return replace(config, node_name=config.node_name or "this-node")
    try:
        body = json.loads(files.read_plain(path))
    except FileNotFoundError:
        return replace(config, node_name="this-node")  # no driver has run here
    except OSError as e:
        raise StateError(refusals.unreadable(path, e)) from e
    except (ValueError, RecursionError) as e:
        raise StateError(f"{path} is not JSON ({e}); {_INSTEAD}") from e
    try:
        return replace(config, **_settings(Fields(body, ""), config))
    except (ValueError, ConfigError) as e:
        raise StateError(f"{path} is not what a driver writes ({e}); {_INSTEAD}") from e


_INSTEAD = "start the driver again, or use --node-name, and --simulate if the node is simulated"


def _settings(settings: Fields, config: Config) -> dict[str, Any]:
    """The settings that the driver saved."""
    policy, folder = settings.optional_text("policy", empty=True), settings.optional_text("simulate_folder", empty=True)
    return {
        "node_name": settings.text("node_name"),
        "policy": config.policy or (Path(policy) if policy else None),
        "simulate": settings.optional_text("simulate", empty=True) or "",
        "simulate_folder": Path(folder) if folder else None,
        "simulate_latency": settings.optional_text("simulate_latency") or config.simulate_latency,
    }
