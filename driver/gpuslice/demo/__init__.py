"""`gpuslice demo`: every feature on a simulated node, step by step."""
