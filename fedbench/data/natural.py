"""Clients that the data has: whose a row is, who takes part, and who is held out altogether."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedbench.data.partition import natural_partition
from fedbench.data.rows import NaturalClients, Part, RawData
from fedbench.data.sets.dataset import DataSet
from fedbench.errors import FedbenchError
from fedbench.rng import Streams
from fedbench.scenario.tables import SplitSettings, listed

UNSEEN = "unseen_clients"
"""The name of the test set of clients who never train."""


def client_column(part: Part, by: Sequence[str]) -> np.ndarray:
    """What some columns together say of whose each row is, [n]: their cells joined with a stroke."""
    columns = [part.groups[name] for name in by]
    return np.array(["/".join(cells) for cells in zip(*columns, strict=True)], dtype=str)


@dataclass(frozen=True)
class Divided:
    """The rows of a natural split. train, test: of the clients who take part, [n] the client of each row by name.

    test_clients is None where the test rows are nobody's, and then all of them are there. unseen: rows of clients who
    never train; None without such. column_hash: of whose all rows were said to be. notes: for the user.
    """

    train: Part
    train_clients: np.ndarray
    test: Part
    test_clients: np.ndarray | None
    unseen: Part | None
    by: str
    column_hash: str
    notes: tuple[str, ...]


def divide(data_set: DataSet, split: SplitSettings, train: Part, test: Part) -> Divided:
    """The rows of the clients who take part in a natural split, the same for every seed.

    Names are sorted before anything is drawn of them, so that the order of rows decides nothing. Raises FedbenchError
    where the data set has no such column, or no client has enough rows.
    """
    by = _columns(data_set, split, train)
    called = "/".join(by)
    of_train = client_column(train, by).tolist()
    of_test = client_column(test, by).tolist() if all(name in test.groups for name in by) else None
    digest = hashlib.sha256("\1".join("\0".join(names) for names in (of_train, of_test or [])).encode())
    sizes = Counter(of_train)
    notes = [f"clients: {len(sizes)} by {called}, of {min(sizes.values())} to {max(sizes.values())} training rows"]
    groups, unseen = _who(data_set, split, sizes, called, notes)
    client_of = {member: name for name, members in groups.items() for member in members}
    of_train = np.array([client_of.get(name, "") for name in of_train], dtype=str)
    takes = np.isin(of_train, [*{*groups} - unseen])
    left = train.select(np.flatnonzero(takes))
    outside = [train.select(np.flatnonzero(np.isin(of_train, [*unseen])))]
    kept, own_tests = test, None
    if of_test is not None:
        strangers = np.array([name not in sizes for name in of_test], dtype=bool)
        of_test = np.array([client_of.get(name, "") for name in of_test], dtype=str)
        seen = np.isin(of_test, [*{*groups} - unseen])
        if seen.any():
            kept, own_tests = test.select(np.flatnonzero(seen)), of_test[seen]
            outside.append(test.select(np.flatnonzero(np.isin(of_test, [*unseen]) | strangers)))
        else:
            notes.append("test: all of its rows are of clients who do not train")
    outside = [part for part in outside if len(part)]
    held = _without(Part.joined(outside), left) if outside else None
    return Divided(left, of_train[takes], kept, own_tests, held, called, digest.hexdigest(), tuple(notes))


def _columns(data_set: DataSet, split: SplitSettings, train: Part) -> tuple[str, ...]:
    """The columns that say whose a row is."""
    by = listed(split.by) or data_set.client
    has = f"it has {', '.join(train.groups)}" if train.groups else "it has none"
    if not by:
        raise FedbenchError(f"split.by: data set {data_set.name} names no column of clients; {has}")
    if lacking := [name for name in by if name not in train.groups]:
        raise FedbenchError(f"split.by: data set {data_set.name} has no column {lacking[0]!r} of clients; {has}")
    return by


def _who(
    data_set: DataSet, split: SplitSettings, sizes: Counter[str], called: str, notes: list[str]
) -> tuple[dict[str, list[str]], set[str]]:
    """The clients who take part and who their members are, and those of them who never train."""
    groups = _grouped(sorted(sizes), sizes, split, notes)
    if not groups:
        raise FedbenchError(
            f"split: none of the {len(sizes)} clients by {called} has min_size {split.min_size} rows, the largest has "
            f"{max(sizes.values())}; lower split.min_size, or put small ones together with group_small = true"
        )
    chosen = sorted(groups)
    rng = Streams(0, data_set.name)
    wanted = len(chosen) if split.max_clients is None else split.max_clients + split.unseen_clients
    if wanted < len(chosen):
        drawn = rng.numpy("natural", "clients").permutation(len(chosen))
        chosen = sorted(chosen[i] for i in drawn[:wanted])
        notes.append(f"clients: {wanted} of {len(groups)} are drawn, for max_clients {split.max_clients}")
    if split.unseen_clients >= len(chosen):
        raise FedbenchError(
            f"split.unseen_clients is {split.unseen_clients}, of {len(chosen)} clients in all; lower it"
        )
    drawn = rng.numpy("natural", "unseen").permutation(len(chosen))
    unseen = {chosen[i] for i in drawn[: split.unseen_clients]}
    return {name: groups[name] for name in chosen}, unseen


def _without(part: Part, other: Part) -> Part | None:
    """The rows of `part` whose texts are none of `other`'s; None where there are none. Images are not compared."""
    if part.texts is None or other.texts is None:
        return part
    known = {*zip(*other.columns_of_text(), strict=True)}
    rows = [i for i, row in enumerate(zip(*part.columns_of_text(), strict=True)) if row not in known]
    return part.select(np.array(rows, dtype=np.int64)) if rows else None


