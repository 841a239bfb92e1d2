"""One stage: `python -m hack.lib.gpu.stages NAME`, in the environment that `hack/gpu run` makes."""

from __future__ import annotations

import importlib
import sys

from hack.lib.gpu.results import Results
from hack.lib.gpu.stages.machine import Machine

if __name__ == "__main__":
    name = sys.argv[1]
    found = Machine.of_environment()
    importlib.import_module(f"hack.lib.gpu.stages.{name}").run(found, Results(found.out, name))
