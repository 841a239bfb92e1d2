"""The four commands in the terminal. Each returns the text to print."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from gpuslice.errors import ConfigError
from gpuslice.nvml.sim import spec
from gpuslice.playground.folder import MARK, PlaygroundError, PlaygroundFolder
from gpuslice.playground.wanted import Wanted

_NONE = "no playground runs in {folder}; `gpuslice playground up{flag}` starts one"
_KILLED = "the playground in {folder} was killed; `gpuslice playground down{flag}` removes its files and processes"
_THERE = (
    "a playground runs already in {folder}; end it with `gpuslice playground down{flag}`, or start another one "
    "with --folder"
)


def up(chosen: Path | None, simulate: str, latency: str) -> str:
    """Start a playground in the background. Return when it accepts claims. ConfigError: there is no such node."""
    begin = time.monotonic()
    spec.parse(simulate)
    folder = PlaygroundFolder(chosen)
    with _taken(folder) as lock:
        left = any(path != folder.lock for path in folder.path.iterdir())
        killed = folder.clear(keep_lock=True)
        process, answer = _start(folder, lock, simulate, latency)
        if answer["code"]:
            process.wait()
            raise PlaygroundError(answer["said"])
    took_s = time.monotonic() - begin
    before = f"A killed playground was there. Its files and {killed} processes are removed.\n" if left else ""
    return before + _WELCOME.format(
        folder=folder,
        pid=process.pid,
        simulate=simulate,
        took_s=took_s,
        flag=folder.flag,
        plugins=shlex.quote(str(folder.plugins)),
    )


@contextlib.contextmanager
def _taken(folder: PlaygroundFolder) -> Iterator[int]:
    """The folder with its lock, which the background process takes over. After an error, nothing is left."""
    lock = None
    signal.pthread_sigmask(
        signal.SIG_BLOCK, [signal.SIGINT]
    )  # otherwise the folder could exist before this process knows it
    try:
        lock = folder.take()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        if lock is None:
            raise PlaygroundError(_said(_THERE, folder))
        yield lock
    except BaseException:
        if lock is not None:
            folder.clear()
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        if lock is not None:
            os.close(lock)


_WELCOME = """\
A playground with {simulate} runs in {folder}
(process {pid}, ready after {took_s:.1f} s). Next, in any terminal:

  gpuslice playground claim slice --memory 9Gi{flag}
  gpuslice playground down{flag}

and after this line, `gpuslice devices` and `gpuslice claims` show its node:

  export KUBELET_PLUGINS_DIRECTORY_PATH={plugins}"""


def claim(chosen: Path | None, wanted: Wanted) -> str:
    """Make a claim of a class. Returns its devices as text. ConfigError: a typed value is wrong."""
    wanted.request()
    return _asked(PlaygroundFolder(chosen), {"do": "claim", "wanted": asdict(wanted)})


def release(chosen: Path | None, name: str) -> str:
    """Release a claim, and show the cards."""
    return _asked(PlaygroundFolder(chosen), {"do": "release", "name": name})


def down(chosen: Path | None) -> str:
    """End a playground and remove its files. Also removes the files and processes of a killed playground."""
    folder = PlaygroundFolder(chosen)
    folder.check()
    there = folder.lock.exists()
    if folder.alive():
        _ask(folder, {"do": "down"})
        folder.wait_dead()
        folder.clear()
        return f"The playground in {folder} has ended.\nNothing of it is left."
    if not there:
        raise PlaygroundError(_said(_NONE, folder))
    killed = folder.clear()
    return f"The playground in {folder} was killed.\nIts files and {killed} processes are removed."


# ---------------------------------------------------------------- the background process


def _start(
    folder: PlaygroundFolder, lock: int, simulate: str, latency: str
) -> tuple[subprocess.Popen[bytes], Mapping[str, object]]:
    """Start the background process. Returns it with its first message. It has its own session, so Ctrl-C does not end it."""
    ready, write = os.pipe()
    try:
        with folder.log.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "gpuslice.playground.server", str(folder), simulate, latency, str(write)],
                pass_fds=(lock, write),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, MARK: str(folder)},
            )
    finally:
        os.close(write)
    try:
        with os.fdopen(ready, encoding="utf-8") as answers:
            text = answers.readline()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if text:
        return process, json.loads(text)
    last = folder.log.read_text(encoding="utf-8", errors="replace").splitlines()[-1:] or ["it said nothing"]
    return process, {"code": 1, "said": f"the background process ended at its start ({last[0]}); try again"}


def _asked(folder: PlaygroundFolder, question: Mapping[str, object]) -> str:
    folder.check()
    if not folder.alive():
        raise PlaygroundError(_said(_KILLED if folder.lock.exists() else _NONE, folder))
    return _ask(folder, question)


def _ask(folder: PlaygroundFolder, question: Mapping[str, object]) -> str:
    """Send one question to the background process. Returns its answer."""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(folder.socket))
            connection.sendall(json.dumps(question).encode() + b"\n")
            with connection.makefile(encoding="utf-8") as answers:
                text = answers.readline()
    except KeyboardInterrupt:
        raise PlaygroundError(
            "interrupted, but the playground continues with it; `gpuslice claims` shows the result"
        ) from None
    except OSError as e:
        raise PlaygroundError(f"the playground in {folder} is starting or ending ({e.strerror}); try again") from e
    if not text:
        raise PlaygroundError(_said("the playground in {folder} ended before it answered; try `up` again", folder))
    answer = json.loads(text)
    if answer["code"]:
        raise ConfigError(answer["said"]) if answer["code"] == 2 else PlaygroundError(answer["said"])
    return str(answer["said"])


def _said(sentence: str, folder: PlaygroundFolder) -> str:
    return sentence.format(folder=folder, flag=folder.flag)
