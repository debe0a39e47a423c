"""Records: one JSON file a run, its key, and the store on disk.

A record says what was run, what came out and what it cost. Its key is the SHA-256 of everything that decides the
result; two records of one key agree in all but times, peak memory, provenance and the name of the FM (`comparable`).

Blocks of a record, as the engine fills them (shares from 0 to 1, sizes in bytes, losses in nats, times in seconds;
null where a number does not exist):

    identity        key, method, method_version, scenario, seed, fm (its name), data_hash, fm_hash, precision;
                    inputs_hash: what the FM's tokenizer or image settings made of the data
    scenario        the resolved settings;  method: name, version, settings
    accuracy        selection; plug_in, proxy, untouched: accuracy, macro_f1, loss, rows, correct (packed bits);
                    gap; validation; per_client; unavailable: the reason where there is nothing to score
    communication   up, down: bytes, by_kind; setup_bytes; refused; per_round
    gradient_error  points: round, phase, restricted, zero_filled, lora, head, layers; start, mean, final
    distillation    one entry a layer: hidden, weight, hidden_before, weight_before
    exposure        verbatim, within_1_percent: all, without_embeddings
    compute         trainable_parameters, resident_parameters, local_steps, step_flops, peak_memory_bytes, seconds
    rounds          round, cohort, arrived, refused, loss, plug_in_validation, proxy_validation, bytes_up, bytes_down
    partition       hash, sizes, label_counts, skew, attempts
    provenance      versions, platform, hardware, git commit, data notes, FM's origin, executor, threads, time

Nothing here imports torch: tables are made from records on any machine.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from fedbench.errors import FedbenchError
from fedbench.files import write_text

SCHEMA = 2
READABLE = (1, 2)
"""Schemas that are read: of the first, keys hold the FM as it was given, a path perhaps, and no `inputs_hash`."""
SIGNIFICANT_DIGITS = 9
"""Floats of a record are rounded to this many digits: enough for any measure, and stable under one more rounding."""

WIDTH = 120
VOLATILE = ("provenance", "compute.seconds", "compute.peak_memory_bytes", "identity.fm", "scenario.fm")
"""Dotted paths of what two runs of one key may differ in."""

_REQUIRED = ("key", "method", "scenario", "seed")


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: rounded floats, lists for tuples, null for what is not a finite number.

    Raises TypeError for a value that has no JSON form.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (np.generic, np.ndarray)):
        return plain(value.tolist())
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        # Adding 0.0 turns -0.0 into 0.0: equal numbers have to be equal text.
        return float(f"{value:.{SIGNIFICANT_DIGITS}g}") + 0.0 if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    raise TypeError(f"{type(value).__name__} cannot be kept in a record")


class Record(BaseModel):
    """One run. Blocks are plain mappings, laid out as this module's docstring says.

    Values are made plain and rounded on construction, so a record in memory equals the same record read back.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    # `schema` in the file; the attribute has another name because pydantic's own classes have a `schema`.
    schema_version: int = Field(default=SCHEMA, alias="schema")
    status: Literal["complete", "failed"]
    error: dict[str, Any] | None = None
    identity: dict[str, Any]
    scenario: dict[str, Any] = Field(default_factory=dict)
    method: dict[str, Any] = Field(default_factory=dict)
    accuracy: dict[str, Any] = Field(default_factory=dict)
    communication: dict[str, Any] = Field(default_factory=dict)
    gradient_error: dict[str, Any] | None = None
    distillation: list[dict[str, Any]] = Field(default_factory=list)
    exposure: dict[str, Any] | None = None
    compute: dict[str, Any] = Field(default_factory=dict)
    rounds: list[dict[str, Any]] = Field(default_factory=list)
    partition: dict[str, Any] = Field(default_factory=dict)
    provenance: dict[str, Any] = Field(default_factory=dict)

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        return plain(value)

    @field_validator("identity")
    @classmethod
    def _identified(cls, identity: dict[str, Any]) -> dict[str, Any]:
        if missing := [name for name in _REQUIRED if name not in identity]:
            raise ValueError(f"identity lacks {', '.join(missing)}")
        return identity

    @property
    def key(self) -> str:
        return str(self.identity["key"])

    def to_json(self) -> dict[str, Any]:
        """The record as it lies in the file."""
        return self.model_dump(by_alias=True)


def canonical_json(obj: Any) -> str:
    """The one JSON text of `obj`: sorted keys, no blanks, floats in full. Raises FedbenchError for NaN or infinity."""
    try:
        return json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise FedbenchError(f"settings that enter a record's key have to be plain finite values: {error}") from None


def record_key(obj: Any) -> str:
    """SHA-256 of the canonical JSON of `obj`, 64 hex digits."""
    return hashlib.sha256(canonical_json(obj).encode()).hexdigest()


def record_path(root: Path, scenario: str, method: str, seed: int, key: str) -> Path:
    """Where the record of `key` lies under `root`: <scenario>/<method>/s<seed>-<key12>.json."""
    return Path(root) / scenario / method / f"s{seed}-{key[:12]}.json"


