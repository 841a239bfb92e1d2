"""One stage: `python -m hack.lib.gpu.stages NAME`, in the environment that `hack/gpu run` makes."""

from __future__ import annotations

import importlib
import signal
import sys

from hack.lib.gpu.results import Results
from hack.lib.gpu.stages.machine import Machine


def _stop(*_: object) -> None:
    """A stage that exceeds its time limit undoes what it began."""
    sys.exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    name = sys.argv[1]
    found = Machine.of_environment()
    importlib.import_module(f"hack.lib.gpu.stages.{name}").run(found, Results(found.out, name))
