"""hack/gpu without a GPU: the packed folder, its faults, the stages, and the table of the results."""

from __future__ import annotations

import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from hack.lib.cluster import image
from hack.lib.gpu import bundle, report, results, run
from hack.lib.gpu.bundle import About
from hack.lib.gpu.errors import GpuError
from hack.lib.gpu.results import Results

ROOT = Path(__file__).parents[2]
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"


def a_pack(folder: Path, **changed: object) -> Path:
    """A folder as `hack/gpu pack --facts` makes it, with one small file as its packages."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "site.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("nothing.py"), io.BytesIO())
    values: dict[str, object] = {
        "revision": "abc",
        "machine": platform.machine(),
        "pythons": [HERE],
        "archives": {"site.tar": bundle.digest(folder / "site.tar")},
        "contents": {},
    }
    About(**{**values, **changed}).write(folder)  # type: ignore[arg-type]
    return folder


def _hack_gpu(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "hack" / "gpu"), *map(str, arguments)]
    env = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


# ---------------------------------------------------------------- a folder with something wrong


def test_a_folder_that_is_no_pack_is_refused_in_one_sentence(tmp_path: Path) -> None:
    done = _hack_gpu("run", tmp_path)

    assert done.returncode == 1
    assert done.stderr == (
        f"hack/gpu: {tmp_path} has no pack.json, so it is not a packed folder, or an incomplete one; make it again with "
        "hack/gpu pack\n"
    )


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"machine": "riscv64"}, f"was packed for riscv64, and this machine is {platform.machine()}"),
        ({"pythons": ["2.7"]}, f"was packed for Python 2.7, and this is Python {HERE}"),
        ({"archives": {"site.tar": "", "programs.tar.xz": ""}}, "lacks programs.tar.xz, so it is incomplete"),
        ({"format": 7}, "has format 7, and this tree reads format 1"),
    ],
    ids=["another machine", "another Python", "a missing archive", "another format"],
)
def test_a_pack_that_does_not_fit_is_refused(tmp_path: Path, changed: dict[str, object], sentence: str) -> None:
    with pytest.raises(GpuError, match=sentence):
        bundle.read(a_pack(tmp_path, **changed))


def test_a_mark_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (a_pack(tmp_path) / "pack.json").write_text('{"revision"', encoding="utf-8")

    with pytest.raises(GpuError, match=r"pack\.json cannot be read .*make it again with hack/gpu pack"):
        bundle.read(tmp_path)


def test_a_damaged_archive_is_refused_before_it_is_laid_out(tmp_path: Path) -> None:
    about = bundle.read(a_pack(tmp_path))
    with (tmp_path / "site.tar").open("ab") as file:
        file.write(b"x")

    with pytest.raises(GpuError, match=r"site\.tar is damaged: its SHA-256 is not that of pack\.json"):
        bundle.archive(tmp_path, about, "site")


def test_a_stage_that_nobody_knows_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    done = _hack_gpu("run", a_pack(tmp_path / "pack"), "--only", "facts,magic", "--out", tmp_path / "out")

    assert done.returncode == 1
    assert done.stderr.startswith("hack/gpu: there is no stage 'magic'; there are machine, facts, stack, ")


def test_no_results_are_no_table(tmp_path: Path) -> None:
    with pytest.raises(GpuError, match=r"has no results\.jsonl; name the folder of the results of hack/gpu run"):
        report.report(tmp_path)


# ---------------------------------------------------------------- stages and results


def test_each_check_is_on_disk_at_once_and_an_error_ends_one_check_only(tmp_path: Path) -> None:
    stage = Results(tmp_path, "trial")
    stage.check("water is wet", True, "it is")
    with stage.trying("the sky is green"):
        int("blue")
    stage.leave_out("the moon is near", "nobody went")

    found = results.read(tmp_path)

    assert [(check.name, check.result) for check in found] == [
        ("water is wet", "yes"),
        ("the sky is green", "no"),
        ("the moon is near", "left out"),
    ]
    assert found[1].value == "ValueError: invalid literal for int() with base 10: 'blue'"


def test_a_stage_that_is_too_slow_is_ended_and_said_so(tmp_path: Path) -> None:
    code = run.run_stage(run.StageSpec("contract", 0.0), tmp_path, None, None, tmp_path, lambda text: None)

    (check,) = results.read(tmp_path)
    assert code != 0
    assert (check.stage, check.name, check.result) == ("contract", "the stage ran to its end", "no")
    assert check.value == "it took longer than 0 s; see log.txt"


def test_a_stage_whose_programs_are_not_packed_is_left_out(tmp_path: Path) -> None:
    code = run.run_stage(run.StageSpec("stack", 60, programs=True), tmp_path, None, None, tmp_path, lambda text: None)

    assert code == 0
    assert [check.result for check in results.read(tmp_path)] == ["left out"]


def test_the_table_has_a_row_for_each_check_and_the_lines_that_are_proven(tmp_path: Path) -> None:
    stage = Results(tmp_path, "mps")
    stage.check("the ceiling holds", True, "ok | error 2")
    stage.check("two users at once", True)
    stage.check("managed memory is kept within the ceiling too", False, "ok")

    text = report.report(tmp_path)

    assert "3 checks: 2 hold, 1 do not, 0 were left out." in text
    assert "| mps | the ceiling holds | yes | ok / error 2 |" in text
    assert "* MPS: `-multiuser-server` with programs of several users …" in text
    assert "* `nvidia-smi` of the examples" not in text


def test_what_the_report_calls_proven_is_written_down_somewhere() -> None:
    pages = "".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("unproven.md", "on-a-gpu.md"))

    assert [line for line in report.PROVES if line not in pages] == []


# ---------------------------------------------------------------- a program in the container image


def test_a_program_comes_into_the_image_with_the_libraries_that_it_needs(tmp_path: Path) -> None:
    program = Path(str(shutil.which("ls"))).resolve()
    image.write(tmp_path / "image.tar", program, ["true"], [str(program)], simulated=False)

    with tarfile.open(tmp_path / "image.tar") as tar:
        blobs = [tar.extractfile(member) for member in tar.getmembers() if member.name.startswith("blobs/")]
        layer = max((blob.read() for blob in blobs if blob is not None), key=len)
    with tarfile.open(fileobj=io.BytesIO(layer)) as tar:
        names = tar.getnames()

    assert f"usr/bin/{program.name}" in names
    assert any(name.endswith("/libc.so.6") for name in names)
    assert any("/ld-linux" in name for name in names)
    assert "usr/bin/nvidia-smi" not in names  # a real one comes with the driver


# ---------------------------------------------------------------- the short form of a rehearsal


@pytest.mark.timeout(240)  # it downloads packages and makes two environments
def test_a_pack_of_facts_is_made_and_its_stages_run_without_a_network(tmp_path: Path) -> None:
    made = _hack_gpu("pack", "--facts", "--uncompressed", "--python", HERE, tmp_path / "pack")
    if "check that the package index can be reached" in made.stderr:
        pytest.skip(made.stderr.strip().splitlines()[-1])
    assert made.returncode == 0, made.stderr

    apart = ["unshare", "--net"] if os.geteuid() == 0 and shutil.which("unshare") else []
    clean = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "OUT": str(tmp_path / "out")}
    command = [
        *apart,
        "bash",
        str(ROOT / "hack" / "gpu"),
        "run",
        str(tmp_path / "pack"),
        "--only",
        "machine,facts,stack",
    ]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    found = {check.name: check for check in results.read(tmp_path / "out")}
    assert found["the kernel is Linux, not gVisor"].value == Path("/proc/version").read_text(encoding="utf-8").strip()
    assert found["the stage runs"].value.startswith("this pack has no programs")
    assert "NVML answers" in found
    about = json.loads((tmp_path / "pack" / "pack.json").read_text(encoding="utf-8"))
    assert about["pythons"] == [HERE]
