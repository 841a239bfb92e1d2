"""The kubeconfig: the API server and the login. An unusable file becomes one sentence."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import urllib3

from gpuslice.client_library import Configuration, config
from gpuslice.errors import ConfigError

_LONGEST_REASON = 200  # characters of an error of the client library


@contextlib.contextmanager
def usable(kubeconfig: Path | None) -> Iterator[None]:
    """Translate every error in the block, because the client library raises any error that a file's content causes."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as e:
        text = f"{type(e).__name__}: {' '.join(str(e).split())}"[:_LONGEST_REASON]
        if kubeconfig is None:
            said = f"cannot use this pod's service account for the API server ({text}); outside a pod, use --kubeconfig"
        elif isinstance(e, OSError) and not isinstance(e, ValueError) and e.strerror:
            said = f"kubeconfig {kubeconfig} cannot be read ({e.strerror}); check path and permissions"
        else:
            said = f"kubeconfig {kubeconfig} is not usable ({text}); try it with kubectl --kubeconfig {kubeconfig} get nodes"
        raise ConfigError(said) from e


def read(kubeconfig: Path | None) -> Configuration:
    """The configuration of one server with its login, from a file or from this pod. Call it within `usable`."""
    configuration = Configuration()
    if kubeconfig is None:
        config.load_incluster_config(client_configuration=configuration)
    elif not kubeconfig.exists():  # the library would call the file invalid
        raise ConfigError(f"kubeconfig {kubeconfig} does not exist; check the path that --kubeconfig names")
    else:
        config.load_kube_config(str(kubeconfig), client_configuration=configuration, persist_config=False)
    if urlsplit(configuration.host).scheme not in ("http", "https"):
        raise ConfigError(
            f"kubeconfig {kubeconfig} names the server {configuration.host!r}, which is not a URL; write https://HOST:PORT"
        )
    # A proxy that is set stays. Otherwise the library sets the host again at each request, and looks through the whole
    # environment for a proxy: a third of the time of a claim's fetch (measured).
    configuration.proxy = configuration.proxy
    configuration.connection_pool_maxsize = 16
    configuration.keep_alive = True  # TCP keepalive: without it a half-open watch hangs for ever
    # A kept-alive connection may have died unnoticed, so one more try. The callers decide what a status means
    # (urllib3 by itself would sleep for a Retry-After of any length, inside a prepare).
    configuration.retries = urllib3.Retry(
        total=2, connect=1, read=1, redirect=0, status=0, status_forcelist=(), respect_retry_after_header=False
    )
    return configuration
