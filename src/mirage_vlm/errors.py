"""The one exception that a user is meant to read."""


class MirageError(Exception):
    """Bad input at an edge: a file, a flag, a recipe key, a checkpoint.

    The message is one line that says what is wrong, where, and what to do. The command line prints it and
    exits with status 2; library callers may catch it.
    """


class NoRoom(MirageError):
    """The memory that may be used is too small for a request: no fault of the request, so whoever asks must know."""
