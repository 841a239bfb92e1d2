"""gpuslice: a Kubernetes DRA driver for NVIDIA GPU slices."""

__version__ = "0.1.0"