def path_of(record: Record, root: Path) -> Path:
    """Where `record` lies under `root`."""
    who = record.identity
    return record_path(root, who["scenario"], who["method"], who["seed"], who["key"])


def save(record: Record, root: Path) -> Path:
    """Write `record` under `root` and return its path.

    Atomic: at any moment, power cuts included, the path holds the old record, the new one, or nothing.
    """
    path = path_of(record, root)
    write_text(path, dumps(record.to_json()))
    return path


def load(path: Path) -> Record:
    """The record in the file `path`. Raises FedbenchError, naming the file, for anything that is not one."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise FedbenchError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise FedbenchError(f"{path}: not a record, JSON expected: {error}; delete the file and run again") from None
    schema = content.get("schema") if isinstance(content, dict) else None
    if type(schema) is not int or schema not in READABLE:
        known = " and ".join(map(str, READABLE))
        raise FedbenchError(f"{path}: schema {schema!r}, this fedbench reads schemas {known}; run again or upgrade")
    try:
        return Record.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise FedbenchError(f"{path}: not a record: {place}: {first['msg']}; delete the file and run again") from None


def load_all(root: Path) -> list[Record]:
    """Every record under `root`, in the order of their paths; none where there is no such folder."""
    return [load(path) for path in sorted(Path(root).glob("*/*/s*.json"))]


def comparable(record: Record) -> dict[str, Any]:
    """The record without `VOLATILE`: what has to be identical whenever the same key is run on the same device."""
    content = record.to_json()
    for dotted in VOLATILE:
        *parents, last = dotted.split(".")
        block = content
        for parent in parents:
            block = block[parent]
        block.pop(last, None)
    return content


def differences(a: Record, b: Record) -> list[str]:
    """Dotted paths at which the comparable parts of two records differ, sorted; empty if they agree."""
    return sorted(_differences(comparable(a), comparable(b), ""))


def _differences(a: Any, b: Any, path: str) -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in a.keys() | b.keys():
            below = f"{path}.{key}" if path else key
            if key in a and key in b:
                yield from _differences(a[key], b[key], below)
            else:
                yield below
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _differences(x, y, f"{path}.{index}")
    elif a != b or type(a) is not type(b):
        # A whole float is written 1.0 and an int 1, so the type is part of the bytes.
        yield path


def pack_correct(correct: NDArray[np.bool_]) -> str:
    """Which test rows were answered rightly [n], as base64 of packed bits, first row in the highest bit."""
    return base64.b64encode(np.packbits(np.asarray(correct, dtype=bool)).tobytes()).decode("ascii")


def unpack_correct(text: str, rows: int) -> NDArray[np.bool_]:
    """Undo `pack_correct` for `rows` rows. Raises FedbenchError if the text does not hold that many."""
    try:
        packed = np.frombuffer(base64.b64decode(text, validate=True), dtype=np.uint8)
    except (binascii.Error, ValueError):
        raise FedbenchError("accuracy.correct: not base64; the record was damaged, run again") from None
    if len(packed) != (rows + 7) // 8:
        raise FedbenchError(f"accuracy.correct: {len(packed)} bytes cannot hold {rows} rows; run again")
    return np.unpackbits(packed, count=rows).astype(bool)


def dumps(content: Any) -> str:
    """JSON that reads well in a diff: sorted keys, indented, one row of a table a line, number lists filled."""
    return _text(content, 0, 0) + "\n"


def _scalar(value: Any) -> bool:
    return not isinstance(value, (dict, list))


def _text(value: Any, indent: int, used: int) -> str:
    """JSON of `value` whose first line begins after `indent` blanks and `used` more characters."""
    inner = " " * (indent + 1)
    if isinstance(value, dict) and value:
        lines = []
        for key in sorted(value):
            name = _flat(key) + ": "
            lines.append(inner + name + _text(value[key], indent + 1, len(name)))
        return "{\n" + ",\n".join(lines) + "\n" + " " * indent + "}"
    if isinstance(value, list) and value:
        flat = _flat(value)
        if all(map(_scalar, value)):
            if indent + used + len(flat) <= WIDTH or len(value) == 1:
                return flat
            return "[\n" + _fill([_flat(item) for item in value], inner) + "\n" + " " * indent + "]"
        return "[\n" + ",\n".join(inner + _row(item, indent + 1) for item in value) + "\n" + " " * indent + "]"
    return _flat(value)


def _row(item: Any, indent: int) -> str:
    """An entry of a list: on one line if it is a mapping of scalars that fits, like a row of a table."""
    if isinstance(item, dict) and all(map(_scalar, item.values())):
        flat = _flat(item)
        if indent + len(flat) <= WIDTH:
            return flat
    return _text(item, indent, 0)


def _flat(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)


def _fill(items: list[str], prefix: str) -> str:
    """Items separated by commas, as many a line as fit."""
    lines: list[str] = []
    line = ""
    for index, item in enumerate(items):
        text = item + ("," if index + 1 < len(items) else "")
        if line and len(prefix) + len(line) + 1 + len(text) > WIDTH:
            lines.append(prefix + line)
            line = text
        else:
            line = f"{line} {text}" if line else text
    lines.append(prefix + line)
    return "\n".join(lines)
