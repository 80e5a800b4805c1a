"""The one exception for bad input; it imports nothing, so that every room and the command line may use it."""


class UserError(Exception):
    """Bad input.  The message says what is wrong, where, and how to fix it; the command line prints it and exits 1."""
