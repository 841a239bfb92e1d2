"""The common parts of the commands of `gpuslice`: texts, parser, and the forms of the output."""
