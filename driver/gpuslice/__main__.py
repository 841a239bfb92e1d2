"""`python -m gpuslice` is the command `gpuslice`."""

from gpuslice.cli import main

main()
