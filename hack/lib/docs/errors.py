"""The error that stops the generator."""


class DocsError(Exception):
    """The code and the sentences about it do not have the same names, or a page names no table."""
