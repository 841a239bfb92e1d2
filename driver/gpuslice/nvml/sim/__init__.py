"""A simulated GPU node, in memory and on disk, with the refusals of a real node. Nothing here runs on a real node."""
