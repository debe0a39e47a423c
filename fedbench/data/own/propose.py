"""A scenario proposed for a user's files: looked at, written as TOML with comments, and read once as it will be."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedbench.data.own.decode import PACKED, suffix_of
from fedbench.data.own.find import image_folder, is_saved, tables_of
from fedbench.data.own.guess import (
    Column,
    called_label,
    client_columns,
    has_header,
    image_column,
    label_column,
    language_rows,
    look,
    text_columns,
)
from fedbench.data.own.source import own_data_set
from fedbench.data.own.table import Table
from fedbench.data.own.tables import SUFFIXES, read_table, saved_splits
from fedbench.data.rows import Part
from fedbench.data.sources import listing
from fedbench.errors import FedbenchError
from fedbench.scenario.tables import DatasetSettings, SplitSettings

ROLES = {"test": ("test",), "validation": ("validation", "valid", "val", "dev")}
LONGEST = 128
LONGEST_READ = 384
"""Most tokens that are proposed, of however long texts; where all of them are asked for."""
OBJECTIVE = (
    "# The next token is asked for, of conversations those of the answers alone.",
    "[objective]",
    'kind = "language"',
    'loss_on = "answers"    # or "all"',
    'normalised = "row"     # rows count alike; "batch": tokens do',
    "",
)
MOST_TESTED = 2000


@dataclass(frozen=True)
class Proposal:
    """The text of a scenario's file, and in lines what was recognised."""

    text: str
    said: list[str]


def propose(source: Path, target: Path) -> Proposal:
    """The scenario for a file or a folder, to be written to `target`, from which on its files are named.

    Raises FedbenchError where nothing in it can be federated.
    """
    folder = target.resolve().parent
    files = {role: _named(path, folder) for role, path in _roles(source).items()}
    table = _first_table(source, files, folder)
    header = True
    if suffix_of(Path(table.where)) in (".csv", ".tsv", ".tab") and not has_header(table):
        header, table = False, read_table(Path(table.where), header=False)
    dataset, remarks = _dataset(table, files)
    if not header:
        dataset["header"] = False
        remarks["header"] = "columns have no names, so they are counted from 1"
    left_out = _misfits(dataset, table, folder)
    found, clients = _read(dataset, remarks, folder)
    said = []
    for name, value in dataset.items():
        remark = f"  ({remarks[name]})" if name in remarks else ""
        said.append(f"{name} = {_toml(value)}{remark}")
    return Proposal(_written(source, dataset, remarks, found, clients), [*said, *left_out])


def _misfits(dataset: dict[str, Any], train: Table, folder: Path) -> list[str]:
    """Take out files of test and validation whose columns are not those of training, and say so."""
    said = []
    named = [dataset.get(name, []) for name in ("text", "choices", "answer", "label", "image", "client")]
    wanted = {column for columns in named for column in ([columns] if isinstance(columns, str) else columns)}
    asked = {"kind": "images" if dataset["kind"] == "images" else "text", "header": dataset.get("header", True)}
    for role in ROLES:
        if role not in dataset:
            continue
        settings = DatasetSettings(**asked, train=dataset["train"], **{role: dataset[role]})
        table = next(iter(tables_of(role, settings, folder)))
        lacking = sorted(wanted - {*table.columns})
        if lacking or (not asked["header"] and len(table.columns) != len(train.columns)):
            why = f"it has no column {lacking[0]!r}" if lacking else f"it has {len(table.columns)} columns"
            said.append(f"left out: {table.where} is not taken for {role}, since {why}")
            del dataset[role]
    return said


def _named(path: str, folder: Path) -> str:
    """A path or pattern as the scenario's file names it."""
    return Path(os.path.relpath(Path(path).absolute(), folder)).as_posix()


def _roles(source: Path) -> dict[str, str]:
    """Which files are train, test and validation."""
    if not source.exists():
        raise FedbenchError(f"{source}: no such file or folder")
    if source.is_file():
        found = {"train": str(source)}
        if source.name.lower().startswith("train"):
            for role, stems in ROLES.items():
                names = [path for path in sorted(source.parent.iterdir()) if path.name.lower().startswith(stems)]
                beside = [path for path in names if suffix_of(path) == suffix_of(source)]
                found |= {role: str(beside[0])} if beside else {}
        return found
    if splits := [*saved_splits(source)]:
        train = "train" if "train" in splits else splits[0]
        found = {"train": str(source / train)}
        for role, stems in ROLES.items():
            split = next((split for split in splits if split.startswith(stems)), None)
            found |= {role: str(source / split)} if split else {}
        return found
    if is_saved(source):
        return {"train": str(source)}
    inside = sorted(source.iterdir())
    tables = [path for path in inside if path.is_file() and suffix_of(path) in SUFFIXES]
    places = tables or [path for path in inside if path.is_dir()]
    trains = [path for path in places if path.name.lower().startswith("train")]
    known = ("train", *(stem for stems in ROLES.values() for stem in stems))
    # A folder called train may be a class of images, beside others.
    if trains and (tables or all(path.name.lower().startswith(known) for path in places)):
        found = {"train": _pattern(trains)}
        for role, stems in ROLES.items():
            named = [path for path in places if path.name.lower().startswith(stems)]
            found |= {role: _pattern(named)} if named else {}
        return found
    if tables:
        return {"train": _pattern(tables)}
    if places:
        return {"train": str(source)}
    raise FedbenchError(f"{source}: holds no tables and no folders of classes; {listing(source)}")


