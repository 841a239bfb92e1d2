"""`python -m gpuslice`, and the command `gpuslice`. It handles SIGTERM before it loads anything large."""

import signal
import sys
from typing import NoReturn


def main() -> NoReturn:
    if sys.argv[1:2] in (["run"], ["mps-supervisor"]):
        # The kernel drops SIGTERM for a process 1 without a handler. The services set their own handlers later.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    elif sys.argv[1:2] in (["preflight"], ["uninstall"], ["cleanup"]):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what these had to do is not done
    from gpuslice import cli

    cli.main()


if __name__ == "__main__":
    main()
