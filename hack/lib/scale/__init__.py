"""`hack/scale`: how fast the real scheduler places pods on nodes with our slices. See docs/performance.md."""
