"""A test of one hour on a real GPU, on a machine without a network: pack here, run there, report. See docs/on-a-gpu.md."""
