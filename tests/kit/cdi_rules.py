"""The rules of a container runtime for a CDI file of version 0.5.0, from the CDI specification, SPEC.md."""

from __future__ import annotations

import re
from typing import cast

Body = dict[str, object]

_KIND = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*[A-Za-z0-9]/[A-Za-z][A-Za-z0-9_-]*[A-Za-z0-9]")
_DEVICE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.:-]*[A-Za-z0-9])?")
_MOMENTS = {"prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"}
_EDITS = {"env", "deviceNodes", "mounts", "hooks"}
_FIELDS = {
    "deviceNodes": {"path", "hostPath", "type", "major", "minor", "fileMode", "permissions", "uid", "gid"},
    "mounts": {"hostPath", "containerPath", "options", "type"},
    "hooks": {"hookName", "path", "args", "env", "timeout"},
}


def faults(body: Body) -> list[str]:
    """Everything that a strict reader would refuse. Empty for a good file."""
    found = [f"unknown field {key}" for key in body.keys() - {"cdiVersion", "kind", "devices", "containerEdits"}]
    found += [] if body["cdiVersion"] == "0.5.0" else ["version"]
    found += [] if _KIND.fullmatch(str(body["kind"])) else ["kind"]
    devices = cast(list[Body], body["devices"])
    names = [str(device["name"]) for device in devices]
    found += [] if names and len(set(names)) == len(names) else ["names"]
    for device in devices:
        found += [] if _DEVICE.fullmatch(str(device["name"])) else ["device name"]
        found += [f"unknown field {key}" for key in device.keys() - {"name", "annotations", "containerEdits"}]
        found += _edit_faults(cast(Body, device["containerEdits"]))
    return found


def _edit_faults(edits: Body) -> list[str]:
    found = [f"unknown edit {key}" for key in edits.keys() - _EDITS] + ([] if edits else ["empty edits"])
    for kind, fields in _FIELDS.items():
        items = cast(list[Body], edits.get(kind, []))
        found += [f"unknown field {key} of {kind}" for item in items for key in item.keys() - fields]
    found += [f"env {value}" for value in cast(list[str], edits.get("env", [])) if not re.match(r"[^=]+=", value)]
    for node in cast(list[Body], edits.get("deviceNodes", [])):
        good = (
            str(node["path"]).startswith("/")
            and str(node["type"]) in "bcup"
            and set(str(node["permissions"])) <= set("rwm")
        )
        found += [] if good else [f"node {node}"]
    for mount in cast(list[Body], edits.get("mounts", [])):
        good = str(mount["hostPath"]).startswith("/") and str(mount["containerPath"]).startswith("/")
        found += [] if good else [f"mount {mount}"]
    for hook in cast(list[Body], edits.get("hooks", [])):
        good = hook["hookName"] in _MOMENTS and str(hook["path"]).startswith("/")
        found += [] if good else [f"hook {hook}"]
    return found
