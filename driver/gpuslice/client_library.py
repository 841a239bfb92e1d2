"""The parts of the Kubernetes client library that this driver uses. Import them only from here.

The library's own `__init__` imports everything (watches, streams, elections, the dynamic client), and its kubeconfig loader
imports `requests` for logins by OpenID Connect. The driver uses none of that: 140 modules and 5.5 MB of its memory (measured
with 37.0.2). So the package is entered without its `__init__`, and `requests_oauthlib` is imported by the first such login.

`ApiClient` imports `pydantic` for the answers of typed calls and for secrets in their arguments. The driver makes no such
call, so both are empty here: a quarter of the driver's start and 7 MB of its memory (measured with 37.0.2).
"""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Generic, TypeVar

_OIDC, _PYDANTIC = "requests_oauthlib", "pydantic"
T = TypeVar("T")


class _LaterModule(ModuleType):
    """Replaces a module until the first call of one of its functions."""

    @staticmethod
    def OAuth2Session(*arguments: Any, **options: Any) -> Any:  # noqa: N802 - the library's name
        return getattr(_real(_OIDC), "OAuth2Session")(*arguments, **options)  # noqa: B009 - of an untyped module

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import system asks for these
            raise AttributeError(name)
        return getattr(_real(_OIDC), name)


def _real(name: str) -> ModuleType:
    if isinstance(sys.modules.get(name), _LaterModule):
        del sys.modules[name]
    return importlib.import_module(name)


def _enter(name: str) -> None:
    """Make the parts of a package importable without its `__init__`."""
    spec = find_spec(name)
    if name in sys.modules or spec is None or spec.submodule_search_locations is None:
        return
    package = ModuleType(name)
    package.__spec__, package.__path__ = spec, list(spec.submodule_search_locations)
    sys.modules[name] = package


class _TypedAnswer(Generic[T]):
    """Replaces `ApiResponse`, which only methods that the driver never calls return."""


class _Secret:
    """Replaces `SecretStr`. No argument of the driver is one."""


def _replace(name: str, **parts: object) -> bool:
    """Put an empty module with these parts in the place of one that was not imported yet."""
    if name in sys.modules:
        return False
    vars(sys.modules.setdefault(name, ModuleType(name))).update(parts)
    return True


_enter("kubernetes")
sys.modules.setdefault(_OIDC, _LaterModule(_OIDC))
_replace("kubernetes.client.api_response", ApiResponse=_TypedAnswer, T=T)
_replaced = _replace(_PYDANTIC, SecretStr=_Secret)

from kubernetes import config as config  # noqa: E402
from kubernetes.client.api_client import ApiClient as ApiClient  # noqa: E402
from kubernetes.client.configuration import Configuration as Configuration  # noqa: E402

if _replaced:
    del sys.modules[_PYDANTIC]  # others get the real one
