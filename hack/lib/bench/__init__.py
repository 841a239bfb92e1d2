"""`hack/bench`: measure the driver process from outside. See docs/performance.md."""
