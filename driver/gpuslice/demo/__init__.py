"""`gpuslice demo`: the whole story on a simulated node, told step by step."""
