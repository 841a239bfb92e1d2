"""The one kind of failure: a sentence for the person who typed the command."""


class PlaygroundError(Exception):
    """A sentence that names the thing, the limit and the remedy."""
