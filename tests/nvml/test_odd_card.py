"""One odd card at the real interface: for any answer of one function of NVML, the other card is read as before.

Each runs in its own process, because a loaded library stays loaded. Calls that hang stay behind in threads.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Functions of NVML that are asked for one card, and the verb by which a claim comes to each.
FUNCTIONS = {
    "nvmlDeviceGetHandleByIndex_v2": "",
    "nvmlDeviceGetUUID": "",
    "nvmlDeviceGetName": "",
    "nvmlDeviceGetPciInfo_v3": "",
    "nvmlDeviceGetMemoryInfo_v2": "memory(uuid)",
    "nvmlDeviceGetCudaComputeCapability": "",
    "nvmlDeviceGetArchitecture": "",
    "nvmlDeviceGetFieldValues": "",
    "nvmlDeviceGetMigMode": "look(uuid)",
    "nvmlDeviceGetGpuInstanceProfileInfoV": "",
    "nvmlDeviceGetGpuInstancePossiblePlacements_v2": "",
    "nvmlDeviceGetGpuInstances": "look(uuid)",
    "nvmlDeviceGetMinorNumber": "minor(uuid)",
    "nvmlDeviceGetComputeMode": "compute_mode(uuid)",
    "nvmlDeviceSetComputeMode": "set_compute_mode(uuid, ComputeMode.DEFAULT)",
    "nvmlDeviceSetMigMode": "set_mig_mode(uuid, False)",
    "nvmlDeviceCreateGpuInstanceWithPlacement": "create_gpu_instance(uuid, 9, Placement(4, 4))",
    "nvmlDeviceGetComputeRunningProcesses_v3": "processes(uuid)",
    "nvmlDeviceGetGraphicsRunningProcesses_v3": "processes(uuid)",
    "nvmlDeviceGetMPSComputeRunningProcesses_v3": "processes(uuid)",
}
NODE_FUNCTIONS = ("nvmlSystemGetDriverVersion", "nvmlSystemGetCudaDriverVersion_v2", "nvmlDeviceGetCount_v2")
HANG, FILL, EMPTY, TWIN = -1, -2, -3, -4
IDENTITY = ("nvmlDeviceGetHandleByIndex_v2", "nvmlDeviceGetUUID", "nvmlDeviceGetPciInfo_v3")

_PRELUDE = """
import ctypes, os, sys
from pathlib import Path
from gpuslice.core.model import *
from gpuslice.errors import DeviceError
from gpuslice.nvml.api import *
from gpuslice.nvml.real import RealNvml
root = Path(sys.argv[1])
odd = ctypes.CDLL(str(root / "usr/lib64/libnvidia-ml.so.1"), mode=ctypes.RTLD_GLOBAL).stub_odd
UUID, TWO = "GPU-00000000-1111-2222-3333-444444444444", "GPU-00000000-1111-2222-3333-555555555555"
odd(b"nothing", 0)
well = RealNvml(root)
good, second = well.gpus()
now = well.look(good.uuid), well.minor(good.uuid)
"""

_CASES = (
    _PRELUDE
    + """
CODES = [*(int(code) for code in Code if code), 21, 4242]
tried = 0
for function, verb in {functions}.items():
    effects = [{hang}] if {hang} in {effects} else [*CODES, *{effects}]
    for effect in effects:
        tried += 1
        odd(function.encode(), effect)
        node = RealNvml(root, hang_limit_s=0.5 if effect == {hang} else 15.0)
        found = node.gpus()
        if found[:1] != (good,) or (node.look(good.uuid), node.minor(good.uuid)) != now:
            print("harmed", function, effect, found)
        silent = not node.lost() and not node.notes()
        if len(found) < 2 and (function not in {identity} and effect not in (1, 15, {hang}) or silent):
            print("taken away", function, effect, node.lost())
        try:
            uuid = TWO
            if verb and effect != {hang}:
                eval("node." + verb)
        except DeviceError as e:
            if TWO not in str(e) and "GPU 1" not in str(e):
                print("nameless", function, effect, e)
        except BaseException as e:
            print("raised", function, effect, repr(e))
print("tried", tried)
sys.stdout.flush()
os._exit(0)
"""
)


def told(root: Path, text: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", text, str(root)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def cases(functions: object, *effects: int) -> str:
    text = _CASES
    for name, value in (("functions", functions), ("effects", effects), ("identity", IDENTITY), ("hang", HANG)):
        text = text.replace(f"{{{name}}}", repr(value))
    return text


def test_whatever_one_function_answers_for_one_card_the_other_is_read_as_before(driver_root: Path) -> None:
    assert told(driver_root, cases(FUNCTIONS, FILL, EMPTY)) == ["tried 400"]


def test_a_card_that_hangs_while_it_is_listed_is_named_and_the_other_is_read(driver_root: Path) -> None:
    assert told(driver_root, cases(FUNCTIONS, HANG)) == ["tried 20"]


@pytest.mark.parametrize("function", NODE_FUNCTIONS)
def test_what_the_node_does_not_tell_costs_no_card(driver_root: Path, function: str) -> None:
    text = (
        _PRELUDE
        + f"""
for effect in (3, 13, 999, {FILL}, {EMPTY}):
    odd({function!r}.encode(), effect)
    try:
        node = RealNvml(root)
        print(len(node.gpus()), bool(node.notes()))
    except DeviceError as e:
        print(e.code)
