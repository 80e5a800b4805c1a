"""Exceptions that end a command with one message; this imports nothing, so that every room and the command line may use it."""


class UserError(Exception):
    """Bad input.  The message says what is wrong, where, and how to fix it; the command line prints it and exits 1."""


class Preempted(Exception):
    """The run was told to stop, and all of it is saved; the same command goes on (exit code 75)."""


class PeerLost(Exception):
    """Another process of the run did not come where all meet; all are to be started again (exit code 77)."""
