"""The output of `devices` and `claims` for programs (-o json, -o yaml). New releases add keys, but never change one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gpuslice import report
from gpuslice.core import plan, share
from gpuslice.core.inventory import Pool
from gpuslice.core.model import MIB, ClaimUid, Partition
from gpuslice.core.record import Grant, Record
from gpuslice.node import Node

_Json = dict[str, Any]


def devices(node: Node) -> _Json:
    return {"gpus": [_gpu(node, pool) for pool in node.inventory.pools], "warnings": list(node.notes)}


def claims(records: Mapping[ClaimUid, Record], notes: Sequence[str]) -> _Json:
    found = sorted(records.values(), key=lambda record: record.plan.ref)
    return {"claims": [_claim(record) for record in found], "warnings": list(notes)}


def _gpu(node: Node, pool: Pool) -> _Json:
    gpu, live = pool.gpu, node.live.get(pool.gpu.uuid)
    foreign = () if live is None else plan.foreign_partitions(gpu.uuid, live, node.records.values())
    return {
        "index": gpu.index,
        "uuid": gpu.uuid,
        "busId": gpu.bus_id,
        "pool": pool.name,
        "product": gpu.product,
        "memoryMiB": gpu.memory_bytes // MIB,
        "readable": live is not None,
        "mig": live.mig if live is not None else None,
        "partitions": [_partition(pool, p, foreign=p in foreign) for p in (live.partitions if live else ())],
        "devices": [
            {"name": device.ref.device, "type": share.mode(device.offer.sharing, device.offer.slot)}
            for device in pool.devices
        ],
        "holders": [
            {"claim": _ref(record), "state": report.state(record), **_grant(record, number, grant)}
            for record in node.records.values()
            for number, grant in enumerate(record.plan.grants)
            if grant.gpu == gpu.uuid
        ],
        "unusable": report.reasons(pool, node.taints),
    }


def _partition(pool: Pool, partition: Partition, *, foreign: bool) -> _Json:
    profile = pool.gpu.profile(partition.profile)
    return {
        "profile": profile.name if profile is not None else None,
        "profileId": partition.profile,
        "start": partition.placement.start,
        "size": partition.placement.size,
        "uuid": partition.uuid,
        "foreign": foreign,
    }


def _claim(record: Record) -> _Json:
    grants = [_grant(record, number, grant) for number, grant in enumerate(record.plan.grants)]
    return {**_ref(record), "state": report.state(record), "devices": grants}


def _ref(record: Record) -> _Json:
    return {"namespace": record.plan.ref.namespace, "name": record.plan.ref.name, "uid": record.plan.ref.uid}


def _grant(record: Record, number: int, grant: Grant) -> _Json:
    made = record.prepared.devices if record.prepared else ()
    mine = share.of(grant)
    return {
        "request": grant.allocation.request,
        "pool": grant.allocation.device.pool,
        "device": grant.allocation.device.device,
        "type": share.mode(grant.sharing, grant.slot),
        "gpu": grant.gpu,
        "uuid": made[number].uuid if number < len(made) else None,
        "memoryMiB": mine.memory_mib if mine is not None else None,
    }
