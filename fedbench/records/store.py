"""Records: one JSON file a run, its key, and the store on disk.

A record says what was run, what came out and what it cost. Its key is the SHA-256 of everything that decides the
result; two records of one key agree in all but times, peak memory, provenance and the name of the FM (`comparable`).

Blocks of a record, as the engine fills them (shares from 0 to 1, sizes in bytes, losses in nats, times in seconds;
null where a number does not exist):

    identity        key, method, method_version, scenario, seed, fm (its name), data_hash, fm_hash, precision;
                    inputs_hash: what the FM's tokenizer or image settings made of the data
    scenario        the resolved settings;  method: name, version, settings
    accuracy        selection; plug_in, proxy, untouched: accuracy, macro_f1, loss, rows, correct (packed bits);
                    gap; validation; per_client; unavailable: the reason where there is nothing to score. A loss of
                    null is one that was not finite: the model diverged, and its answers are no score
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
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from fedbench.errors import FedbenchError, one_line
from fedbench.files import write_text
from fedbench.records.schema import BLOCKS, Rounds

SCHEMA = 2
READABLE = (1, 2)
"""Schemas that are read: of the first, keys hold the FM as it was given, a path perhaps, and no `inputs_hash`."""
SIGNIFICANT_DIGITS = 9
"""Floats of a record are rounded to this many digits: enough for any measure, and stable under one more rounding."""

WIDTH = 120
VOLATILE = ("provenance", "compute.seconds", "compute.peak_memory_bytes", "identity.fm", "scenario.fm")
"""Dotted paths of what two runs of one key may differ in."""

_DEPTH = 32
"""How deep a record's tables may be nested; ours are six deep."""

_FILE = re.compile(r"s([0-9]+)-([0-9a-f]{12})\.json")


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

    Values are made plain and rounded on construction, so a record in memory equals the same record read back. Raises
    ValidationError for a block that is not laid out so (`records.schema`), and for one that contradicts another.
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

    @field_validator(*BLOCKS, "rounds")
    @classmethod
    def _laid_out(cls, value: Any, info: ValidationInfo) -> Any:
        """Check a block against its class; one that is empty is not there."""
        name = str(info.field_name)
        try:
            if name == "rounds":
                Rounds.model_validate({name: value})
            elif value or name == "identity":
                BLOCKS[name].model_validate(value if value is not None else {})
        except ValidationError as error:
            raise ValueError(complaint_of(error, "" if name == "rounds" else name)) from None
        return value

    @model_validator(mode="after")
    def _agrees(self) -> Record:
        for complaint in _contradictions(self):
            raise ValueError(complaint)
        return self

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
        content = _parse(path.read_text(encoding="utf-8"))
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
            f"{where}: {field} is {_shown(inside)}, but the file lies where {_shown(outside)} belongs; "
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


