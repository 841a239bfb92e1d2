"""Files of other tools, told by what is in them, so that one of them in the place of a policy is called by its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_MIG_PARTED = "a layout file of NVIDIA's mig-parted (the MIG manager of the GPU Operator)"
_DEVICE_PLUGIN = "a configuration of NVIDIA's device plugin"
_TEXTS = (("mig-configs:", _MIG_PARTED), ("mig-devices:", _MIG_PARTED), ("sharing:", _DEVICE_PLUGIN))
_KINDS = {
    "ClusterPolicy": "the ClusterPolicy of NVIDIA's GPU Operator",
    "SliceConfig": "a SliceConfig, which are the opaque parameters of a claim",
}


def name(body: object) -> str | None:
    """What this document is, where it is known and no policy."""
    match body:
        case {"mig-configs": _}:
            return _MIG_PARTED
        case [{"mig-enabled": _}, *_] | [{"mig-devices": _}, *_]:
            return f"{_MIG_PARTED}, without version and mig-configs"
        case {"sharing": _} | {"version": "v1", "flags": _}:
            return _DEVICE_PLUGIN
        case {"kind": "ConfigMap", "data": {**data}}:
            return _config_map(data)
        case {"kind": str() as kind} if kind in _KINDS:
            return _KINDS[kind]
        case {**texts} if texts and all(isinstance(text, str) and "\n" in text for text in texts.values()):
            inside = _inside([str(text) for text in texts.values()])
            return f"the data of a ConfigMap with {inside}" if inside else None
        case _:
            return None


def _config_map(data: Mapping[object, object]) -> str:
    ours = [key for key, text in data.items() if "kind: Policy" in str(text)]
    if ours:
        return f"a ConfigMap with a Policy below data.{ours[0]}, of which only that text is the policy"
    inside = _inside([str(text) for text in data.values()])
    return f"a ConfigMap with {inside}" if inside else "a ConfigMap"


def _inside(texts: Sequence[str]) -> str | None:
    return next((what for sign, what in _TEXTS for text in texts if sign in text), None)
