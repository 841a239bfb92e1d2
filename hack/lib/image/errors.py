from __future__ import annotations


class ImageError(Exception):
    """One sentence that names the thing and the remedy."""
