"""The tests of `kernel_refusals.py`, each in a process of its own.

Their audit hook stays in a process for ever. With it, two threads that start at once under coverage can fail in Python 3.11
("Cannot install a trace function while another trace function is being installed").
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent / "kernel_refusals.py"
NAMES = re.findall(r"^(?:async )?def (test_\w+)", TESTS.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
def test_what_the_kernel_refuses(name: str, unmeasured: None) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{TESTS}::{name}"]

    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=TESTS.parents[1])

    assert done.returncode == 0, done.stdout[-3000:]
