"""MPS: the supervisor that owns the daemons, and how the driver speaks to it. See docs/mps.md."""
