"""`gpuslice demo`: the whole story on a simulated node, step by step."""
