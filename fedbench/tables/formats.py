"""How numbers are written in tables, panels and progress."""

from __future__ import annotations

import math

MEGA = 1e6


def signed(value: float) -> str:
    """One decimal with its sign, as differences in points are written."""
    text = f"{value:+.1f}"
    return text.replace("-", "−") if float(text) else "0.0"


def three_digits(value: float) -> str:
    """About three significant digits, without an exponent."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 4)}f}"


def megabytes(size: float) -> str:
    """Bytes in units of 10^6."""
    return three_digits(size / MEGA)


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def seeds_text(n: int) -> str:
    return f"{n} seed" + ("" if n == 1 else "s")
