"""Errors a user can act on, and text of others made fit for a terminal."""

from __future__ import annotations

import re


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


def printable(text: str, but: str = "") -> str:
    """`text` with every character that a terminal would act on, those in `but` excepted, written as its escape.

    That is control characters, and those that reorder or hide others.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in but else c.encode("unicode_escape").decode() for c in text)


def one_line(text: object) -> str:
    """`text` as it can be shown anywhere: printable, and on one line."""
    return printable(re.sub(r"\s", " ", str(text)))
