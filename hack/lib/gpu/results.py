"""The results of a run: one line of JSON per check, written at once, so that an early end loses no result."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

FILE = "results.jsonl"
YES, NO, LEFT_OUT = "yes", "no", "left out"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """`name` is a statement. `result` says whether the statement is true here."""

    stage: str
    name: str
    result: str  # YES, NO or LEFT_OUT
    value: str = ""  # the observation, or why the check was left out
    seconds: float = 0.0  # duration of the check


class Results:
    def __init__(self, folder: Path, stage: str) -> None:
        self._path, self._stage = folder / FILE, stage
        self._begun = time.monotonic()

    def check(self, name: str, holds: bool, value: object = "") -> bool:
        return self._write(name, YES if holds else NO, str(value)) == YES

    def leave_out(self, name: str, why: str) -> None:
        self._write(name, LEFT_OUT, why)

    @contextlib.contextmanager
    def trying(self, name: str) -> Iterator[None]:
        """Any exception inside the block means that the statement is false. The stage continues."""
        try:
            yield
        except Exception as e:  # noqa: BLE001  the next check may succeed
            self.check(name, False, f"{type(e).__name__}: {e}")

    def _write(self, name: str, result: str, value: str) -> str:
        now = time.monotonic()
        seconds, self._begun = round(now - self._begun, 3), now
        found = CheckResult(stage=self._stage, name=name, result=result, value=value[:4000], seconds=seconds)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(found), ensure_ascii=False) + "\n")
        print(f"  {result:8} {name}{': ' if value else ''}{' '.join(value.split())[:300]}", flush=True)
        return result


def read(folder: Path) -> list[CheckResult]:
    path = folder / FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [CheckResult(**json.loads(line)) for line in lines]
