"""Write the go.mod of `hack/kube` for one version of Kubernetes: python -m hack.lib.cluster.modules 1.37.1

The module of Kubernetes is not made to be imported: its go.mod replaces its parts by folders of its repository. Each part
is also a module with a matching version, and our go.mod names these modules. The results and their sums are checked in,
so that a build takes exactly the tested versions. Run this again only for a new version.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from hack.lib.cluster.versions import KUBE, module_file

_STAGED = re.compile(r"^\s*(k8s\.io/[\w.-]+) => \./staging/", re.MULTILINE)


def module_text(version: str, theirs: str) -> str:
    """Our go.mod, made from the go.mod of kubernetes `version` (1.37.1)."""
    staged = sorted(set(_STAGED.findall(theirs)))
    replaced = "\n".join(f"\t{name} => {name} v0.{version.removeprefix('1.')}" for name in staged)
    return (
        f"module gpuslice.dev/hack/kube\n\n{_line(theirs, 'go')}\n\n{_line(theirs, 'godebug')}\n\n"
        f"require (\n\tk8s.io/kubernetes v{version}\n\tgo.etcd.io/etcd/server/v3 {_etcd(theirs)}\n)\n\n"
        f"replace (\n{replaced}\n)\n"
    )


def _line(text: str, word: str) -> str:
    found = re.search(rf"^{word} .*$", text, re.MULTILINE)
    return found[0] if found else ""


def _etcd(text: str) -> str:
    found = re.search(r"go\.etcd\.io/etcd/client/v3 (v\S+)", text)
    if found is None:
        raise SystemExit("modules: kubernetes' go.mod names no etcd client; find out which etcd server belongs to it")
    return found[1]


def main(version: str) -> None:
    go = {**os.environ, "GOTOOLCHAIN": "local", "GOFLAGS": "-mod=mod"}
    shown = ["go", "mod", "download", "-json", f"k8s.io/kubernetes@v{version}"]
    downloaded = subprocess.run(shown, cwd="/", env=go, check=True, capture_output=True)
    ours = KUBE / module_file(version)
    ours.write_text(module_text(version, Path(json.loads(downloaded.stdout)["GoMod"]).read_text()))
    ours.with_suffix(".sum").unlink(missing_ok=True)
    subprocess.run(["go", "mod", "tidy", "-modfile", str(ours)], cwd=KUBE, env=go, check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