def _grouped(names: Sequence[str], sizes: Counter[str], split: SplitSettings, notes: list[str]) -> dict[str, list[str]]:
    """Members by client: small ones are left out, or put together in the order of their names; a note says which."""
    groups = {name: [name] for name in names if sizes[name] >= split.min_size}
    small = [name for name in names if sizes[name] < split.min_size]
    if not small:
        return groups
    about = f"clients: {len(small)} with fewer than {split.min_size} rows"
    made: list[list[str]] = []
    members: list[str] = []
    for name in small if split.group_small else ():
        members.append(name)
        if sum(sizes[member] for member in members) >= split.min_size:
            made.append(members)
            members = []
    if not made:
        notes.append(f"{about} are left out, {sum(sizes[name] for name in small)} rows")
        return groups
    made[-1] += members  # too few for a client of their own
    notes.append(f"{about} are put together to {len(made)}")
    return groups | {f"{each[0]} to {each[-1]}" if len(each) > 1 else each[0]: each for each in made}


def numbered(divided: Divided, train: np.ndarray) -> tuple[NaturalClients, str]:
    """Clients by number, for the training rows (indices into `divided.train`) that are left of them; and a note.

    A client all of whose rows were taken for validation, or were not drawn, takes no part.
    """
    names = tuple(sorted({*divided.train_clients[train].tolist()}))
    number = {name: i for i, name in enumerate(names)}
    tests = divided.test_clients if divided.test_clients is not None else np.full(len(divided.test), "", dtype=str)
    of_test = np.array([number.get(name, -1) for name in tests.tolist()], dtype=np.int64)
    of_train = np.array([number[name] for name in divided.train_clients[train].tolist()], dtype=np.int64)
    gone = len({*divided.train_clients.tolist()}) - len(names)
    note = f"clients: {gone} have no training rows left and take no part" if gone else ""
    return NaturalClients(names, of_train, of_test, divided.by, divided.column_hash), note


def skew_of(data: RawData) -> tuple[list[int], dict[str, float]]:
    """The sizes of a natural split's clients, and how unlike these are."""
    assert data.clients is not None
    parts = natural_partition(data.clients.train)
    return parts.sizes(), parts.skew(data.train.labels, len(data.class_names)) | words_skew(data)


def words_skew(data: RawData) -> dict[str, float]:
    """How unlike the words of a natural split's clients are; nothing for other splits and for images."""
    if data.clients is None or data.train.texts is None:
        return {}
    return {"mean_jensen_shannon": unigram_divergence(data.train.texts, data.clients.train)}


def unigram_divergence(texts: Sequence[str], clients: np.ndarray) -> float:
    """How unlike the words of clients are: Jensen-Shannon divergence in bits between each and all, mean over clients.

    clients: the number of each row's client, [n]. 0 is none, 1 the most (Lin 1991). Words are without case. Of few
    words the divergence is large by chance alone, so that it is for comparing splits of the same data.
    """
    vocabulary: dict[str, int] = {}
    rows = [
        np.array([vocabulary.setdefault(w, len(vocabulary)) for w in re.findall(r"\w+", t.lower())], dtype=np.int64)
        for t in texts
    ]
    if not vocabulary:
        return 0.0
    whole = np.bincount(np.concatenate(rows), minlength=len(vocabulary)).astype(np.float64)
    share = whole / whole.sum()
    found = []
    order = np.argsort(clients, kind="stable")
    for mine in np.split(order, np.flatnonzero(np.diff(clients[order])) + 1):
        words, counts = np.unique(np.concatenate([rows[i] for i in mine]), return_counts=True)
        if not len(words):
            continue
        own = counts / counts.sum()
        middle = 0.5 * (own + share[words])
        # Where the client has no word, the overall share stands against half of itself: log 2 of it, one bit.
        own_part = float(own @ np.log2(own / middle))
        all_part = float(share[words] @ np.log2(share[words] / middle)) + float(1 - share[words].sum())
        found.append(0.5 * own_part + 0.5 * all_part)
    return float(np.clip(np.mean(found), 0, 1)) if found else 0.0
