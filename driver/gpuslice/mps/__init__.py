"""MPS: the supervisor that owns the daemons, and its protocol with the driver. See docs/mps.md."""
