"""Render deploy/chart without a cluster; by default, with its default values into deploy/*.yaml and deploy/uninstall.

  hack/cluster build --only helm     build Helm once, which takes two minutes
  hack/manifests                     after every change of the chart
  hack/manifests --out FOLDER --values my-values.yaml --namespace gpus

deploy/chart/manifests.sha256 has the sums of the chart and of the manifests. With them, tests/deploy/test_chart.py finds out
without Helm whether the manifests are those of the chart.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hack.lib.cluster import binaries
from hack.lib.cluster.versions import HELMS

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "chart"
SUMS = CHART / "manifests.sha256"
# What is applied on its own, and not with `kubectl apply -f deploy/`: a folder of deploy/ for each.
APART = {"uninstall.yaml": "uninstall"}
_HELM = re.compile(r"^.* # Helm\n", re.MULTILINE)  # a line that only Helm reads
_SOURCE = re.compile(r"^---\n# Source: gpuslice/templates/(\S+)\n", re.MULTILINE)


class RenderError(Exception):
    """Helm's own sentence about the chart or its values, or the reason why Helm cannot start."""


def main(arguments: Sequence[str]) -> None:
    asked = parse(arguments)
    out = asked.out.resolve()
    for name, text in render(asked.values, asked.namespace, asked.helm).items():
        folder = out / APART.get(name, "")
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(_HELM.sub("", text), encoding="utf-8")
    if out == DEPLOY:
        SUMS.write_text(sums(), encoding="utf-8")


def render(values: Path | None, namespace: str, major: str) -> dict[str, str]:
    """The text of each file. The Namespace is not part of the chart. RenderError if Helm refuses the chart or the values."""
    more = ["--namespace", namespace, *(("--values", str(values)) if values else ())]
    text = _helm(major, "template", "gpuslice", str(CHART), *more)
    _helm(major, "lint", str(CHART), "--strict", "--quiet", *more)
    _, *pieces = _SOURCE.split(text)
    documents: dict[str, list[str]] = {}
    for name, document in zip(pieces[::2], pieces[1::2], strict=True):
        documents.setdefault(name, []).append(document.strip())
    return {name: "\n---\n".join(several) + "\n" for name, several in documents.items()}


def _helm(major: str, *arguments: str) -> str:
    program = binaries.helm(major)
    if not program.exists():
        raise RenderError(f"Helm is not built: there is no {program}; run hack/cluster build --only helm")
    done = subprocess.run([str(program), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RenderError("\n".join(text.strip() for text in (done.stdout, done.stderr) if text.strip()))
    return done.stdout


def manifests(folder: Path) -> list[Path]:
    """The manifests below deploy/, or below another folder that was given as --out."""
    return [
        *sorted(folder.glob("*.yaml")),
        *(path for apart in APART.values() for path in sorted((folder / apart).glob("*"))),
    ]


def sums() -> str:
    """One line for each file, as `sha256sum` writes it in deploy/: first the chart, then the manifests."""
    sources = [path for path in CHART.rglob("*") if path.is_file() and path != SUMS]
    lines = (
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(DEPLOY)}\n"
        for path in (*sorted(sources), *manifests(DEPLOY))
    )
    return "".join(lines)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="hack/manifests",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--out", type=Path, default=DEPLOY, metavar="FOLDER", help="folder for the manifests; default: deploy"
    )
    parser.add_argument("--values", type=Path, metavar="FILE", help="values that differ from deploy/chart/values.yaml")
    parser.add_argument("--namespace", default="gpuslice-system", help="namespace of the objects; default: %(default)s")
    parser.add_argument("--helm", choices=HELMS, default="3", help="major release of Helm; default: %(default)s")
    asked = parser.parse_args(arguments)
    if asked.out.resolve() == DEPLOY and (asked.values or asked.namespace != parser.get_default("namespace")):
        parser.error("deploy/ has the default values; name another folder with --out")
    return asked


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, RenderError) as e:
        sys.exit(f"hack/manifests: {e}")
