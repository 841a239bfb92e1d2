"""The interface to the GPUs: one small protocol (`api`), behind it NVIDIA's library (`real`) or a simulated node (`sim`)."""
