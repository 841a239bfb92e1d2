"""How fast the real scheduler places pods on nodes with our slices: `hack/scale`. docs/performance.md"""
