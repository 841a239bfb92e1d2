"""The machine around the GPUs: files and locks, the C library, programs, the node itself."""
