"""A scenario's rows: read from its data sets, split off, and capped.

Rows of public corpus, training, validation and test are disjoint and the same for every seed. What was recognised in a
user's files is said in the notes; nothing is guessed silently.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from fedbench.data.rows import Part, RawData
from fedbench.data.sets.dataset import DataSet
from fedbench.data.sources import data_folder
from fedbench.errors import FedbenchError
from fedbench.rng import Streams
from fedbench.scenario.tables import DatasetSettings, PublicSettings


def load_data(
    data_set: DataSet,
    corpus: DataSet | None,
    dataset: DatasetSettings,
    public: PublicSettings | None,
    data_dir: Path | None,
) -> RawData:
    """Everything a scenario reads: the rows of `data_set` as `dataset` says, those of `corpus` as `public` says.

    data_set, corpus: what `dataset.name` and `public.name` stand for, corpus None where there is no `public`. Rows come
    from the embedded packages, `data_dir` (or $FEDBENCH_DATA), or the hub. Validation rows are split off train by a
    fixed stream. Raises FedbenchError when a set cannot be found or read.
    """
    if not data_set.classes:
        raise FedbenchError(f"dataset.name {data_set.name!r}: has no classes, so it can only be a public corpus")
    root = data_folder(data_dir)
    parts, notes = data_set.read(dataset.revision, root)
    aside = parts.pop("public", None)
    streams = Streams(0, data_set.name)
    train = parts.pop("train")
    if dataset.validation >= len(train):
        raise FedbenchError(f"dataset.validation is {dataset.validation}, but train has {len(train)} rows; lower it")
    order = streams.numpy("validation").permutation(len(train))
    validation = train.select(order[: dataset.validation])
    train = train.select(np.sort(order[dataset.validation :][: dataset.train_rows]))
    # Every test set by role, the first of them called "test".
    for role, part in parts.items():
        if dataset.test_rows is not None and dataset.test_rows < len(part):
            drawn = streams.numpy("test") if role == "test" else streams.numpy("test", role)
            parts[role] = part.select(np.sort(drawn.permutation(len(part))[: dataset.test_rows]))
    test = parts.pop("test")
    public_rows = None
    if corpus is not None and public is not None:
        if corpus.name != data_set.name:
            rows, lines = corpus.read(None, root)
            aside = rows["public" if corpus.public else "train"]
            notes += lines
        if aside is None:
            raise FedbenchError(
                f"public.name {corpus.name!r}: is the clients' own data set, which sets no rows aside; name another one"
            )
        public_rows = _unlabelled(aside, corpus.name, public.rows)
    every = [train, validation, test, *([public_rows] if public_rows is not None else []), *parts.values()]
    digest = hashlib.sha256("".join(part.digest() for part in every).encode()).hexdigest()
    tests = [f"{len(test)} {'test' if data_set.test_name == 'test' else f'{data_set.test_name} test'}"]
    tests += [f"{len(part)} {role} test" for role, part in parts.items()]
    sizes = f"{len(train)} training, {len(validation)} validation, {', '.join(tests)} rows"
    if public_rows is not None and public is not None:
        where = "in-domain" if public.in_domain else "out-of-domain"
        sizes += f", {len(public_rows)} public rows of {public.name} ({where})"
    names = data_set.classes
    return RawData(train, validation, test, public_rows, names, (*notes, sizes), digest, data_set.test_name, parts)


def _unlabelled(part: Part, name: str, count: int | None) -> Part:
    """Rows of a public corpus, at most `count` of them: a fixed draw, in order and without their labels."""
    rows = np.sort(Streams(0, name).numpy("public").permutation(len(part))[:count])
    chosen = part.select(rows)
    return Part(np.zeros(len(chosen), dtype=np.int64), chosen.texts, chosen.images, chosen.text_pairs)
