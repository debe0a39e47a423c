"""Data sets: found, recognised, loaded, and split off.

Rows of public corpus, training, validation and test are disjoint and the same for every seed. What was recognised in a
user's files is said in the notes; nothing is guessed silently.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from fedbench.data.rows import Part, RawData
from fedbench.data.sets.embedded import CORPORA, EMBEDDED
from fedbench.data.sets.images import IMAGE_SETS, load_image_set
from fedbench.data.sets.text import TEXT_SETS, load_text_set
from fedbench.data.sources import data_folder
from fedbench.errors import FedbenchError
from fedbench.rng import Streams
from fedbench.scenario.tables import DatasetSettings, PublicSettings


def load_data(dataset: DatasetSettings, public: PublicSettings | None, data_dir: Path | None) -> RawData:
    """Everything a scenario reads, from the embedded packages, `data_dir` (or $FEDBENCH_DATA), or the hub.

    Validation rows are split off train by a fixed stream. Raises FedbenchError when a set cannot be found or read.
    """
    root = data_folder(data_dir)
    parts, names, notes = _load(dataset.name, dataset.revision, root)
    streams = Streams(0, dataset.name)
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
    called = TEXT_SETS[dataset.name].test_name if dataset.name in TEXT_SETS else "test"
    corpus = None
    if public is not None:
        corpus, lines = _public(public, dataset.name, root)
        notes += lines
    every = [train, validation, test, *([corpus] if corpus is not None else []), *parts.values()]
    digest = hashlib.sha256("".join(part.digest() for part in every).encode()).hexdigest()
    tests = [f"{len(test)} {'test' if called == 'test' else f'{called} test'}"]
    tests += [f"{len(part)} {role} test" for role, part in parts.items()]
    sizes = f"{len(train)} training, {len(validation)} validation, {', '.join(tests)} rows"
    if corpus is not None and public is not None:
        where = "in-domain" if public.in_domain else "out-of-domain"
        sizes += f", {len(corpus)} public rows of {public.name} ({where})"
    return RawData(train, validation, test, corpus, names, (*notes, sizes), digest, called, parts)


def _load(name: str, revision: str | None, root: Path | None) -> tuple[dict[str, Part], tuple[str, ...], list[str]]:
    """A data set's parts by role, its class names, and notes."""
    if name in EMBEDDED:
        parts, names, note = EMBEDDED[name]()
        return {role: part for role, part in parts.items() if role != "public"}, names, [note]
    if name in TEXT_SETS:
        parts, notes = load_text_set(name, revision, root)
        return parts, TEXT_SETS[name].classes, notes
    if name in IMAGE_SETS:
        parts, notes = load_image_set(name, revision, root)
        return parts, IMAGE_SETS[name].classes, notes
    known = ", ".join([*EMBEDDED, *TEXT_SETS, *IMAGE_SETS])
    raise FedbenchError(f"dataset.name {name!r}: no such data set; known are {known}")


def _public(settings: PublicSettings, dataset: str, root: Path | None) -> tuple[Part, list[str]]:
    """The public corpus, unlabelled, and notes: an embedded corpus, or the training rows of another data set."""
    notes: list[str] = []
    if settings.name in CORPORA:
        part = CORPORA[settings.name]()
    elif settings.name == dataset or settings.name not in {**TEXT_SETS, **IMAGE_SETS}:
        known = ", ".join([*CORPORA, *(name for name in (*TEXT_SETS, *IMAGE_SETS) if name != dataset)])
        raise FedbenchError(f"public.name {settings.name!r}: no such corpus; known are {known}")
    else:
        parts, _, notes = _load(settings.name, None, root)
        part = parts["train"]
    rows = np.sort(Streams(0, settings.name).numpy("public").permutation(len(part))[: settings.rows])
    chosen = part.select(rows)
    return Part(np.zeros(len(chosen), dtype=np.int64), chosen.texts, chosen.images, chosen.text_pairs), notes
