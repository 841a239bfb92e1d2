"""A simulated node of GPUs, in memory and on disk, that refuses what a real one refuses. Nothing here runs on a real node."""
