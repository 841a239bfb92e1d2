"""`hack/gpu`: a test of one hour on a real GPU, on a machine without a network. See docs/on-a-gpu.md."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path

from hack.lib.gpu.errors import GpuError
from hack.lib.signals import interrupt_on

_ABOUT = """\
Prove on a real GPU everything that needs no change of the card's settings.

  hack/gpu pack .gpu             make a folder to copy to a machine without a network (60 MiB, some minutes)
  hack/gpu pack --facts .gpu     the same for the first stages only (12 MiB, a minute)
  hack/gpu run .gpu              on that machine: install from the folder and run all stages (at most eight minutes)
  hack/gpu run .gpu --only facts,stack   run only these stages
  hack/gpu report RESULTS        print a table of the results, and what they prove
  hack/gpu test                  on this machine: run the tests that need a real GPU, in the virtual environment of this tree
"""


def main(arguments: list[str]) -> int:
    parsed = parser().parse_args(arguments)
    if parsed.command == "pack":
        return _pack(parsed)
    if parsed.command == "run":
        from hack.lib.gpu import run

        return run.run(parsed.folder, parsed.out, parsed.only, parsed.driver_root, _say)
    from hack.lib.gpu import report

    print(report.report(parsed.results))
    return 0


def _pack(parsed: argparse.Namespace) -> int:
    from hack.lib.cluster.versions import VERSIONS
    from hack.lib.gpu import pack

    begun = time.monotonic()
    pythons = tuple(dict.fromkeys(parsed.python)) or pack.PYTHONS
    compressed = not parsed.uncompressed
    pack.pack(parsed.folder, facts=parsed.facts, compressed=compressed, pythons=pythons, version=VERSIONS[0], say=_say)
    size = sum(path.stat().st_size for path in parsed.folder.glob("*.tar*")) / (1 << 20)
    _say(f"{parsed.folder} is ready: {size:.1f} MiB, {time.monotonic() - begun:.0f} s")
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hack/gpu",
        description=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    pack = commands.add_parser("pack", help="make the folder to copy", allow_abbrev=False)
    pack.add_argument("folder", type=Path, metavar="FOLDER")
    pack.add_argument(
        "--facts", action="store_true", help="leave out Kubernetes, which only the stage of the whole stack needs"
    )
    pack.add_argument(
        "--uncompressed",
        action="store_true",
        help="do not compress: seconds instead of minutes, for a trial on this machine",
    )
    pack.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="3.12",
        help="pack for this release of Python; repeatable; default: all that the driver supports",
    )
    run = commands.add_parser("run", help="run the stages from the folder", allow_abbrev=False)
    run.add_argument("folder", type=Path, metavar="FOLDER")
    run.add_argument(
        "--out", type=Path, metavar="FOLDER", help="folder for the results; default: $OUT, else FOLDER/results"
    )
    run.add_argument("--only", default="", metavar="STAGE,…", help="run these stages; default: all")
    run.add_argument(
        "--driver-root",
        type=Path,
        metavar="FOLDER",
        help="root of the NVIDIA driver; without it, hack/gpu searches the usual places",
    )
    report = commands.add_parser("report", help="show results as a table", allow_abbrev=False)
    report.add_argument("results", type=Path, metavar="FOLDER")
    commands.add_parser("test", help="run the tests that need a real GPU on this machine", add_help=False)
    return parser


def _say(text: str) -> None:
    print(f"hack/gpu: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    interrupt_on(signal.SIGTERM)
    try:
        sys.exit(main(sys.argv[1:]))
    except GpuError as e:
        _say(str(e))
        sys.exit(1)
    except KeyboardInterrupt:
        _say("stopped; the results so far are kept")
        sys.exit(130)
