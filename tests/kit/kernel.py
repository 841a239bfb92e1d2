"""A kernel that refuses: a call for a file or socket below a folder fails, if Python has an audit event for it.

`noting` finds the kinds of calls. So a test can refuse each of them, also calls of later code. A kind is the event and the
path below the folder, without the parts that change from run to run.

`python -m tests.kit.kernel run …` is the command with one kind refused, by KERNEL="<folder>|<event>|<path>|<errno>".
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

Kind = tuple[str, str]

# os.listdir and os.scandir are reads of a folder. There are no events for stat(2) and for calls with a descriptor.
_EVENTS = ("open", "os.", "socket.bind", "socket.connect", "shutil.rmtree")
_VARYING = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f-]{22,}|\d+-[0-9a-f]{8}(?=\.tmp)|(?<=GPU-)[0-9a-f-]+")


class _Kernel:
    def __init__(self) -> None:
        self.root, self.refused, self.errno = "", ("", ""), errno.EIO
        self.noted: dict[Kind, None] | None = None

    def hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if not self.root or not event.startswith(_EVENTS):
            return
        path = next((os.fsdecode(a) for a in arguments if isinstance(a, str | bytes | os.PathLike)), "")
        path = next((str(part) for part in arguments[1:] if event == "socket.bind"), path)
        if not path.startswith(self.root):
            return
        kind = event, _VARYING.sub("*", path.removeprefix(self.root))
        if self.noted is not None:
            self.noted[kind] = None
        if kind == self.refused:
            raise OSError(self.errno, os.strerror(self.errno), path)


_kernel = _Kernel()
sys.addaudithook(_kernel.hook)  # for ever, because Python cannot remove a hook


@contextlib.contextmanager
def noting(root: Path) -> Iterator[dict[Kind, None]]:
    """The kinds of calls in the block, in order, as the keys of a dict."""
    _kernel.root, _kernel.noted = str(root), {}
    try:
        yield _kernel.noted
    finally:
        _kernel.root, _kernel.noted = "", None


@contextlib.contextmanager
def refusing(root: Path, kind: Kind, number: int = errno.EIO) -> Iterator[None]:
    """Each call of this kind fails in the block."""
    _kernel.root, _kernel.refused, _kernel.errno = str(root), kind, number
    try:
        yield
    finally:
        _kernel.root, _kernel.refused = "", ("", "")


if __name__ == "__main__":
    from gpuslice import cli

    root_, event_, path_, number_ = os.environ["KERNEL"].split("|")
    with refusing(Path(root_), (event_, path_), getattr(errno, number_)):
        cli.main()
