"""`python -m driver` is the command `gpuslice`."""

from driver.cli import main

main()
