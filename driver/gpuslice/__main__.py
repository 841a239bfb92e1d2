"""`python -m gpuslice`, and the command `gpuslice`: before anything large is loaded, SIGTERM is listened to."""

import signal
import sys
from typing import NoReturn


def main() -> NoReturn:
    if sys.argv[1:2] in (["run"], ["mps-supervisor"]):
        # The kernel drops SIGTERM for a process 1 that does not handle it. What serves later has handlers of its own.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    from gpuslice import cli

    cli.main()


if __name__ == "__main__":
    main()
