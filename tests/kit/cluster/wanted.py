"""Whether the tests on a real Kubernetes run, and the one sentence why not."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

import pytest

from hack.lib.cluster.versions import VERSIONS

ROOT = Path(__file__).parents[3]
HERE = ROOT / "tests" / "e2e"
HACK_CLUSTER = (str(ROOT / "hack" / "cluster"),)


def asked_for(config: pytest.Config, *, alone: bool = False) -> bool:
    """Whether what was typed covers this folder at all; `alone`: and nothing else."""
    given = [(config.invocation_params.dir / argument.partition("::")[0]).resolve() for argument in config.args]
    inside = [path.is_relative_to(HERE) for path in given]
    return all(inside) if alone else any(inside) or any(HERE.is_relative_to(path) for path in given)


def version(config: pytest.Config) -> str:
    """Of Kubernetes: what was asked for, else the default of `hack/cluster`."""
    return str(config.getoption("cluster_version") or VERSIONS[0])


@cache
def refusal(config: pytest.Config) -> str:
    """Why these tests are left out; "" if they run."""
    if hasattr(config, "workerinput") or config.getoption("numprocesses", None):
        return "one machine has room for one cluster, and several processes run the tests; run pytest tests/e2e beside them"
    if config.getoption("cluster"):
        return ""
    checked = subprocess.run(
        [*HACK_CLUSTER, "check", "--version", version(config)], capture_output=True, text=True, check=False
    )
    return checked.stderr.strip().removeprefix("hack/cluster: ")
