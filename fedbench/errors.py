"""Errors a user can act on."""


class FedbenchError(Exception):
    """Bad input: one line that names the thing, the place and the fix.

    The command line prints the message without a traceback and exits with code 2.
    """


class MessageError(FedbenchError):
    """A message that may not cross the boundary: malformed, oversized, non-finite or unexpected."""
