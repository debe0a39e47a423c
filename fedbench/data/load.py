"""A scenario's rows: read from its data sets, split off, and capped.

Rows of public corpus, training, validation and test are disjoint and the same for every seed. What was recognised in a
user's files is said in the notes; nothing is guessed silently.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from fedbench.data.natural import UNSEEN, divide, numbered
from fedbench.data.rows import NaturalClients, Part, RawData
from fedbench.data.sets.dataset import DataSet
from fedbench.data.sources import data_folder
from fedbench.errors import FedbenchError
from fedbench.rng import Streams
from fedbench.scenario.tables import DatasetSettings, PublicSettings, SplitSettings


def load_data(
    data_set: DataSet,
    corpus: DataSet | None,
    dataset: DatasetSettings,
    public: PublicSettings | None,
    data_dir: Path | None,
    split: SplitSettings | None = None,
) -> RawData:
    """Everything a scenario reads: the rows of `data_set` as `dataset` says, those of `corpus` as `public` says.

    data_set, corpus: what `dataset.name` and `public.name` stand for, corpus None where there is no `public`. Rows come
    from the embedded packages, `data_dir` (or $FEDBENCH_DATA), or the hub. Validation rows are split off train by a
    fixed stream. `split`: a natural one, whose clients' rows alone are used. Raises FedbenchError when a set cannot be
    found or read.
    """
    if not data_set.classes:
        raise FedbenchError(f"dataset.name {data_set.name!r}: has no classes, so it can only be a public corpus")
    root = data_folder(data_dir)
    parts, notes = data_set.read(dataset.revision, root)
    aside = parts.pop("public", None)
    streams = Streams(0, data_set.name)
    train = parts.pop("train")
    divided = divide(data_set, split, train, parts["test"]) if split is not None else None
    if divided is not None:
        train, parts["test"] = divided.train, divided.test
        notes += divided.notes
    validation, left = _held_out(dataset, streams, train, parts.pop("validation", None))
    left = np.sort(left[: dataset.train_rows])
    train = train.select(left)
    clients = None
    if divided is not None:
        clients, note = numbered(divided, left)
        notes += [note] if note else []
        if divided.unseen is not None:
            parts[UNSEEN] = divided.unseen
    # Every test set by role, the first of them called "test".
    for role, part in parts.items():
        if dataset.test_rows is not None and dataset.test_rows < len(part):
            drawn = streams.numpy("test") if role == "test" else streams.numpy("test", role)
            chosen = np.sort(drawn.permutation(len(part))[: dataset.test_rows])
            parts[role] = part.select(chosen)
            if clients is not None and role == "test":
                clients = replace(clients, test=clients.test[chosen])
    test = parts.pop("test")
    public_rows = None
    if corpus is not None and public is not None:
        if corpus is not data_set:
            rows, lines = corpus.read(None, root)
            aside = rows["public" if corpus.public else "train"]
            notes += lines
        if aside is None:
            raise FedbenchError(
                f"public.name {corpus.name!r}: is the clients' own data set, which sets no rows aside; name another one"
            )
        public_rows = _unlabelled(aside, corpus.name, public.rows)
    every = [train, validation, test, *([public_rows] if public_rows is not None else []), *parts.values()]
    content = "".join(part.digest() for part in every)
    if clients is not None:
        content += _digest(clients)
    digest = hashlib.sha256(content.encode()).hexdigest()
    tests = [f"{len(test)} {'test' if data_set.test_name == 'test' else f'{data_set.test_name} test'}"]
    tests += [f"{len(part)} {role} test" for role, part in parts.items()]
    sizes = f"{len(train)} training, {len(validation)} validation, {', '.join(tests)} rows"
    if public_rows is not None and public is not None:
        where = "in-domain" if public.in_domain else "out-of-domain"
        sizes += f", {len(public_rows)} public rows of {public.name} ({where})"
    names = data_set.classes
    return RawData(
        train, validation, test, public_rows, names, (*notes, sizes), digest, data_set.test_name, parts, clients=clients
    )


def _held_out(dataset: DatasetSettings, streams: Streams, train: Part, given: Part | None) -> tuple[Part, np.ndarray]:
    """Validation rows, and in the order of the draw the numbers of those that are left of the training rows."""
    if not isinstance(dataset.validation, int):
        assert given is not None, "checked as the data set is read"
        return given, streams.numpy("validation").permutation(len(train))
    if given is not None:
        raise FedbenchError("dataset.validation: the data set brings validation rows of its own, so it takes no number")
    if dataset.validation >= len(train):
        raise FedbenchError(f"dataset.validation is {dataset.validation}, but train has {len(train)} rows; lower it")
    order = streams.numpy("validation").permutation(len(train))
    return train.select(order[: dataset.validation]), order[dataset.validation :]


def _digest(clients: NaturalClients) -> str:
    """SHA-256 of whose each row is."""
    digest = hashlib.sha256(clients.column_hash.encode())
    digest.update(clients.train.tobytes() + clients.test.tobytes())
    return digest.hexdigest()


def _unlabelled(part: Part, name: str, count: int | None) -> Part:
    """Rows of a public corpus, at most `count` of them: a fixed draw, in order and without their labels."""
    rows = np.sort(Streams(0, name).numpy("public").permutation(len(part))[:count])
    chosen = part.select(rows)
    return replace(chosen, labels=np.zeros(len(chosen), dtype=np.int64), groups={}, choices=None)
