"""driver/gpuslice/pb/ is exactly what the generator makes of proto/."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_generated_code_is_what_the_protos_generate(tmp_path: Path) -> None:
    made = subprocess.run(
        ["bash", "hack/proto", str(tmp_path)], cwd=ROOT, env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}
    )

    assert made.returncode == 0
    expected = {path.name: path.read_text() for path in (tmp_path / "gpuslice/pb").iterdir()}
    kept = {path.name: path.read_text() for path in (ROOT / "driver/gpuslice/pb").glob("*_pb2*")}
    assert kept == expected
