"""Files of a user's own as tables: CSV, TSV, JSONL, JSON, parquet, LEAF's JSON, and folders of `save_to_disk`."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from fedbench.data.own.decode import PACKED, suffix_of, text_of
from fedbench.data.own.table import Table, rows_from_1
from fedbench.data.sources import cure, read_bytes
from fedbench.errors import FedbenchError

SUFFIXES = (".csv", ".tsv", ".tab", ".jsonl", ".ndjson", ".json", ".parquet")
DELIMITERS = {",": "CSV", ";": "CSV with semicolons", "\t": "TSV", "|": "CSV with bars"}


def read_table(path: Path, header: bool = True, encoding: str | None = None) -> Table:
    """The table in a file, or in a folder that `datasets.save_to_disk` wrote.

    Raises FedbenchError, which names file and fix, where it is none of the known kinds or damaged.
    """
    if path.is_dir():
        return _from_disk(path)
    suffix = suffix_of(path)
    if suffix == ".parquet":
        return _parquet(path)
    if suffix not in SUFFIXES:
        known = ", ".join(SUFFIXES)
        raise FedbenchError(f"{path}: no kind of file that is known; expected {known}, or one of them as .gz or .zst")
    text, found = text_of(path, encoding)
    remark = f", {found}" if found else ""
    if suffix in (".jsonl", ".ndjson"):
        return _json_lines(path, text, remark)
    if suffix == ".json":
        return _json(path, text, remark)
    return _delimited(path, text, header, remark)


# ---------------------------------------------------------------- CSV and TSV


def _delimited(path: Path, text: str, header: bool, remark: str) -> Table:
    """A table with a line a row, or quoted cells that span several."""
    tabs = suffix_of(path) != ".csv"
    rows: list[tuple[int, list[str]]]
    if tabs:
        kind, rows = "TSV", _tab_rows(text)
    else:
        first = text.lstrip("\n").split("\n", 1)[0]
        # Outside of quoted cells the first line has no prose as a rule, so what it has most of divides it.
        delimiter = max(DELIMITERS, key=re.sub(r'"[^"]*"', "", first).count)
        kind, rows = DELIMITERS[delimiter], _quoted_rows(str(path), text, delimiter)
    head = rows[0][1]
    names = [cell.strip() for cell in head] if header else [str(n) for n in range(1, len(head) + 1)]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise FedbenchError(f"{path}: has {names.count(twice)} columns called {twice!r}; keep one of them")
    kept, places, broken = [], [], []
    for line, row in rows[1:] if header else rows:
        if len(row) == len(names):
            kept.append(row)
            places.append(f"line {line}")
        else:
            broken.append((f"line {line}", "has another number of columns", f" ({len(row)}, not {len(names)})"))
    columns = dict(zip(names, zip(*kept, strict=True), strict=True)) if kept else dict.fromkeys(names, ())
    return Table(str(path), columns, places, f"{kind}{remark}", broken)


def _tab_rows(text: str) -> list[tuple[int, list[str]]]:
    """Rows of a TSV. Marks of quotation mean something only where cells are quoted as spreadsheets do it.

    GLUE's files know no quoting: there a mark is a character like any other.
    """
    plain = [(n, line.split("\t")) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if '"' not in text:
        return plain
    try:
        quoted = _quoted_rows("", text, "\t")
    except FedbenchError:
        return plain
    even = len({len(row) for _, row in quoted}) == 1
    doubled = any(cell.startswith('"') and cell.endswith('"') and '""' in cell for _, row in plain for cell in row)
    uneven = len({len(row) for _, row in plain}) > 1
    return quoted if even and (uneven or doubled) else plain


def _quoted_rows(where: str, text: str, delimiter: str) -> list[tuple[int, list[str]]]:
    """The rows that hold anything, each with the line it begins in. Raises FedbenchError for stray quotation marks."""
    rows: list[tuple[int, list[str]]] = []
    line = 0
    # A cell may hold a whole document; the module's limit is one for the process, so it is put back.
    limit = csv.field_size_limit(max(len(text), csv.field_size_limit()))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if row:
                rows.append((line + 1, row))
            line = reader.line_num
    except csv.Error as error:
        raise FedbenchError(
            f"{where}: the row that begins in line {line + 1} has a stray quotation mark, or one that is never closed "
            f"({error}); quote that cell and double the marks in it"
        ) from None
    finally:
        csv.field_size_limit(limit)
    return rows


# ---------------------------------------------------------------- JSON


def _json_lines(path: Path, text: str, remark: str) -> Table:
    rows, places, broken = [], [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            broken.append((f"line {number}", "is no JSON object", f" ({' '.join(str(error).split())[:80]})"))
            continue
        if isinstance(row, dict):
            rows.append(row)
            places.append(f"line {number}")
        else:
            broken.append((f"line {number}", "is no JSON object", f" but {type(row).__name__}"))
    return _of_objects(str(path), rows, places, f"JSON lines{remark}", broken)


def _json(path: Path, text: str, remark: str) -> Table:
    """A list of objects, alone or under one name; LEAF's users; or columns as pandas writes them."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        lines = _json_lines(path, text, remark) if text.lstrip().startswith("{") else None
        return lines if lines is not None and len(lines) else _refuse(path, error)
    if isinstance(content, dict):
        if "users" in content and "user_data" in content:
            return _leaf(path, content)
        lists = [
            value for value in content.values() if isinstance(value, list) and value and isinstance(value[0], dict)
        ]
        if len(lists) == 1:
            content = lists[0]
        elif lists and len(lists) == len(content):
            return _by_client(path, content, remark)
        elif content and all(isinstance(value, dict) for value in content.values()):
            content = {name: list(column.values()) for name, column in content.items()}
            lengths = {len(column) for column in content.values()}
            if len(lengths) == 1:
                places = rows_from_1(lengths.pop())
                return Table(str(path), content, places, f"JSON, columns{remark}")
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise FedbenchError(f"{path}: holds no list of JSON objects, and no users of LEAF")
    return _of_objects(str(path), content, rows_from_1(len(content)), f"JSON{remark}")


