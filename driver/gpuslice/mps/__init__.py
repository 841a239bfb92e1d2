"""MPS: the supervisor that owns the daemons, and what the driver tells it. See docs/mps.md."""
