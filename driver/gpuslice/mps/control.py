"""NVIDIA's control program `nvidia-cuda-mps-control`, or the stand-in for it: commands on standard input, answers printed.

Its documentation does not fix the form of the answers. So a set counts only if the matching get confirms it. Each get is a
run of its own, because no document says which line answers which command.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from gpuslice.core.model import GpuUuid, MigUuid
from gpuslice.errors import DeviceError, HungError
from gpuslice.system import programs

log = logging.getLogger(__name__)

NAME = "nvidia-cuda-mps-control"
LINKS = Path("/run/gpuslice/nvidia-libraries")

# No command removes a memory ceiling. This ceiling is larger than every card, and reads back as none.
_NO_MEMORY_CEILING_MIB = 1 << 24
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT])", re.IGNORECASE)
_MIB = {"K": 1 / 1024, "M": 1.0, "G": 1024.0, "T": 1024.0 * 1024}
_PERCENT = re.compile(r"\d+(?:\.\d+)?")
_NOBODY = "Cannot find MPS control daemon"  # with any exit status
_PIDS = re.compile(r"^\s*(\d+)\s*$", re.MULTILINE)


def program(driver_root: Path, *, links: Path = LINKS) -> Sequence[str]:
    """The command of NVIDIA's control program. DeviceError if the driver root has none.

    `links`: a folder for `programs.environment`.
    """
    path = str(programs.find(driver_root, NAME))
    more = programs.environment(driver_root, links)
    return ("env", *(f"{name}={value}" for name, value in more.items()), path) if more else (path,)


def stand_in(simulated_node: Path) -> Sequence[str]:
    """The command of the stand-in for the control program, on the cards of this simulated node."""
    script = str(Path(__file__).with_name("sim") / "control.py")
    # Without site-packages and settings of the environment, because it starts at every command.
    return ("env", f"GPUSLICE_SIMULATED_NODE={simulated_node.resolve()}", sys.executable, "-S", "-E", "-s", script)


class Control:
    """The control program of one daemon. Every method raises DeviceError, or HungError if no answer comes in time."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], timeout_s: float) -> None:
        self._command, self._env, self._timeout_s = command, env, timeout_s

    def run(self, *commands: str) -> str:
        """Run these commands in turn; returns what they printed."""
        text = "".join(f"{command}\n" for command in commands)
        status, printed = programs.run(self._command, stdin=text, timeout_s=self._timeout_s, env=self._env)
        if status or _NOBODY in printed:
            raise DeviceError(f"{NAME} failed at {commands[0]!r} with status {status}: {one_line(printed)}")
        return printed

    def servers(self) -> tuple[int, ...]:
        """Process ids of the servers; empty until the first client connects."""
        return tuple(int(pid) for pid in _PIDS.findall(self.run("get_server_list")))

    def status(self, server: int) -> str:
        """The status of a server: INITIALIZING, ACTIVE or FAULT."""
        return one_line(self.run(f"get_server_status {server}"))

    def clients(self, server: int) -> tuple[int, ...]:
        return tuple(int(pid) for pid in _PIDS.findall(self.run(f"get_client_list {server}")))

    def terminate_clients(self) -> int:
        """End the work of every client by a command of MPS, because a kill can hang the card. Returns their number."""
        found = [(server, client) for server in self.servers() for client in self.clients(server)]
        if found:
            self.run(*(f"terminate_client {server} {client}" for server, client in found))
        return len(found)

    # ------------------------------------------------------------ ceilings

    def limit(
        self, device: GpuUuid | MigUuid, memory_mib: int | None, percent: int | None
    ) -> tuple[int | None, int | None]:
        """Set both ceilings, for new clients and for the servers that run, and read them back. None: no ceiling.

        Without servers, one run sets everything, because each run costs the start of a program. A program that stops at a
        refused command sets no limit by UUID then, and the daemon reports that. In this case each command has its own run.
        """
        if memory_mib is not None:
            limits = (f"set_default_device_pinned_mem_limit {name} {memory_mib}M" for name in (device, "0"))
            self._try(f"set_default_active_thread_percentage {percent or 100}", *limits)
            if not self.servers():  # after the defaults, because a server that starts in between has the old ones
                reported = self._memory("get_default_device_pinned_mem_limit", device, memory_mib), self.threads()
                if reported == (memory_mib, None if percent == 100 else percent):
                    return reported
        return self.limit_memory(device, memory_mib), self.limit_threads(percent)

    def limit_memory(self, device: GpuUuid | MigUuid, memory_mib: int | None) -> int | None:
        """Set the memory ceiling for new clients and for the servers that run, and read it back.

        Always by UUID and by index: NVIDIA's device plugin found that MPS ignores limits by UUID, and a device name that
        is not validated may still read back. The daemon sees one device only, so its index is 0. One of the two must
        read back.
        """
        if memory_mib is None and self._memory("get_default_device_pinned_mem_limit", device, None) is None:
            return None
        wanted = _NO_MEMORY_CEILING_MIB if memory_mib is None else memory_mib
        for name in (device, "0"):
            self._try(f"set_default_device_pinned_mem_limit {name} {wanted}M")
        servers = self.servers()  # after the defaults, because a server that starts in between has the old ones
        for name in (device, "0") if servers else ():
            self._try(*(f"set_device_pinned_mem_limit {server} {name} {wanted}M" for server in servers))
        gets = ("get_default_device_pinned_mem_limit", *(f"get_device_pinned_mem_limit {s}" for s in servers))
        for name in (device, "0"):
            reported = [self._memory(get, name, memory_mib) for get in gets]
            if all(figure == memory_mib for figure in reported):
                return memory_mib
        here = "no ceiling" if reported[0] is None else f"{reported[0]} MiB"
        raise DeviceError(
            f"the MPS daemon of {device} did not accept the memory ceiling of {memory_mib or 'no'} MiB and reports {here}, "
            f"by UUID and by index; update the NVIDIA driver, or use MIG or time-slicing on this card"
        )

    def _try(self, *commands: str) -> None:
        """Run these commands. This answer does not show whether the daemon obeyed; only the ceilings that it reports do."""
        try:
            self.run(*commands)
        except HungError:
            raise
        except DeviceError as e:
            log.debug("an MPS daemon refused a command command=%r: %s", commands[0], e)

    def memory(self, device: GpuUuid | MigUuid) -> int | None:
        """The memory ceiling that the daemon reports: by UUID if it has one there, else by index."""
        by_uuid = self._memory("get_default_device_pinned_mem_limit", device, None)
        return self._memory("get_default_device_pinned_mem_limit", "0", None) if by_uuid is None else by_uuid

    def _memory(self, command: str, device: str, wanted: int | None) -> int | None:
        return mebibytes(self.run(f"{command} {device}"), wanted)

    def limit_threads(self, percent: int | None) -> int | None:
        """Set the ceiling of multiprocessors in percent, and read it back. None or 100: no ceiling."""
        wanted = percent or 100
        self._try(f"set_default_active_thread_percentage {wanted}")
        if servers := self.servers():
            self._try(*(f"set_active_thread_percentage {server} {wanted}" for server in servers))
        reported = [self.threads(), *(self._threads(f"get_active_thread_percentage {server}") for server in servers)]
        if any(figure != (None if percent == 100 else percent) for figure in reported):
            raise DeviceError(
                f"the MPS daemon did not accept the ceiling of {wanted} % of the multiprocessors and reports "
                f"{reported[0] or 100} %; update the NVIDIA driver, or use MIG or time-slicing on this card"
            )
        return reported[0]

    def threads(self) -> int | None:
        return self._threads("get_default_active_thread_percentage")

    def _threads(self, command: str) -> int | None:
        match = _PERCENT.search(self.run(command))
        figure = round(float(match[0])) if match else 0
        return None if figure == 100 else figure


def mebibytes(text: str, wanted: int | None) -> int | None:
    """The size in an answer, in MiB. None if it has no size, zero, or more than any card has.

    Answers such as "3G" may be rounded down to whole units. So an answer that equals `wanted` in its own unit is `wanted`.
    """
    sizes = [(float(number) * _MIB[unit.upper()], _MIB[unit.upper()]) for number, unit in _SIZE.findall(text)]
    total = sum(size for size, _ in sizes)
    if not 0 < total < _NO_MEMORY_CEILING_MIB:
        return None
    if wanted is not None and 0 <= wanted - total < sizes[-1][1]:
        return wanted
    return round(total)


def one_line(text: str) -> str:
    """The output of a program on one line, cut to the length of a sentence."""
    return " ".join(text.split())[:200] or "nothing"
