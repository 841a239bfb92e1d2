from __future__ import annotations


class GpuError(Exception):
    """One sentence that names the thing and the remedy."""
