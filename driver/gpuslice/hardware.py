"""The only place that chooses between real and simulated GPUs. It loads only one, because the bindings of NVML take 2 MB."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from gpuslice.config import Config
from gpuslice.errors import DeviceError, StateError

if TYPE_CHECKING:
    from gpuslice.nvml.api import Nvml
    from gpuslice.nvml.session import Session
    from gpuslice.nvml.sim.nvml import Latency
    from gpuslice.system.host import Host

log = logging.getLogger(__name__)

_END_S = 5.0


def open_session(config: Config) -> tuple[Session, Host]:
    """The GPUs and the node around them. NVML may start later, and may start again. ConfigError for a wrong simulated node."""
    from gpuslice.nvml.session import Session
    from gpuslice.system.host import check_hook

    opener, host = _choose(config)
    if config.simulate:  # its cards and its boot id exist before its NVML starts, as on a real node
        from gpuslice.nvml.sim.node import SimNode

        SimNode(config.simulated_node, config.simulate).close()

    def with_hook() -> Nvml:
        if config.nvidia_cdi_hook_path is not None:
            check_hook(config.nvidia_cdi_hook_path, config.driver_root_ctr_path, config.nvidia_driver_root)
        return opener()

    return Session(with_hook), host


def _choose(config: Config) -> tuple[Callable[[], Nvml], Host]:
    from gpuslice.system.host import RealHost, SimHost

    if config.simulate:
        from gpuslice.nvml.sim.nvml import SimNvml
        from gpuslice.system import files

        folder = files.ensure_folder(config.simulated_node)
        latency = cast("Latency", config.simulate_latency)

        def simulated() -> Nvml:
            nvml = SimNvml(folder, config.simulate, latency=latency)
            for sentence in nvml.inferred():
                log.info("%s", sentence)
            return nvml

        return simulated, SimHost(folder)
    from gpuslice.nvml.real import RealNvml

    host = RealHost(
        config.driver_root_ctr_path, host_root=config.nvidia_driver_root, cdi_hook=config.nvidia_cdi_hook_path
    )
    return partial(RealNvml, config.driver_root_ctr_path), host


@contextlib.contextmanager
def visit(config: Config, limit_s: float = 30.0, *, anew: bool = False) -> Iterator[tuple[Nvml, Host]]:
    """As `open_session`, for one look. If there is no simulated node yet, or with `anew`, the look makes one and removes it.

    HungError if NVML does not start in `limit_s`.
    """
    import tempfile

    from gpuslice.nvml.listing import Attempt

    with contextlib.ExitStack() as stack:
        if config.simulate and (anew or not _exists(config.simulated_node / "node.json")):
            try:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="gpuslice-"))
            except OSError as e:  # a container with a read-only root has no such folder
                raise StateError(
                    "no folder for temporary files is writable, and simulated cards without a folder of their own need one; "
                    "set TMPDIR to a writable folder"
                ) from e
            config = replace(config, simulate_folder=Path(folder))
        opener, host = _choose(config)
        nvml = Attempt("the start of NVML", opener).result(limit_s)
        stack.callback(_leave, nvml)
        yield nvml, host


def _leave(nvml: Nvml) -> None:
    """Close NVML, but do not wait for long, because the process ends after the look anyway."""
    from gpuslice.nvml.listing import Attempt

    with contextlib.suppress(DeviceError):
        Attempt("the end of NVML", nvml.close).result(_END_S)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as e:
        from gpuslice.system import refusals

        raise StateError(refusals.unreadable(path, e)) from e


def boot_id(config: Config) -> str:
    """The boot id of the node, without its GPUs."""
    from gpuslice.system.host import RealHost, SimHost

    return (SimHost(config.simulated_node) if config.simulate else RealHost()).boot_id()


def mps_control(config: Config) -> Sequence[str]:
    """The command of the MPS control program. DeviceError if the driver root does not have the program."""
    from gpuslice.mps import control

    if not config.simulate:
        return control.program(config.driver_root_ctr_path)
    from gpuslice.nvml.sim import spec

    spec.parse(config.simulate)  # a ConfigError here, instead of daemons without a node
    return control.stand_in(config.simulated_node)
