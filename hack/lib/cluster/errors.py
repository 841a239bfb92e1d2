"""One kind of failure: a sentence for whoever typed the command."""


class PlaygroundError(Exception):
    """Names the thing, the limit and the remedy."""
