"""Errors a user can act on, and text of others made fit for a terminal."""

from __future__ import annotations

import re


class FedbenchError(Exception):
    """Bad input: one line that names the thing, the place and the fix.

    The command line prints the message without a traceback and exits with code 2.
    """


class MessageError(FedbenchError):
    """A message that may not cross the boundary: malformed, oversized, non-finite or unexpected."""


_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, what turns the direction of writing, and bytes of a file name that are no text."""


def printable(text: str, but: str = "") -> str:
    """`text` with every character that a terminal would act on, those in `but` excepted, written as its escape."""
    return _UNPRINTABLE.sub(lambda m: m[0] if m[0] in but else m[0].encode("unicode_escape").decode(), text)
