"""Errors a user can act on."""


class FedbenchError(Exception):
    """Bad input: one line that names the thing, the place and the fix.

    The command line prints the message without a traceback and exits with code 2.
    """


class MessageError(FedbenchError):
    """A message that may not cross the boundary: malformed, oversized, non-finite or unexpected."""


class DamagedFileError(FedbenchError):
    """A file that fedbench wrote itself and that no longer holds what was written."""


class DivergedError(FedbenchError):
    """Training left a model whose numbers are not finite, so there is nothing to score."""


class ClaimedError(FedbenchError):
    """Another process is at the same run."""
