"""Stand-ins for NVIDIA's MPS programs, as real processes. Nothing here runs on a real node."""
