"""JSON objects by permitted use: every alias is here, so that a name means one thing. Also the reading of the API server's
answers: an odd part of an answer, at any depth, affects no other part."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

Body = dict[str, Any]  # an object of the API, as json.loads gives it; may be changed and sent back
ReadOnlyBody = Mapping[str, Any]  # only read; its shape is trusted, so a wrong shape raises KeyError or TypeError
UncheckedBody = Mapping[str, object]  # of another program; each value is checked before its use

_LONGEST = 1000  # characters of a sentence of another program
_DEPTH = 100  # levels; our objects have about 15, but users may put 10,000 into one
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', re.DOTALL)


def parse(data: bytes) -> Any:
    """The result of `json.loads`. If the text is nested too deep for it, everything below 100 levels is null. ValueError for
    anything that is not JSON."""
    try:
        return json.loads(data)
    except RecursionError:
        return json.loads(_pruned(data))


def _pruned(data: bytes) -> bytes:
    kept, depth, taken = [], 0, 0
    for token in _TOKEN.finditer(data):
        if token[0] in b"[{":
            depth += 1
            if depth == _DEPTH:
                kept.append(data[taken : token.start()] + b"null")
        elif token[0] in b"]}":
            if depth == _DEPTH:
                taken = token.end()
            depth -= 1
    return b"".join(kept) + data[taken:] if depth <= 0 else data[:0]


def parse_object(data: bytes) -> Body:
    """As `parse`, but ValueError for anything that is not an object, and for metadata that is not an object."""
    body = parse(data)
    if not isinstance(body, dict) or not isinstance(body.get("metadata", {}), dict):
        raise ValueError("the answer is not an object, or its metadata is not")
    return body


def is_object(item: object) -> bool:
    """Whether an item of a list is an object of the API. Any other item is no claim and no slice of ours."""
    return isinstance(item, dict) and isinstance(item.get("metadata"), dict) and _texts(item["metadata"], "name", "uid")


def is_claim(item: object) -> bool:
    """Whether an item is a ResourceClaim with readable devices. A claim without an allocation has no devices."""
    if not isinstance(item, dict) or not is_object(item):
        return False
    part: object = item
    for key in ("status", "allocation", "devices"):
        part = part.get(key) if isinstance(part, dict) else part
        if part is None:
            return True
    return isinstance(part, dict) and _objects(part.get("results"), "driver", "pool", "device")


def is_deletion(answer: Body, uid: str) -> bool:
    """Whether an answer says that the object of this UID is deleted: a Status of success, or the deleted object."""
    if answer.get("kind") == "Status":
        return answer.get("status") == "Success"
    return bool(answer.get("metadata", {}).get("uid") == uid)


def answers(sent: ReadOnlyBody, returned: Body) -> bool:
    """Whether the returned slice is the one that was sent. The server may have dropped fields of it."""
    mine, theirs = sent["spec"], returned["spec"]
    same = (mine.get("driver"), mine.get("nodeName"), mine.get("pool", {}).get("name")) == (
        theirs.get("driver"),
        theirs.get("nodeName"),
        theirs["pool"]["name"],
    )
    meta, found = sent["metadata"], returned.get("metadata", {})
    return same and all(meta[key] == found.get(key) for key in ("name", "uid") if key in meta)


def is_resource_slice(item: object, *, stored: bool = True) -> bool:
    """Whether it has all fields that are read of a ResourceSlice, with their types. The answer to a dry run is not
    `stored`."""
    if not isinstance(item, dict) or not _is_spec(item.get("spec")):
        return False
    if not stored:
        return True
    return is_object(item) and str(item["metadata"].get("resourceVersion")).isdecimal()


def is_event(event: Body, is_item: Callable[[object], bool]) -> bool:
    """Whether it is an event of such an item, or a bookmark with the version that a watch has reached."""
    thing = event.get("object")
    if event.get("type") == "BOOKMARK":
        metadata = thing.get("metadata") if isinstance(thing, dict) else None
        return isinstance(metadata, dict) and str(metadata.get("resourceVersion")).isdecimal()
    return event.get("type") in ("ADDED", "MODIFIED", "DELETED") and is_item(thing)


def _is_spec(spec: object) -> bool:
    if not isinstance(spec, dict):
        return False
    pool, devices = spec.get("pool"), spec.get("devices") or []
    return (
        isinstance(pool, dict)
        and _texts(pool, "name")
        and type(pool.get("generation", 0)) is int
        and _objects(devices, "name")
        and all(_objects(device.get("taints"), "key", "effect") for device in devices)
        and all(isinstance(t.get("value", ""), str) for device in devices for t in device.get("taints") or ())
        and _objects(spec.get("sharedCounters"), "name")
    )


def _objects(items: object, *texts: str) -> bool:
    """Whether it is missing, or a list of objects with these texts."""
    if not items:
        return items is None or items == []
    return isinstance(items, list) and all(isinstance(item, dict) and _texts(item, *texts) for item in items)


def _texts(body: Body, *keys: str) -> bool:
    return all(isinstance(body.get(key), str) for key in keys)


def message(data: bytes) -> str:
    """The sentence in the body of an error: a Status object of the API server, or any text of a proxy before it."""
    try:
        return str(json.loads(data)["message"])[:_LONGEST]
    except (ValueError, KeyError, TypeError, RecursionError):
        return data[:200].decode(errors="replace").strip()


def status(thing: Body) -> tuple[int, str]:
    """Code and sentence of a Status object."""
    code = thing.get("code")
    return code if isinstance(code, int) else 500, str(thing.get("message"))[:_LONGEST]
