"""The sentences with which the driver refuses a claim, read from the source."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from gpuslice.core import params, plan
from gpuslice.errors import ClaimError, DeviceError

from hack.lib.docs import source
from hack.lib.docs.text import table

_CLAIM, _DEVICE = ClaimError.__name__, DeviceError.__name__
_PARAMETERS = Path(params.__file__)
_OF_A_CLAIM = ("core", "plugin")  # a DeviceError in another room is about the node, not about a claim


def parameters() -> str:
    """Refusals of opaque parameters that the driver does not accept."""
    return _listed(text for path, text in _sentences(_CLAIM) if path == _PARAMETERS)


def devices() -> str:
    """Every other refusal of a claim, except refusals of bodies that no API server makes."""
    found = (text for path, text in _sentences(_CLAIM) if path != _PARAMETERS)
    return _listed(text for text in found if not text.endswith("is broken"))


def node() -> str:
    """Refusals that only a change of the node can end."""
    found = (text for path, text in _sentences(_DEVICE) if path.relative_to(source.PRODUCT).parts[0] in _OF_A_CLAIM)
    return _listed([*source.returned(plan.mode_advice), *found])


def _sentences(error: str) -> Iterator[tuple[Path, str]]:
    """(file, sentence) of every error of this kind that the driver raises."""
    yield from ((path, text) for path, call in source.calls(error) for text in source.texts(call.args[0]))


def _listed(texts: Iterable[str]) -> str:
    return table(["the event says"], ([text.replace("<", "&lt;")] for text in texts))
