"""TOML files as they are read, before anything in them is checked but their form; needs no pydantic."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from datetime import date, time
from pathlib import Path
from typing import Any

from fedbench.errors import FedbenchError, printable
from fedbench.names import bad_name, plugin_name
from fedbench.scenario.settings import leaves


def split_names(path: Path) -> list[str]:
    """The names of a scenario file's splits, in the file's order. Raises FedbenchError for an unreadable file."""
    return splits_of(path, read_toml(path))


def splits_of(path: Path, raw: Mapping[str, Any]) -> list[str]:
    """The same of a file that was read already."""
    if why := bad_name(plugin_name(path.stem)):
        raise FedbenchError(f"{printable(str(path))}: a scenario is called as its file, and {why}")
    splits = tables_of(path, raw, "splits")
    if not splits:
        raise FedbenchError(f"{path}: no [splits.NAME] table; a scenario needs at least one")
    return list(splits)


def read_toml(path: Path) -> dict[str, Any]:
    """What a TOML file holds, without dates, which no setting is, and without what a terminal would act on.

    Raises FedbenchError, with file and place, for one that cannot be read or holds such a thing.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # editors on Windows begin with a mark
    except OSError as error:
        raise FedbenchError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise FedbenchError(f"{path}: not TOML: it is not in UTF-8; save it as that") from None
    except (ValueError, RecursionError) as error:
        raise FedbenchError(f"{path}: not TOML: {error}") from None
    for place, value in leaves(content):
        name = printable(".".join(place))
        if any(printable(part) != part for part in place):
            raise FedbenchError(f"{path}: {name}: a name may not hold control characters")
        if isinstance(value, str) and printable(value, but="\n\t") != value:
            raise FedbenchError(f"{path}: {name}: text may not hold control characters; {printable(value)[:60]!r} does")
        if isinstance(value, (date, time)):
            raise FedbenchError(
                f"{path}: {name}: {value} is a date or a time, which no setting is; write text in quotes"
            )
    return content


def tables_of(path: Path, raw: Mapping[str, Any], name: str) -> dict[str, dict[str, Any]]:
    """The [name.*] tables of a file; FedbenchError where something else stands in their place."""
    tables = raw.get(name, {})
    if not isinstance(tables, dict) or not all(isinstance(table, dict) for table in tables.values()):
        raise FedbenchError(f"{path}: {name} has to hold tables, written as [{name}.NAME]")
    for key in tables:
        if why := bad_name(key):
            raise FedbenchError(f"{path}: {name}: {why}")
    return tables
