"""Files of our dependencies that we never import. The image and the packs of `hack/gpu` leave them out."""

from __future__ import annotations

from fnmatch import fnmatch

# The asynchronous Kubernetes client and its dependencies; the other client, except for logins and connections
# (`gpuslice/client_library.py`); time zones.
UNUSED = (
    *(f"kubernetes/{part}" for part in ("aio", "dynamic", "e2e_test", "informer", "leaderelection", "stream", "watch")),
    *("kubernetes/client/api", "kubernetes/client/models/[!_]*", "tzdata", "websocket"),
    *("aiohttp", "aiohttp_retry", "aiohappyeyeballs", "aiosignal", "frozenlist", "multidict", "propcache", "yarl"),
    *("attr", "attrs"),
)


def unused(name: str) -> bool:
    """Whether the driver never imports this file of a wheel."""
    return any(fnmatch(name, pattern) or fnmatch(name, f"{pattern}/*") for pattern in UNUSED)
