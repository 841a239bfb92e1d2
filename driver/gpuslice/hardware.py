"""The only place that chooses between real and simulated GPUs. It loads only one, because the bindings of NVML take 2 MB."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, cast

from gpuslice.config import Config

if TYPE_CHECKING:
    from gpuslice.nvml.api import Nvml
    from gpuslice.nvml.session import Session
    from gpuslice.nvml.sim.nvml import Latency
    from gpuslice.system.host import Host

log = logging.getLogger(__name__)


def open_node(config: Config) -> tuple[Nvml, Host]:
    """The GPUs and the node around them. DeviceError if NVML does not start; ConfigError for a wrong simulated node."""
    opener, host = _choose(config)
    return opener(), host


def open_session(config: Config) -> tuple[Session, Host]:
    """The same, but NVML may start later, and anew."""
    from gpuslice.nvml.session import Session

    opener, host = _choose(config)
    return Session(opener), host


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


def mps_control(config: Config) -> Sequence[str]:
    """The command of the MPS control program. DeviceError if the driver root does not have the program."""
    from gpuslice.mps import control

    return control.stand_in(config.simulated_node) if config.simulate else control.program(config.driver_root_ctr_path)
