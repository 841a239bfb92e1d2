"""The NVML contract and the edits of a container, on the real card; without a card, on the simulated one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from hack.lib.gpu.bundle import TREE
from hack.lib.gpu.results import Results
from hack.lib.gpu.stages.machine import Machine

_OUTCOME = re.compile(r"^(tests/\S+::\S+(?: \S+)*?) (PASSED|FAILED|ERROR|SKIPPED)(?: \((.*)\))?")


def run(machine: Machine, results: Results) -> None:
    real = machine.driver_root is not None
    which = ["-k", "real"] if real else ["-k", "not real and h100"]
    files = ["tests/nvml/test_contract.py", *(["tests/gpu"] if real else [])]
    command = [sys.executable, "-m", "pytest", "-v", "-rs", "-p", "no:cacheprovider", "--tb=short", *which, *files]
    done = subprocess.run(
        command, cwd=TREE, env=machine.program_environment(), capture_output=True, text=True, check=False
    )
    print(done.stdout, done.stderr)
    outcomes = [match for line in done.stdout.splitlines() if (match := _OUTCOME.match(line))]
    if not real:
        passed = sum(match[2] == "PASSED" for match in outcomes)
        results.leave_out("the NVML contract on a real card", "no NVIDIA driver here")
        results.check("the NVML contract on a simulated h100", done.returncode == 0, f"{passed} tests passed")
        return
    for match in outcomes:
        name = Path(match[1].partition("::")[0]).name + " " + match[1].partition("::")[2].replace("_", " ")
        if match[2] == "SKIPPED":
            results.leave_out(name, match[3] or "")
        else:
            results.check(name, match[2] == "PASSED")
    results.check("the tests on a real card ran", bool(outcomes), f"exit code {done.returncode}")
