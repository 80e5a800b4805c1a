"""Exceptions that end a command with one message.  This module imports nothing, so that every package may import it."""


class UserError(Exception):
    """Bad input.  The message says what is wrong, where, and how to fix it; the command line prints it and exits 1."""


class Preempted(Exception):
    """The run was asked to stop, and all of it is saved; the same command goes on (exit code 75)."""


class PeerLost(Exception):
    """Another process of the run did not reach a meeting point; all are to be started again (exit code 77)."""
