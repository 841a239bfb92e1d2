"""Measure the driver process from outside: `hack/bench`. docs/performance.md"""