def _pattern(paths: Sequence[Path]) -> str:
    """One path, or the pattern of several of one kind."""
    if len(paths) == 1:
        return str(paths[0])
    first, last = min(path.name for path in paths), max(path.name for path in paths)
    start = first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]
    suffixes = Counter("".join(path.suffixes[-2:]) if path.suffix in PACKED else path.suffix for path in paths)
    return str(paths[0].parent / f"{start}*{suffixes.most_common(1)[0][0]}")


def _first_table(source: Path, files: dict[str, str], folder: Path) -> Table:
    train = folder / files["train"]
    if train.is_dir() and not is_saved(train):
        return image_folder(train)
    return next(iter(tables_of("train", DatasetSettings(kind="text", train=files["train"]), folder)))


def _dataset(table: Table, files: dict[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The [dataset] table, and a remark on some of its settings."""
    columns = look(table)
    remarks = {"train": f"{len(table)} rows in {table.where} ({table.about})"}
    if (language := language_rows(table, columns)) is not None:
        settings, remarks["kind"], lengths = language
        return _next_token({**settings, **files}, remarks, lengths, columns)
    images = image_column({**table.columns})
    texts: tuple[str, ...] = (images,) if images else text_columns(columns)
    has = ", ".join(f"{column.name} ({len(column.counts)} different)" for column in columns)
    if not texts:
        raise FedbenchError(f"{table.where}: no column of texts or images was recognised; it has {has}")
    label = label_column(columns, texts)
    if label is None and not images and not called_label(table):
        remarks["text"] = "no column of labels, so the next token is asked for"
        lengths = list(next(column.words for column in columns if column.name == texts[0]))
        return _next_token({"kind": "text", **files, "text": texts[0]}, remarks, lengths, columns)
    if label is None:
        raise FedbenchError(
            f"{table.where}: no column of labels was recognised, of 2 to 200 different values; it has {has}"
        )
    kind = "images" if images else "pairs" if len(texts) == 2 else "text"
    dataset: dict[str, Any] = {"kind": kind, **files}
    by_name = {column.name: column for column in columns}
    if images:
        dataset["image"] = images
    else:
        dataset["text"] = list(texts) if kind == "pairs" else texts[0]
        words = [by_name[name].words for name in texts]
        usual = [round(each[len(each) // 2]) for each in words]
        remarks["text"] = (
            f"a median of {' and '.join(map(str, usual))} words; the columns are {', '.join(table.columns)}"
        )
        longest = sum(each[int(0.95 * (len(each) - 1))] for each in words)
        dataset["max_length"] = min(LONGEST, max(16, 8 * -(-int(1.35 * longest + 3) // 8)))
        remarks["max_length"] = f"tokens; 95% of the texts have at most {longest} words"
    dataset["label"] = label
    most = ", ".join(f"{name[:30]} {count}" for name, count in by_name[label].counts.most_common(6))
    remarks["label"] = f"{len(by_name[label].counts)} classes: {most}"
    _add_clients(dataset, remarks, client_columns(columns, (*texts, label)))
    return dataset, remarks


def _next_token(
    dataset: dict[str, Any], remarks: dict[str, str], lengths: Sequence[int], columns: Sequence[Column]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Rows for the objective of language; `lengths`: the words of each, sorted. tiny-llama has two tokens a word."""
    longest = lengths[int(0.95 * (len(lengths) - 1))] if lengths else 0
    dataset["max_length"] = min(LONGEST_READ, max(32, 8 * -(-int(2 * longest + 16) // 8)))
    remarks["max_length"] = f"tokens; 95% of the rows have at most {longest} words"
    taken = [dataset[name] for name in ("text", "answer", "choices", "label") if name in dataset]
    taken = [name for names in taken for name in ([names] if isinstance(names, str) else names)]
    _add_clients(dataset, remarks, client_columns(columns, taken))
    return dataset, remarks


def _add_clients(dataset: dict[str, Any], remarks: dict[str, str], candidates: Sequence[Column]) -> None:
    """The likeliest column of clients, where there is one, with a remark on the others."""
    if candidates:
        dataset["client"] = candidates[0].name
        others = [column.name for column in candidates[1:4]]
        remarks["client"] = f"{len(candidates[0].counts)} clients" + (
            f"; could also be {', '.join(others)}" * bool(others)
        )


def _read(dataset: dict[str, Any], remarks: dict[str, str], folder: Path) -> tuple[dict[str, Part], int]:
    """The rows as the scenario will read them, and how many clients they have; bad rows are proposed to be dropped."""
    split = SplitSettings(kind="iid", clients=1)
    try:
        data = own_data_set(DatasetSettings(**dataset), split, folder, _asks_next(dataset))
    except FedbenchError as error:
        if "bad_rows" not in str(error):
            raise
        remarks["bad_rows"] = str(error).removeprefix("dataset: ").partition("; mend them")[0]
        dataset["bad_rows"] = "drop"
        data = own_data_set(DatasetSettings(**dataset), split, folder, _asks_next(dataset))
    parts, _ = data.read(None, None)
    if dataset["kind"] in ("chat", "choices"):
        dataset["bad_rows"] = "drop"
        fits = "rows of which no answer is left within max_length are left out too"
        remarks["bad_rows"] = "; ".join([*([remarks["bad_rows"]] if "bad_rows" in remarks else []), fits])
    if "validation" not in parts:
        rows = len(parts["train"])
        dataset["validation"] = int(min(400, max(2, rows // 10)))
        remarks["validation"] = f"rows held out of {rows}, for the choice of settings and rounds"
    if len(parts["test"]) > MOST_TESTED:
        dataset["test_rows"] = MOST_TESTED
        remarks["test_rows"] = f"of {len(parts['test'])}, so that a first run takes minutes; take this line out for all"
    if "test" not in dataset:
        remarks["train"] += f"; a fifth of them, {len(parts['test'])}, are held out for the test"
    client = dataset.get("client")
    return parts, len(np.unique(parts["train"].groups[client])) if client else 0


def _asks_next(dataset: dict[str, Any]) -> bool:
    """Whether the rows are for the objective of language."""
    return dataset["kind"] in ("chat", "choices") or (dataset["kind"] == "text" and "label" not in dataset)


def _written(
    source: Path, dataset: dict[str, Any], remarks: dict[str, str], parts: dict[str, Part], clients: int
) -> str:
    """The scenario as TOML. Numbers are small: a first run is to take minutes."""
    images, language = dataset["kind"] == "images", _asks_next(dataset)
    rows = len(parts["train"]) - (dataset["validation"] if isinstance(dataset["validation"], int) else 0)
    lines = [
        f"# Proposed by `fedbench new scenario {source}`; docs/data.md says what else there is.",
        f"title = {_toml(f'{source.stem}: rows of our own')}",
        f"fm = {_toml('vit-digits' if images else 'tiny-llama' if language else 'minilm-l6')}",
        *(["# tiny-llama is for trying things out; `fedbench fetch smollm2-135m` brings a larger one."] * language),
        "",
        "[dataset]",
        *_commented(dataset, remarks),
        "",
        *(OBJECTIVE if language else ()),
        "# Unlabelled rows for methods that need them at the server (FedPFT, FedOT).",
        "[public]",
        f"name = {_toml('mnist' if images else 'tweets')}",
        f"rows = {2000 if images else 6000}",
        "",
    ]
    if clients:
        unseen = clients // 10 if clients >= 10 else 0
        lines += [
            f"# Clients are those of the column {dataset['client']!r}.",
            "[splits.natural]",
            'kind = "natural"',
            "# min_size = 8         # clients with fewer rows are left out; group_small = true puts them together",
            "# max_clients = 100    # at most so many, a fixed draw",
            f"unseen_clients = {unseen}    # of {clients} clients, how many never train and are a second test set",
            "",
        ]
    drawn = int(min(40, max(2, rows // 40)))
    own = "" if language else ", each with labels of its own"
    lines += [
        f"# The same rows over clients that are drawn{own}, for comparison."
        if clients
        else f"# No column of clients was recognised, so they are drawn{own}.",
        *(["[splits.iid]", 'kind = "iid"'] if language else ["[splits.noniid]", 'kind = "dirichlet"', "alpha = 0.5"]),
        f"clients = {drawn}",
        "",
        "[federation]",
        f"fraction = {_fraction(clients or drawn)}    # of the clients in each round",
        "rounds = 10",
        f"batch_size = {16 if rows // (clients or drawn) >= 32 else 8}",
        "max_steps = 5",
        "",
        "[evaluation]",
        "every = 5",
        f"probe_size = {min(24, dataset['validation']) if isinstance(dataset['validation'], int) else 24}",
        "",
        "[methods.fedpft]",
        "t = 5",
        "distil_steps = 60",
        "",
        "[methods.fedot]",
        "distil_steps = 60",
        "",
        "# fedbench run --profile smoke: whether everything runs, in seconds.",
        "[profiles.smoke]",
        "federation = { rounds = 2, batch_size = 4, max_steps = 2 }",
        "evaluation = { every = 2, probe_size = 8 }",
        "",
    ]
    return "\n".join(lines)


def _fraction(clients: int) -> float:
    """The share of the clients that makes a cohort of some eight."""
    return 1.0 if clients <= 8 else round(8 / clients, 4)


def _commented(dataset: dict[str, Any], remarks: dict[str, str]) -> list[str]:
    out = []
    for name, value in dataset.items():
        if remark := remarks.get(name):
            out.append(f"# {' '.join(remark.split())}")
        out.append(f"{name} = {_toml(value)}")
    return out


def _toml(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
