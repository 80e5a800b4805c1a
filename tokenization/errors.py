"""The exception of this package."""


class TokenizationError(Exception):
    """Bad input.  The message is for the user: what is wrong, where, and how to fix it."""