"""
    )
    counted = ["3", "13", "999", "2 True", "0 False"]
    assert told(driver_root, text) == (counted if "Count" in function else ["2 True"] * 5)


@pytest.mark.parametrize(
    ("function", "what"),
    [
        ("nvmlInitWithFlags", "the call to start NVML"),
        ("nvmlSystemGetDriverVersion", "the call to read its NVIDIA driver version"),
        ("nvmlSystemGetCudaDriverVersion_v2", "the call to read its CUDA version"),
        ("nvmlDeviceGetCount_v2", "the call to count its GPUs"),
    ],
)
def test_a_call_of_the_start_that_hangs_is_named_and_keeps_nobody(driver_root: Path, function: str, what: str) -> None:
    text = (
        _PRELUDE
        + f"""
from gpuslice import node
from gpuslice.nvml.session import Session
odd({function!r}.encode(), {HANG})
session = Session(lambda: RealNvml(root), start_s=0.2, end_s=0.2)
try:
    print(session.problem or node.listed(session, 0.2))
except DeviceError as e:
    print(e)
session.close()
sys.stdout.flush()
os._exit(0)
"""
    )

    (line,) = told(driver_root, text)

    assert f"{what} has not returned" in line


def test_an_end_of_nvml_that_hangs_keeps_nobody(driver_root: Path) -> None:
    text = (
        _PRELUDE
        + f"""
from gpuslice.nvml.session import Session
session = Session(lambda: RealNvml(root), end_s=0.2)
odd(b"nvmlShutdown", {HANG})
session.close()
print(session.hangs)
sys.stdout.flush()
os._exit(0)
"""
    )

    assert told(driver_root, text) == ["True"]


def test_of_two_cards_with_one_uuid_none_is_worked_on(driver_root: Path) -> None:
    text = (
        _PRELUDE
        + f"""
odd(b"nvmlDeviceGetUUID", {TWIN})
print(len(well.gpus()), *well.lost())
for verb in (well.minor, well.look, well.memory, lambda gpu: well.create_gpu_instance(gpu, 9, Placement(4, 4))):
    try:
        print(verb(UUID))
    except DeviceError as e:
        print("several cards" in str(e))
odd(b"nothing", 0)
print(len(well.gpus()), well.minor(UUID))
"""
    )

    named, *refused, again = told(driver_root, text)

    assert named.startswith("0 GPU GPU-00000000-1111-2222-3333-444444444444: several cards of this node have this UUID")
    assert (refused, again) == (["True"] * 4, "2 3")


def test_a_card_without_a_uuid_has_no_identity_and_says_so(driver_root: Path) -> None:
    text = _PRELUDE + f"odd(b'nvmlDeviceGetUUID', {EMPTY}); print(len(well.gpus()), *well.lost())"

    (line,) = told(driver_root, text)

    assert line.startswith("1 GPU 1 has no UUID")


@pytest.mark.parametrize(
    ("function", "effect", "name"),
    [
        ("nvmlDeviceGetArchitecture", 3, "cannot read its architecture: NOT_SUPPORTED"),
        ("nvmlDeviceGetName", FILL, "cannot read its name: the answer of NVML cannot be read"),
        ("nvmlDeviceGetMigMode", 999, "cannot read its MIG mode: UNKNOWN"),
    ],
)
def test_an_optional_fact_that_is_refused_is_named_and_the_card_stays(
    driver_root: Path, function: str, effect: int, name: str
) -> None:
    text = _PRELUDE + f"odd({function!r}.encode(), {effect}); print(len(well.gpus())); print(*well.notes(), sep='\\n')"

    count, *notes = told(driver_root, text)

    assert count == "2"
    assert any(note.startswith(f"GPU 1 (0000:fd:1f.0): {name}") for note in notes), notes


@pytest.mark.parametrize(
    ("function", "command", "code", "says"),
    [
        ("nvmlInitWithFlags", "policy check", 3, "gpuslice: driver root {0}: the call to start NVML has not returned;"),
        ("nvmlInitWithFlags", "devices", 3, "gpuslice: driver root {0}: the call to start NVML has not returned;"),
        ("nvmlDeviceGetCount_v2", "policy check", 3, "gpuslice: this node: the call to count its GPUs has not returned;"),
        ("nvmlDeviceGetCount_v2", "devices", 0, "gpuslice: warning: this node: the call to count its GPUs has not"),
        ("nvmlDeviceGetUUID", "policy check", 0, "gpuslice: warning: GPU 1 cannot be read: "),
        ("nvmlDeviceGetUUID", "devices", 0, "gpuslice: warning: GPU 1 cannot be read: "),
        ("nvmlShutdown", "policy check", 0, ""),
    ],
)  # fmt: skip
def test_a_look_at_an_nvml_that_hangs_ends_with_a_sentence(
    driver_root: Path, tmp_path: Path, function: str, command: str, code: int, says: str
) -> None:
    """The limits are those of the commands, but shorter."""
    policy = tmp_path / "policy.yaml"
    policy.write_text("apiVersion: gpuslice.dev/v1alpha1\nkind: Policy\n", encoding="utf-8")
    arguments = [*command.split(), *([str(policy)] if command == "policy check" else [])]
    text = (
        _PRELUDE
        + f"""
from functools import partial
from gpuslice import cli, hardware, node
from gpuslice.nvml import real
real.RealNvml = partial(RealNvml, hang_limit_s=0.3)
hardware.visit, hardware._END_S = partial(hardware.visit, limit_s=0.3), 0.3
node.Cards, node.listed = partial(node.Cards, limit_s=1.0), partial(node.listed, limit_s=1.0)
odd({function!r}.encode(), {HANG})
cli.main({[*arguments, "--driver-root-ctr-path"]!r} + [str(root)])
"""
    )

    done = subprocess.run(
        [sys.executable, "-c", text, str(driver_root)],
        cwd=ROOT,
        env={**os.environ, "KUBELET_PLUGINS_DIRECTORY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )

    assert done.returncode == code, done.stderr
    assert says.format(driver_root) in done.stderr
    assert "Traceback" not in done.stderr
