"""Texts and labels in tables (CSV, TSV, parquet), from a folder of the user's or from the hub."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedbench.data.labels import class_numbers, shown
from fedbench.data.rows import Part
from fedbench.data.sets.dataset import DataSet, Rows
from fedbench.data.sources import (
    checked_text,
    cure,
    find_files,
    listing,
    load_from_hub,
    not_at_hand,
    read_bytes,
    read_parquet,
    set_folders,
)
from fedbench.errors import FedbenchError

SENTENCE = (("text", "sentence", "content"),)


@dataclass(frozen=True)
class TextSource:
    """Where the texts of a data set lie; `DataSet.source` of text data sets.

    folders: names its folder goes by. hub: id, commit, configuration, test split; None for a set that is on no hub.
    columns: for each segment (one for sentences, two for pairs) the names its column goes by. label: names of the
    labels' column; labels are numbers of classes, or their names. train, test: file stems, the first found wins.
    extra_tests: file stems and hub split of further test sets by name. broken_rows: whether the official file has a few
    rows with columns missing, to be left out.
    """

    folders: tuple[str, ...]
    hub: tuple[str, str, str | None, str] | None = None
    columns: tuple[tuple[str, ...], ...] = SENTENCE
    label: tuple[str, ...] = ("label",)
    train: tuple[str, ...] = ("train",)
    test: tuple[str, ...] = ("validation", "dev")
    extra_tests: Mapping[str, tuple[tuple[str, ...], str]] = field(default_factory=dict)
    broken_rows: bool = False

    def __call__(self, about: DataSet, revision: str | None, root: Path | None) -> Rows:
        """Parts by role ("train", "test", and the names of further test sets) and notes, from a folder or the hub."""
        found = _from_folder(about, self, root) if root is not None else None
        return found or _from_hub(about, self, revision)


def read_text_file(path: Path, kind: TextSource, classes: Sequence[str]) -> tuple[Part, str]:
    """Read a text classification file in any of the layouts these sets are distributed in; say which it was.

    Raises FedbenchError that shows the first line where none fits.
    """
    if path.suffix == ".parquet":
        table = read_parquet(path)
        columns = _columns(str(path), list(table), kind)
        if columns is None:
            raise FedbenchError(f"{path}: unknown layout, columns {', '.join(map(str, table))}; needs {_wanted(kind)}")
        *texts, labels = (list(table[column]) for column in columns)
        return _checked(str(path), texts, labels, 0, classes), f"parquet, columns {_listed(columns)}"
    raw = _read_text(path)
    first = raw.split("\n", 1)[0]
    if path.suffix == ".tsv":
        # GLUE's TSV knows no quoting: a quotation mark is a character like any other.
        lines = (line.split("\t") for line in raw.split("\n") if line.strip())
        head = next(lines)
        columns = _columns(str(path), head, kind)
        if columns is None:
            raise FedbenchError(
                f"{path}: unknown layout; first line: {first[:120]!r}; expected a header with {_wanted(kind)}"
            )
        return _table(path, head, columns, lines, kind, classes, "TSV")
    every, remark = _csv_rows(path, raw)
    head = every[0]
    if (columns := _columns(str(path), head, kind)) is not None:
        return _table(path, head, columns, iter(every[1:]), kind, classes, f"CSV{remark}")
    if len(kind.columns) == 1 and all(len(r) == 3 for r in every) and _numbers(r[0] for r in every):
        joined = [f"{title} {description}" for _, title, description in every]
        part = _checked(str(path), [joined], [r[0] for r in every], 1, classes)
        return part, f"official CSV: class from 1, title, description{remark}"
    if len(kind.columns) == 1 and all(len(r) == 2 for r in every) and _numbers(r[1] for r in every):
        part = _checked(str(path), [[r[0] for r in every]], [r[1] for r in every], 0, classes)
        return part, f"CSV without header: text, label from 0{remark}"
    raise FedbenchError(f"{path}: unknown layout; first line: {first[:120]!r}; see docs/data.md for the known ones")


def _read_text(path: Path) -> str:
    """A text file with line ends as `\\n`. Raises FedbenchError where it is not UTF-8 text, or empty."""
    content = read_bytes(path)
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise FedbenchError(f"{path}: is UTF-16 or UTF-32; save it as UTF-8")
    try:
        raw = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        fix = cure(content)
        fix = "save it as UTF-8" if fix == cure(b"") else fix
        raise FedbenchError(f"{path}: is not UTF-8 at byte {error.start}; {fix}") from None
    return checked_text(path, content, raw, "UTF-16 or damaged; save it as UTF-8")


def _csv_rows(path: Path, raw: str) -> tuple[list[list[str]], str]:
    """The rows of a CSV that hold anything, and a remark on those that span several lines.

    Raises FedbenchError for quotation marks that leave open where a cell ends.
    """
    rows: list[list[str]] = []
    line = several = 0
    # A cell may hold a whole document; the module's limit is one for the process, so it is put back.
    limit = csv.field_size_limit(max(len(raw), csv.field_size_limit()))
    reader = csv.reader(io.StringIO(raw, newline=""), strict=True)
    try:
        for row in reader:
            several += reader.line_num > line + 1
            line = reader.line_num
            if row:
                rows.append(row)
    except csv.Error as error:
        raise FedbenchError(
            f"{path}: the row that begins in line {line + 1} has a stray quotation mark, or one that is never closed "
            f"({error}); quote that cell and double the marks in it"
        ) from None
    finally:
        csv.field_size_limit(limit)
    return rows, f", {several} rows span several lines" if several else ""


def _columns(where: str, head: Sequence[Any], kind: TextSource) -> list[Any] | None:
    """The columns of each segment and of the labels, as the header has them; None where one is missing.

    Raises FedbenchError, which begins with `where`, for two columns of the name that is wanted.
    """
    known: dict[str, list[Any]] = {}
    for cell in head:
        known.setdefault(str(cell).strip().lower(), []).append(cell)
    found = [next((known[name] for name in names if name in known), None) for names in (*kind.columns, kind.label)]
    columns = [cells for cells in found if cells is not None]
    if len(columns) < len(found):
        return None
    if twice := next((cells for cells in columns if len(cells) > 1), None):
        raise FedbenchError(f"{where}: has {len(twice)} columns called {str(twice[0]).strip()!r}; keep one of them")
    return [cells[0] for cells in columns]


def _wanted(kind: TextSource) -> str:
    return " and ".join(" or ".join(names) for names in (kind.label, *kind.columns))


def _listed(columns: Sequence[str]) -> str:
    return f"{', '.join(map(str, columns[:-1]))} and {columns[-1]}"


def _table(
    path: Path,
    head: Sequence[str],
    columns: Sequence[str],
    rows: Iterator[Sequence[str]],
    kind: TextSource,
    classes: Sequence[str],
    layout: str,
) -> tuple[Part, str]:
    """Rows below a header; only the columns that are needed are kept."""
    places = [list(head).index(column) for column in columns]
    kept: tuple[list[str], ...] = tuple([] for _ in places)
    broken: list[tuple[int, int]] = []
    for number, row in enumerate(rows, start=1):
        if len(row) != len(head):
            broken.append((number, len(row)))
            continue
        for values, place in zip(kept, places, strict=True):
            values.append(row[place])
    if broken and not (kind.broken_rows and len(broken) <= max(3, len(kept[0]) // 1000)):
        number, width = broken[0]
        raise FedbenchError(f"{path}: row {number} has {width} columns, the header has {len(head)}")
    *texts, labels = kept
    note = f"{layout}, columns {_listed([c.strip() for c in columns])}"
    if broken:
        note += f", {len(broken)} broken rows left out"
    return _checked(str(path), texts, labels, 0, classes), note


def _numbers(cells: Iterable[str]) -> bool:
    return all(cell.strip().isdigit() for cell in cells)


def _checked(where: str, texts: Sequence[list[Any]], labels: list[Any], first: int, classes: Sequence[str]) -> Part:
    """A Part of these segments; labels are class names, or numbers counted from `first`."""
    if len(labels) == 0:
        raise FedbenchError(f"{where}: holds no rows")
    numbers = class_numbers(where, labels, classes, first)
    for segment in texts:
        if (hole := next((i for i, text in enumerate(segment) if not isinstance(text, str)), None)) is not None:
            held = segment[hole]
            fix = "save the column as text" if isinstance(held, bytes) else "fill or remove it"
            raise FedbenchError(f"{where}: row {hole + 1} has no text, but {shown(held)}; {fix}")
    return Part(numbers, texts[0], text_pairs=texts[1] if len(texts) > 1 else None)


def _from_folder(about: DataSet, kind: TextSource, root: Path) -> Rows | None:
    """The parts in a user's folder; None where it does not hold this data set."""
    folder = next(set_folders(root, kind.folders), None)
    if folder is None:
        return None
    roles = {"train": kind.train, "test": kind.test} | {role: stems for role, (stems, _) in kind.extra_tests.items()}
    parts, notes = {}, []
    for role, stems in roles.items():
        files = find_files(folder, stems, (".csv", ".tsv", ".parquet"))
        if not files:
            raise FedbenchError(
                f"{folder}: no {role} file for {about.name}; expected {' or '.join(stems)} as .csv, .tsv or "
                f".parquet, but {listing(folder)}"
            )
        read = [read_text_file(path, kind, about.classes) for path in files]
        parts[role] = Part.joined([part for part, _ in read])
        called = about.test_name if role == "test" else role
        shards = f" and {len(files) - 1} further shards" if len(files) > 1 else ""
        notes.append(f"{called}: {files[0]}{shards} ({read[0][1]}), {len(parts[role])} rows")
    return parts, notes


def _from_hub(about: DataSet, kind: TextSource, revision: str | None) -> Rows:
    if kind.hub is None:
        raise not_at_hand(about.name, kind.folders)
    repository, pinned, configuration, test = kind.hub
    revision = revision or pinned
    loaded, note = load_from_hub(about.name, repository, configuration, revision, kind.folders)
    splits = {"train": "train", "test": test} | {role: split for role, (_, split) in kind.extra_tests.items()}
    parts = {}
    for role, split in splits.items():
        where = f"{repository}/{split}"
        columns = _columns(where, list(loaded[split].column_names), kind) if split in loaded else None
        if columns is None:
            raise FedbenchError(
                f"data set {about.name}: {repository} at revision {revision[:12]} has no split {split} with "
                f"{_wanted(kind)}; leave dataset.revision out"
            )
        *texts, labels = (list(loaded[split][column]) for column in columns)
        parts[role] = _checked(where, texts, labels, 0, about.classes)
    return parts, [note]
