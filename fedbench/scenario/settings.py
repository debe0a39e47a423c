"""The one grammar of settings, and what is wrong with one."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date, time
from typing import TYPE_CHECKING, Any

from fedbench.errors import FedbenchError, printable

if TYPE_CHECKING:
    from pydantic import ValidationError


def leaves(value: Any, place: tuple[str, ...] = ()) -> Iterable[tuple[tuple[str, ...], Any]]:
    """Every value in nested tables and lists, with its place; empty ones themselves."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not inside:
        yield place, value
    for key, inner in inside:
        yield from leaves(inner, (*place, str(key)))


@dataclass(frozen=True)
class Mistake:
    """The mistake to name of those that pydantic found: a field it does not know before one that is missing."""

    place: tuple[str, ...]
    message: str
    unknown: bool


def mistake(error: ValidationError) -> Mistake:
    """What to say of values that were refused."""
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    message = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    message = message[0].lower() + message[1:]
    value = first["input"]
    if message.startswith("input should") and (value is None or isinstance(value, (bool, int, float, str))):
        message += f", not {printable(str(value))[:60]!r}" if isinstance(value, str) else f", not {str(value)[:60]}"
    return Mistake(tuple(map(str, first["loc"])), message, first["type"] == "extra_forbidden")


def parse_value(key: str, text: str) -> Any:
    """A value of `--set`, of scenario and method alike: TOML where it parses as TOML, "none" as null, else text.

    Raises FedbenchError, naming the key, for a date or a time.
    """
    if text.lower() in ("none", "null"):
        return None
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except (ValueError, RecursionError):
        return text
    if any(isinstance(leaf, (date, time)) for _, leaf in leaves(value)):
        raise FedbenchError(f"--set {key}: {text} is a date or a time, which no setting is; quote text")
    return value


def as_text(value: Any) -> str:
    """A value as `--set` takes it: text as it is; numbers, truth values and lists as JSON, which is TOML too."""
    if isinstance(value, str):
        return value
    # But for these, which JSON has other words for.
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else json.dumps(value)
