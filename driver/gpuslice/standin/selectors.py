"""Field and label selectors of a request."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from gpuslice.core.json import Body
from gpuslice.standin.kinds import KINDS
from gpuslice.standin.store import RefusalError


def matching(resource: str, query: Mapping[str, str]) -> Callable[[Body], bool]:
    """Whether the selectors of this query select an object. 400 for a field that the resource does not index."""
    wanted: list[tuple[list[str], str]] = []
    for term in filter(None, query.get("fieldSelector", "").split(",")):
        field, _, value = term.partition("=")
        if field not in KINDS[resource].fields | {"metadata.name"}:
            raise RefusalError(400, "BadRequest", f"field label not supported: {field}")
        wanted.append((field.split("."), value.removeprefix("=")))
    labels = [term.partition("=") for term in filter(None, query.get("labelSelector", "").split(","))]
    return lambda body: (
        all((body.get(at) or {}).get(field, "") == value for (at, field), value in wanted)
        and all(((body.get("metadata") or {}).get("labels") or {}).get(key) == value for key, _, value in labels)
    )
