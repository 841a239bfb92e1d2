"""An hour with a real GPU on a machine without a network: pack here, run there, report. docs/on-a-gpu.md"""
