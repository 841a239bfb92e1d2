"""The sentences with which the driver refuses a claim, as the source has them."""

from __future__ import annotations

from hack.lib.docs import source
from hack.lib.docs.text import table

_DRIVER = source.ROOT / "driver/gpuslice"


def sentences(error: str, *folders: str) -> list[str]:
    """The sentences of every refusal of this kind below these files or folders of the driver."""
    places = [_DRIVER / folder for folder in folders]
    return [
        text
        for path, call in source.calls(error)
        if not {path, *path.parents}.isdisjoint(places)
        for text in source.texts(call.args[0])
    ]


def parameters() -> str:
    """The author of the claim wrote opaque parameters that the driver does not take."""
    return _listed(sentences("ClaimError", "core/params.py"))


def devices() -> str:
    """The claim cannot have what the scheduler gave it. Left out: bodies that no API server makes."""
    found = sentences("ClaimError", "core/claims.py", "core/plan.py", "plugin")
    return _listed([text for text in found if not text.endswith("is broken")])


def node() -> str:
    """The node has to change first."""
    return _listed(sentences("DeviceError", "core", "plugin"))


def _listed(texts: list[str]) -> str:
    return table(["the event says"], ([text.replace("<", "&lt;")] for text in texts))
