"""What a checkpoint says in plain values: its index and its journal, checked. Loads no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedbench.errors import DamagedFileError

INDEX = "checkpoint.json"


def read_journal(folder: Path, key: str | None = None) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """The index of the checkpoint in `folder` and the lines of its journal; None where there is none, or none of `key`.

    Raises DamagedFileError, naming the file, for what is not as it was written.
    """
    path = folder / INDEX
    if not path.exists():
        return None
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        said = index.pop("checksum")
        if said != checksum(index):
            raise ValueError("its checksum is another")
        if key is not None and index["key"] != key:
            return None
        name, length, digest = index["journal"]
        journal = (folder / name).read_bytes()[:length]
        if len(journal) != length or hashlib.sha256(journal).hexdigest() != digest:
            raise ValueError(f"{name} is not what was written")
        return index, [json.loads(line) for line in journal.decode().splitlines()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedFileError(f"{path}: not a whole checkpoint: {error}; delete its folder") from None


def text(content: Any) -> str:
    """JSON as checkpoints have it."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def checksum(index: Mapping[str, Any]) -> str:
    return hashlib.sha256(text(index).encode()).hexdigest()
