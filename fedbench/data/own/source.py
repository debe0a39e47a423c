"""A data set of the user's own, as a scenario's `[dataset]` describes it: files, columns, and what was recognised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from fedbench.data.labels import WRITTEN
from fedbench.data.natural import client_column
from fedbench.data.own.chats import layout_of
from fedbench.data.own.choices import questions_of
from fedbench.data.own.find import files_of, located, tables_of
from fedbench.data.own.rows import BadRows, Rows, rows_of
from fedbench.data.own.table import Table
from fedbench.data.own.windows import put_together
from fedbench.data.rows import Part
from fedbench.data.sets.dataset import DataSet
from fedbench.data.sets.dataset import Rows as Read
from fedbench.errors import FedbenchError
from fedbench.rng import Streams
from fedbench.scenario.tables import DatasetSettings, SplitSettings, listed

MOST_CLASSES = 1000
"""A column with more labels than this is hardly one of classes."""


def own_data_set(
    settings: DatasetSettings, split: SplitSettings, folder: Path, language: bool = False, root: Path | None = None
) -> DataSet:
    """The data set that `settings` describe, its files named from `folder` on; the same object for the same files.

    language: whether the next token is asked for, so that rows need no labels. root: the user's folder of data sets,
    for settings that name folders in it. Raises FedbenchError for files that are missing, columns that are not there,
    and, unless they are to be dropped, for rows that cannot be used.
    """
    if settings.folders:
        settings, folder = located(settings, folder, root)
    groups = tuple(dict.fromkeys((*listed(settings.client), *listed(split.by))))
    stamps: list[tuple[str, int, int]] = []
    for role in ("train", "test", "validation") if settings.hub is None else ():
        wanted = getattr(settings, role)
        for path in files_of(f"dataset.{role}", wanted, folder) if wanted and not isinstance(wanted, int) else ():
            if settings.kind == "images" and not path.is_dir():
                return _read.__wrapped__(settings, groups, folder, (), False)  # images beside a table may change alone
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                about = file.stat()
                stamps.append((str(file), about.st_size, about.st_mtime_ns))
    free = language and settings.kind != "choices" and "label" not in settings.model_fields_set
    return _read(settings, groups, folder, tuple(stamps), free)


@lru_cache(maxsize=2)
def _read(
    settings: DatasetSettings,
    groups: tuple[str, ...],
    folder: Path,
    stamps: tuple[tuple[str, int, int], ...],
    free: bool,
) -> DataSet:
    """Read once for all runs of a process; `stamps` tell files that were changed in between.

    free: whether rows may do without labels.
    """
    bad = BadRows()
    notes: list[str] = []
    found: dict[str, Rows] = {}
    named: Sequence[str] | None = None
    label: str | None = settings.label
    for role in ("train", "test", "validation"):
        tables = [*tables_of(role, settings, folder)]
        if not tables:
            continue
        if settings.windows is not None:
            tables = [put_together(table, settings.windows, listed(settings.client)) for table in tables]
        if role == "train" and free and (settings.kind == "chat" or any(label not in t.columns for t in tables)):
            label = None
        found[role] = rows_of(tables, settings, label, groups, bad)
        if role == "train":
            named = None if label is None else _names_said(tables, label)
        notes.append(f"{role}: {_files(tables)}{_said(tables[0], settings)}, {len(found[role])} rows")
    if twice := _twice(settings, folder):
        raise FedbenchError(f"dataset: {twice} is named for two of train, test and validation; give it one role")
    if not len(found["train"]):
        raise FedbenchError(f"dataset.train: no usable rows; {bad.said() if bad.found else 'the files are empty'}")
    try:
        if settings.kind == "choices":
            classes, about = _positions(found.values())
        elif label is None:
            classes, about = ("any",), "labels: none"
        else:
            classes, about = _classes(settings, named, found["train"])
    except FedbenchError:
        _look_at(bad, settings)  # of which the labels may be a consequence
        raise
    notes.append(about)
    numbers = {
        role: _numbers(rows, classes, bool(settings.classes), bad)
        if label is not None
        else np.zeros(len(rows), dtype=np.int64)
        for role, rows in found.items()
    }
    _look_at(bad, settings)
    notes += [f"left out: {bad.said()}"] if bad.found else []
    for role in found:
        usable = np.flatnonzero(numbers[role] >= 0)
        found[role], numbers[role] = found[role].keep(usable.tolist()), numbers[role][usable]
        if not len(usable):
            raise FedbenchError(f"dataset.{role}: no usable rows; {bad.said()}")
    kept = _without_copies(found, numbers, notes)
    parts = {role: found[role].keep(rows.tolist()).part(settings.kind or "text", numbers[role][rows])
             for role, rows in kept.items()}  # fmt: skip
    if "test" not in parts:
        parts |= _held_out(parts["train"], settings, notes)

    def source(_: DataSet, revision: str | None, root: Path | None) -> Read:
        return dict(parts), list(notes)

    return DataSet(
        settings.name,
        classes,
        source,
        "rows of your own",
        client=listed(settings.client),
        held_out="validation" in parts,
    )


def _look_at(bad: BadRows, settings: DatasetSettings) -> None:
    """Raise FedbenchError for rows that cannot be used, unless these are to be dropped."""
    if bad.found and settings.bad_rows == "error":
        raise FedbenchError(f'dataset: {bad.said()}; mend them, or leave them out with bad_rows = "drop" in [dataset]')


def _files(tables: Sequence[Table]) -> str:
    """The files of a role and how they were read, in words."""
    ways = Counter(table.about for table in tables)
    if len(tables) == 1:
        return f"{tables[0].where} ({tables[0].about})"
    how = "; ".join(f"{count} {way}" if len(ways) > 1 else way for way, count in ways.items())
    return f"{len(tables)} files from {tables[0].where} to {tables[-1].where} ({how})"


def _said(table: Table, settings: DatasetSettings) -> str:
    """How the conversations or choices in a file were read, in words."""
    if settings.kind == "chat":
        return f", {layout_of(table, settings).said()}"
    return f", {questions_of(table, settings)[1]}" if settings.kind == "choices" else ""


def _positions(roles: Iterable[Rows]) -> tuple[tuple[str, ...], str]:
    """Classes of choices: the number of the right one, of as many as any row has."""
    most = max(len(choices) for rows in roles for choices in rows.inputs[1])
    return tuple(str(number) for number in range(most)), f"labels: the right one of up to {most} choices"


def _twice(settings: DatasetSettings, folder: Path) -> str | None:
    """A file that has two roles; a split of the hub may not have two either."""
    seen: set[str] = set()
    for role in ("train", "test", "validation"):
        wanted = getattr(settings, role)
        if isinstance(wanted, int):
            continue
        files = listed(wanted) if settings.hub else [str(p) for p in files_of("", wanted, folder)] if wanted else []
        if both := seen & {*files}:
            return min(both)
        seen |= {*files}
    return None


def _names_said(tables: Sequence[Table], label: str) -> Sequence[str] | None:
    """The names of the classes as all of the files say them; None where one says nothing or another thing."""
    said = [table.names.get(label) for table in tables]
    return said[0] if all(names == said[0] for names in said) else None


def _classes(settings: DatasetSettings, named: Sequence[str] | None, train: Rows) -> tuple[tuple[str, ...], str]:
    """The names of the classes in the order of their numbers, and how they were found."""
    if settings.classes:
        return settings.classes, f"labels: the {len(settings.classes)} classes that the scenario names"
    if named is not None:
        return tuple(named), f"labels: {len(named)} classes by the names that the files say, {_shown(named)}"
    counts = Counter(train.labels)
    spelt: dict[str, str] = {}
    for label, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        spelt.setdefault(label.casefold(), label)
    where = f"dataset.label: column {settings.label!r}"
    if len(spelt) < 2:
        raise FedbenchError(f"{where} has one label, {train.labels[0]!r}; classes are at least two")
    if len(spelt) > MOST_CLASSES or (len(spelt) > 20 and 2 * len(spelt) > len(train)):
        raise FedbenchError(f"{where} has {len(spelt)} labels in {len(train)} rows; is it the column of classes?")
    if all(WRITTEN.fullmatch(label) for label in spelt):
        classes = tuple(sorted(spelt.values(), key=int))
        return classes, f"labels: {len(classes)} whole numbers, {_shown(classes)}"
    classes = tuple(sorted(spelt.values(), key=lambda name: (name.casefold(), name)))
    about = f"labels: {len(classes)} names, {_shown(classes)}"
    if len(spelt) < len(counts):
        about += f"; {len(counts) - len(spelt)} that differ in capitals alone are taken for the same"
    return classes, about


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _numbers(rows: Rows, classes: Sequence[str], by_number: bool, bad: BadRows) -> np.ndarray:
    """The number of each row's class, [n]; -1 for a label that is none, which goes to `bad`.

    by_number: whether whole numbers from 0 stand for the classes too, where these are not called so.
    """
    known = {name.casefold(): number for number, name in enumerate(classes)}
    if by_number and not any(WRITTEN.fullmatch(name) for name in classes):
        known |= {str(number): number for number in range(len(classes))}
    out = np.full(len(rows), -1, dtype=np.int64)
    for i, label in enumerate(rows.labels):
        if (number := known.get(label.casefold())) is None:
            bad.add(*rows.places[i], "has an unknown label", f", {label[:60]!r}")
        else:
            out[i] = number
    return out


def _without_copies(
    found: Mapping[str, Rows], numbers: Mapping[str, np.ndarray], notes: list[str]
) -> dict[str, np.ndarray]:
    """The rows of each role that stay, so that none of the test or of validation is trained on.

    Where a test is given its rows stay, and those that are the same leave validation and training; where none is, the
    first of several stays, since the others could land on the other side.
    """
    seen: dict[str, int] = {}
    kept: dict[str, np.ndarray] = {}
    for role in ("test", "validation", "train"):
        if role not in found:
            continue
        own: dict[str, int] = {}
        stays, gone, other = [], 0, 0
        single = role == "train" and "test" not in found
        for i, (key, number) in enumerate(zip(found[role].same(), numbers[role].tolist(), strict=True)):
            before = seen.get(key, own.get(key) if single else None)
            if before is None:
                stays.append(i)
            else:
                gone += 1
                other += before != number
            own.setdefault(key, number)
        seen = own | seen
        if gone:
            why = "copies of others, the first of which stays" if single else "copies of test or validation rows"
            unlike = f" ({other} with another label)" if other else ""
            notes.append(f"{role}: {gone} rows left out, {why}{unlike}")
        if not stays:
            raise FedbenchError(f"dataset.{role}: every row is a copy of a row of the test or of validation")
        kept[role] = np.array(stays, dtype=np.int64)
    return kept


def _held_out(train: Part, settings: DatasetSettings, notes: list[str]) -> dict[str, Part]:
    """Training and test rows where there is no test: a share of each client's rows, or of all, for any seed."""
    client = listed(settings.client)
    whose = client_column(train, client) if client else np.zeros(len(train), dtype=str)
    order = Streams(0, "own").numpy("test").permutation(len(train))
    _, number = np.unique(whose, return_inverse=True)
    by_client = order[np.argsort(number[order], kind="stable")]
    test = np.zeros(len(train), dtype=bool)
    for mine in np.split(by_client, np.cumsum(np.bincount(number))[:-1]):
        test[mine[: min(int(settings.test_share * len(mine) + 0.5), len(mine) - 1)]] = True
    if not test.any():
        raise FedbenchError(
            f"dataset: no test is given, and test_share {settings.test_share:g} "
            f"{'of no client' if client else 'of the rows'} is one row; give test, or raise it"
        )
    notes.append(
        f"test: none is given, so {test.sum()} of {len(test)} training rows are held out"
        + (", of each client its share" if client else "")
    )
    return {"train": train.select(np.flatnonzero(~test)), "test": train.select(np.flatnonzero(test))}
