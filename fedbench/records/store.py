"""Records on disk: one JSON file a run, under a name that follows from what it is.

Its key is the SHA-256 of everything that decides the result; two records of one key agree in all but times, peak
memory, provenance and the name of the FM (`records.differences`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedbench.errors import FedbenchError, one_line
from fedbench.files import write_text
from fedbench.records.record import Record, complaint_of
from fedbench.records.schema import READABLE
from fedbench.records.text import canonical_json, dumps, parse, shown

_FILE = re.compile(r"s([0-9]+)-([0-9a-f]{12})\.json")


def record_key(obj: Any) -> str:
    """SHA-256 of the canonical JSON of `obj`, 64 hex digits."""
    return hashlib.sha256(canonical_json(obj).encode()).hexdigest()


def record_path(root: Path, scenario: str, method: str, seed: int, key: str) -> Path:
    """Where the record of `key` lies under `root`: <scenario>/<method>/s<seed>-<key12>.json."""
    return Path(root) / scenario / method / f"s{seed}-{key[:12]}.json"


def path_of(record: Record, root: Path) -> Path:
    """Where `record` lies under `root`."""
    who = record.identity
    return record_path(root, who.scenario, who.method, who.seed, who.key)


def save(record: Record, root: Path) -> Path:
    """Write `record` under `root` and return its path.

    Atomic: at any moment, power cuts included, the path holds the old record, the new one, or nothing.
    """
    path = path_of(record, root)
    write_text(path, dumps(record.to_json()))
    return path


def load(path: Path) -> Record:
    """The record in the file `path`.

    Raises FedbenchError, naming file and field, for anything that is not a record, that contradicts itself, or that
    lies under a name of another seed or key; in a folder called records, of another method or scenario as well.
    """
    return _load(Path(path), Path(path).parent.parent.parent.name == "records")


def _load(path: Path, folders: bool) -> Record:
    """The record in `path`; with `folders` the names of the two folders it lies in have to be its own as well."""
    where = one_line(path)
    try:
        if path.exists() and not path.is_file():
            raise FedbenchError(f"{where}: not a file, so not a record; move it away")
        content = parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FedbenchError(f"{where}: cannot be read: {error.strerror}") from None
    except RecursionError:
        raise FedbenchError(f"{where}: not a record: nested too deeply; delete the file and run again") from None
    except ValueError as error:
        raise FedbenchError(f"{where}: not a record, JSON expected: {error}; delete the file and run again") from None
    schema = content.get("schema") if isinstance(content, dict) else None
    if type(schema) is not int or schema not in READABLE:
        known = " and ".join(map(str, READABLE))
        raise FedbenchError(f"{path}: schema {schema!r}, this fedbench reads schemas {known}; run again or upgrade")
    try:
        record = Record.model_validate(content)
    except ValidationError as error:
        complaint = complaint_of(error)
        raise FedbenchError(f"{where}: not a record: {complaint}; delete the file and run again") from None
    for field, inside, outside in _misplaced(record, path, folders):
        raise FedbenchError(
            f"{where}: {field} is {shown(inside)}, but the file lies where {shown(outside)} belongs; "
            "put it in its place, or delete it and run again"
        )
    return record


def load_all(root: Path) -> list[Record]:
    """Every record under `root`, in the order of their paths; none where there is no such folder.

    Raises FedbenchError for the first file that `load` would refuse, and for one that does not lie at
    <scenario>/<method>/s<seed>-<key12>.json: a table that leaves a record out without a word is a wrong table.
    """
    root = Path(root)
    paths = sorted({*root.glob("*/*/*.json"), *root.rglob("*.json")})
    paths = [path for path in paths if not any(part.startswith(".") for part in path.relative_to(root).parts)]
    found, refused = [], []
    for path in paths:
        try:
            record = _load(path, folders=len(path.relative_to(root).parts) == 3)
            if path != (place := path_of(record, root)):
                raise FedbenchError(
                    f"{one_line(path)}: this record belongs at {one_line(place)}; put it there, or move it away"
                )
            found.append(record)
        except FedbenchError as error:
            refused.append(str(error))
    if refused:
        others = f" ({len(refused)} of {len(paths)} files are refused; this is the first)" if refused[1:] else ""
        raise FedbenchError(refused[0] + others)
    return found


def _misplaced(record: Record, path: Path, folders: bool) -> Iterator[tuple[str, str, str]]:
    """Field, what the record says and what its path says, where the two differ."""
    who = record.identity
    told = [("scenario", who.scenario, path.parent.parent.name), ("method", who.method, path.parent.name)]
    told = told if folders else []
    if named := _FILE.fullmatch(path.name):
        told += [("seed", str(who.seed), named[1]), ("key", who.key[:12], named[2])]
    for name, inside, outside in told:
        if inside != outside:
            yield f"identity.{name}", inside, outside
