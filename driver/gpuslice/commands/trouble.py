"""The last resort: an unforeseen error becomes one sentence too, and its trace is kept in a file."""

from __future__ import annotations

import errno
import os
from pathlib import Path

_OUTPUT = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
# Refusals of the kernel whose reason lies in the node, not in a mistake of ours.
_OF_THE_NODE = (
    *_OUTPUT,
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN),
    *(errno.EROFS, errno.EACCES, errno.EPERM, errno.ESTALE, errno.ENODEV, errno.ENXIO),
)
_FRAMES = 4


def sentence(error: Exception) -> tuple[str, int]:
    """The error with its remedy as one sentence, and the exit code. The trace of a bug goes into a temporary file."""
    if isinstance(error, OSError) and error.filename is None and error.errno in _OUTPUT:
        return f"cannot write the output: {os.strerror(error.errno)}; send the output to a place with free space", 1
    if isinstance(error, OSError) and error.errno in _OF_THE_NODE:
        from gpuslice.system import refusals

        return str(refusals.untranslated(error)), 3
    import traceback  # imported here and below, because a command that succeeds does not need it

    frames = traceback.extract_tb(error.__traceback__)[-_FRAMES:]
    way = " > ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
    what = " ".join(f"{type(error).__name__}: {error}".split())
    return f"unexpected error at {way} ({what}), a bug in gpuslice; please report it with {_kept(error)}", 1


def _kept(error: Exception) -> str:
    import tempfile
    import traceback

    try:
        descriptor, path = tempfile.mkstemp(prefix="gpuslice-trace-", suffix=".txt")
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(traceback.format_exception(error))
    except OSError:
        return "this line; set TMPDIR to a writable folder, so that the next error writes its trace there"
    return f"its trace, which is in {path}"