def _parse(text: str) -> Any:
    """JSON as a record has it: finite numbers, no name twice, whole characters. Raises ValueError for other JSON."""

    def number(literal: str) -> float:
        if not math.isfinite(value := float(literal)):
            raise ValueError(f"{literal[:20]} is not a finite number")
        return value

    def whole(literal: str) -> int:
        number(literal)
        return int(literal)

    def table(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise ValueError(f"{_shown(name)} is there twice in one table")
            found[name] = value
        return found

    content = json.loads(text, parse_float=number, parse_constant=number, parse_int=whole, object_pairs_hook=table)
    _sound(content, ())
    return content


def _sound(value: Any, place: tuple[str | int, ...]) -> None:
    """Raise ValueError where tables are nested too deeply, or a text holds half a character, which no file can."""
    wrong = "nested too deeply" if len(place) > _DEPTH else ""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not wrong:
        for name, item in inner:
            if isinstance(name, str):
                _sound(name, place)
            _sound(item, (*place, name))
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError:
                wrong = f"{_shown(value)} is not a text"
    if wrong:
        raise ValueError(f"{one_line('.'.join(map(str, place)))[:120]}: {wrong}")


def complaint_of(error: ValidationError, within: str = "") -> str:
    """The first thing that is wrong: dotted field, what was expected, what is there."""
    first = error.errors()[0]
    place = one_line(".".join(filter(None, [within, *map(str, first["loc"])])))
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        # A record's own checks name the field themselves.
        return message if not within else f"{place}: {message}"
    message = message[0].lower() + message[1:]
    found = "" if first["type"] == "missing" else f", found {_shown(first['input'])}"
    return f"{place}: {message}{found}"


def _shown(value: Any) -> str:
    """A value for a message: one short line of plain characters."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _close(a: float, b: float) -> bool:
    """Whether two values are the same but for the rounding of a record."""
    return math.isclose(a, b, rel_tol=1e-8, abs_tol=1e-8)


def _contradictions(record: Record) -> Iterator[str]:
    """What a record says in two places and differently, each as "field: complaint"."""
    who = record.identity
    for field, value in (
        ("method.name", record.method.get("name", who["method"])),
        ("scenario.name", record.scenario.get("name") or who["scenario"]),
    ):
        own = who[field.partition(".")[0]]
        if value != own:
            yield f"{field}: {_shown(value)}, but identity.{field.partition('.')[0]} is {_shown(own)}"
    if record.method and record.method.get("version") != who.get("method_version"):
        yield f"method.version: {_shown(record.method.get('version'))}, but identity.method_version is another"
    if record.status == "failed":
        if not record.error:
            yield "error: empty, but status is failed"
        return
    if record.error:
        yield "error: not null, but status is complete"
    for name in ("scenario", "method", "accuracy", "communication", "compute", "partition"):
        if not getattr(record, name):
            yield f"{name}: empty, but status is complete"
            return
    for name in ("split", "federation"):
        if name not in record.scenario:
            yield f"scenario.{name}: missing, but status is complete"
            return
    yield from _scores(record.accuracy)
    yield from _traffic(record)
    yield from _course(record)
    if gradient := record.gradient_error:
        errors = [e for point in gradient["points"] if (e := point["zero_filled"]["error"]) is not None]
        wanted = {"start": errors[0], "mean": float(np.mean(errors)), "final": errors[-1]} if errors else {}
        for name, value in wanted.items():
            if (said := gradient[name]) is not None and not _close(said, value):
                yield f"gradient_error.{name}: {said}, but its points say {value:.9g}"
    for i, (size, counts) in enumerate(
        zip(record.partition.get("sizes", ()), record.partition.get("label_counts", ()), strict=False)
    ):
        if sum(counts) != size:
            yield f"partition.sizes.{i}: {size}, but its label_counts sum to {sum(counts)}"


def _scores(accuracy: Mapping[str, Any]) -> Iterator[str]:
    tests = {"accuracy": accuracy}
    tests |= {f"accuracy.extra_tests.{name}": test for name, test in (accuracy.get("extra_tests") or {}).items()}
    for place, test in tests.items():
        scores = {name: score for name in ("plug_in", "proxy") if (score := test.get(name))}
        for name, score in scores.items():
            if score.get("correct") is None or score["accuracy"] is None:
                continue
            try:
                share = float(unpack_correct(score["correct"], score["rows"]).mean())
            except FedbenchError as error:
                yield f"{place}.{name}.{error}"
                continue
            if not _close(score["accuracy"], share):
                yield f"{place}.{name}.accuracy: {score['accuracy']}, but its per-row bits say {share:.9g}"
        if len({score["rows"] for score in scores.values()}) > 1:
            yield f"{place}.proxy.rows: {scores['proxy']['rows']}, but plug_in has {scores['plug_in']['rows']}"
    plug_in, proxy, gap = accuracy.get("plug_in"), accuracy.get("proxy"), accuracy.get("gap")
    points = [score["accuracy"] for score in (plug_in, proxy) if score and score["accuracy"] is not None]
    if gap is not None and (len(points) < 2 or not _close(gap, points[0] - points[1])):
        yield f"accuracy.gap: {gap}, but that is not plug_in minus proxy"
    clients = accuracy.get("per_client") or {}
    if values := clients.get("values"):
        lowest = sorted(values)[: max(1, round(0.1 * len(values)))]
        for name, value in (("mean", np.mean(values)), ("std", np.std(values)), ("worst_tenth", np.mean(lowest))):
            # The values are rounded to six digits.
            if not math.isclose(clients[name], value, abs_tol=2e-6):
                yield f"accuracy.per_client.{name}: {clients[name]}, but its values say {value:.6f}"


def _traffic(record: Record) -> Iterator[str]:
    traffic = record.communication
    for way in ("up", "down"):
        total = traffic[way]["bytes"]
        for what, value in (
            (f"{way}.by_kind", sum(kind["bytes"] for kind in traffic[way]["by_kind"].values())),
            ("per_round", sum(each[way] for each in traffic["per_round"])),
        ):
            if value != total:
                yield f"communication.{way}.bytes: {total}, but {what} sums to {value}"
    if traffic["setup_bytes"] > traffic["down"]["bytes"]:
        yield f"communication.setup_bytes: {traffic['setup_bytes']}, more than went down"


def _course(record: Record) -> Iterator[str]:
    """Contradictions in the rounds: their number and order, who took part, and their bytes."""
    rounds, per_round = record.rounds, record.communication["per_round"]
    for place, listed in (("rounds", rounds), ("communication.per_round", per_round)):
        if [each["round"] for each in listed] != list(range(len(listed))):
            yield f"{place}: not the rounds 0 to {len(listed) - 1} in order"
    if not record.accuracy.get("plug_in"):
        return
    expected = record.scenario["federation"]["rounds"]
    for place, listed in (("rounds", rounds), ("communication.per_round", per_round)):
        if len(listed) != expected:
            yield f"{place}: {len(listed)} of them, but scenario.federation.rounds is {expected}"
    if (selected := record.accuracy["selection"]["round"]) >= len(rounds):
        yield f"accuracy.selection.round: {selected}, but there are {len(rounds)} rounds"
    for i, (entry, size) in enumerate(zip(rounds, per_round, strict=False)):
        cohort, refused = set(entry["cohort"]), {each["client"] for each in entry["refused"]}
        if not set(entry["arrived"]) | refused <= cohort or set(entry["arrived"]) & refused:
            yield f"rounds.{i}: arrived and refused are not separate parts of its cohort"
        for way in ("up", "down"):
            if entry.get(f"bytes_{way}") not in (None, size[way]):
                yield f"communication.per_round.{i}.{way}: {size[way]}, but rounds has {entry[f'bytes_{way}']}"


def _misplaced(record: Record, path: Path, folders: bool) -> Iterator[tuple[str, str, str]]:
    """Field, what the record says and what its path says, where the two differ."""
    who = record.identity
    told = {"scenario": path.parent.parent.name, "method": path.parent.name} if folders else {}
    if named := _FILE.fullmatch(path.name):
        told |= {"seed": named[1], "key": named[2]}
    for name, outside in told.items():
        inside = record.key[:12] if name == "key" else str(who[name])
        if inside != outside:
            yield f"identity.{name}", inside, outside


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


def no_upload(run: Record) -> str:
    """Why the scored model of a run with rounds is as it started: no upload until then. Nothing where there was one."""
    scored = (run.accuracy.get("selection") or {}).get("round", len(run.rounds) - 1)
    rounds = run.rounds[: scored + 1]
    if not rounds or any(entry["arrived"] for entry in rounds):
        return ""
    if any(entry["arrived"] for entry in run.rounds):
        what = "no upload had arrived by the round that is scored"
    elif any(entry["refused"] for entry in run.rounds):
        what = "every upload was refused"
    else:
        what = "no upload ever arrived"
    return f"{what}: the model is as it started"


def rounds_without_upload(run: Record) -> int:
    """In how many of its rounds no upload was taken."""
    return sum(not entry["arrived"] for entry in run.rounds)


def diverged(score: Mapping[str, Any] | None) -> bool:
    """Whether a model's loss was not a finite number: its answers are then no answers."""
    return score is not None and "loss" in score and score["loss"] is None


def pack_correct(correct: NDArray[np.bool_]) -> str:
    """Which test rows were answered rightly [n], as base64 of packed bits, first row in the highest bit."""
    return base64.b64encode(np.packbits(np.asarray(correct, dtype=bool)).tobytes()).decode("ascii")


def unpack_correct(text: str, rows: int) -> NDArray[np.bool_]:
    """Undo `pack_correct` for `rows` rows. Raises FedbenchError if the text does not hold that many."""
    try:
        packed = np.frombuffer(base64.b64decode(text, validate=True), dtype=np.uint8)
    except (binascii.Error, ValueError):
        raise FedbenchError("correct: not base64 of packed bits") from None
    if len(packed) != (rows + 7) // 8:
        raise FedbenchError(f"correct: {len(packed)} bytes cannot hold {rows} rows")
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