def _by_client(path: Path, content: Mapping[str, list[Any]], remark: str) -> Table:
    """Lists of rows by the name of their client, as FedLLM-Bench (Ye et al. 2024) has them: its name is column user."""
    rows = [{"user": name, **row} for name, own in content.items() for row in own if isinstance(row, dict)]
    if len(rows) != sum(map(len, content.values())):
        raise FedbenchError(f"{path}: the lists of its clients hold other things than JSON objects")
    places = [f"row {number} of {name[:60]}" for name, own in content.items() for number in range(1, len(own) + 1)]
    return _of_objects(str(path), rows, places, f"JSON, {len(content)} clients{remark}")


def _refuse(path: Path, error: Exception) -> NoReturn:
    raise FedbenchError(f"{path}: is no JSON: {' '.join(str(error).split())[:120]}; {cure(read_bytes(path, 200))}")


def _of_objects(
    where: str,
    rows: Sequence[Mapping[str, Any]],
    places: list[str],
    about: str,
    broken: Sequence[tuple[str, str, str]] = (),
) -> Table:
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {str(name): [row.get(name) for row in rows] for name in names}
    return Table(where, columns, places, about, broken)


def _leaf(path: Path, content: Mapping[str, Any]) -> Table:
    """The users of LEAF (Caldas et al. 2018): columns x, y and user; of an x that is a record, 1, 2 and so on too."""
    columns: dict[str, list[Any]] = {"x": [], "y": [], "user": []}
    places = []
    for user in content["users"]:
        data = content["user_data"].get(user)
        x, y = (data.get("x"), data.get("y")) if isinstance(data, dict) else (None, None)
        if not isinstance(x, list) or not isinstance(y, list) or len(x) != len(y):
            raise FedbenchError(f"{path}: the user {str(user)[:60]!r} of LEAF has no x and y of one length")
        columns["x"] += x
        columns["y"] += y
        columns["user"] += [str(user)] * len(x)
        places += [f"row {number} of user {str(user)[:60]}" for number in range(1, len(x) + 1)]
    first = columns["x"][0] if columns["x"] else None
    if isinstance(first, list) and any(isinstance(cell, str) for cell in first):
        for place in range(len(first)):
            columns[str(place + 1)] = [row[place] if place < len(row) else None for row in columns["x"]]
    return Table(str(path), columns, places, f"LEAF, {len(content['users'])} users")


# ---------------------------------------------------------------- Arrow


def _parquet(path: Path) -> Table:
    import pyarrow.parquet as pq

    if path.suffix.lower() in PACKED:
        raise FedbenchError(f"{path}: parquet is packed within already; unpack it")
    head = read_bytes(path, 200)
    try:
        table = pq.read_table(path)
        return _arrow(str(path), table, table.schema, "parquet")
    except Exception as error:  # a damaged file makes pyarrow raise almost anything
        reason = " ".join(str(error).split())[:200]
        raise FedbenchError(f"{path}: cannot be read as parquet: {reason}; {cure(head)}") from None


def _arrow(where: str, table: Any, schema: Any, about: str) -> Table:
    """A table of Arrow. The hub's files say the names of classes in their metadata."""
    names: dict[str, Sequence[str]] = {}
    if b"huggingface" in (schema.metadata or {}):
        import datasets

        features = datasets.Features.from_arrow_schema(schema)
        names = {name: kind.names for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)}
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    return Table(where, columns, rows_from_1(table.num_rows), about, names=names)


def _from_disk(folder: Path) -> Table:
    """What `datasets.save_to_disk` wrote; of several splits, one has to be named as its folder."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # the library raises what it likes for a folder that it did not write
        reason = " ".join(str(error).split())[:160]
        raise FedbenchError(f"{folder}: cannot be read as a folder of datasets.save_to_disk: {reason}") from None
    if isinstance(loaded, datasets.DatasetDict):
        names = ", ".join(f"{folder.name}/{split}" for split in loaded)
        raise FedbenchError(f"{folder}: holds several splits; name their folders, {names}")
    return of_dataset(str(folder), loaded, "folder of save_to_disk")


def of_dataset(where: str, loaded: Any, about: str) -> Table:
    """The table in a split of the library `datasets`; images stay encoded."""
    import datasets

    for name, kind in loaded.features.items():
        if isinstance(kind, datasets.Image):
            loaded = loaded.cast_column(name, datasets.Image(decode=False))
    names = {name: kind.names for name, kind in loaded.features.items() if isinstance(kind, datasets.ClassLabel)}
    columns = {name: list(loaded[name]) for name in loaded.column_names}
    return Table(where, columns, rows_from_1(len(loaded)), about, names=names)


def saved_splits(folder: Path) -> Iterator[str]:
    """The splits in a folder that `datasets.save_to_disk` wrote for several of them."""
    if (folder / "dataset_dict.json").is_file():
        yield from json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
