"""The interface to the GPUs: one small protocol (`api`), implemented by NVIDIA's library (`real`) and a simulation
(`sim`)."""
