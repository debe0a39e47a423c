"""Clients of the data: who takes part, in which order, whose test rows are whose, and how unlike they are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedbench.data.load import load_data
from fedbench.data.natural import unigram_divergence
from fedbench.data.partition import natural_partition
from fedbench.data.rows import Part, RawData
from fedbench.data.sets.dataset import DataSet
from fedbench.errors import FedbenchError
from fedbench.measures.accuracy import Evaluation, on_own_rows
from fedbench.scenario.tables import DatasetSettings, SplitSettings

SIZES = {"zoe": 12, "amy": 9, "bob": 2, "cat": 3, "dan": 8, "eve": 1}


def rows(sizes: dict[str, int], prefix: str = "") -> Part:
    """Rows of these clients, mixed, with texts that say whose they are, and of which town."""
    names = np.array([name for name, count in sizes.items() for _ in range(count)])
    order = np.random.default_rng(0).permutation(len(names))
    texts = [f"{prefix}{names[i]} {i}" for i in order]
    groups = {"who": names[order], "town": np.where(names[order] < "c", "east", "west")}
    return Part(np.array([i % 2 for i in range(len(order))]), texts, groups=groups)


def load(split: dict[str, Any], train: Part | None = None, test: Part | None = None, **dataset: Any) -> RawData:
    parts = {
        "train": rows(SIZES) if train is None else train,
        "test": test or rows({"amy": 3, "dan": 1, "new": 2}, "t"),
    }
    found = DataSet("people", ("a", "b"), lambda about, revision, root: (parts, []), client=("who",))
    asked = DatasetSettings(**{"name": "people", "validation": 1, **dataset})
    return load_data(found, None, asked, None, None, SplitSettings(**{"kind": "natural", **split}))


def held_by(data: RawData) -> dict[str, int]:
    """Training rows by client, after a look that each row is its client's."""
    assert data.clients is not None
    assert data.train.texts is not None
    for text, number in zip(data.train.texts, data.clients.train, strict=True):
        assert text.split()[0] in data.clients.names[number]
    counts = np.bincount(data.clients.train)
    return dict(zip(data.clients.names, counts.tolist(), strict=True))


def test_clients_are_those_of_the_data_in_the_order_of_their_names() -> None:
    data = load({})
    found = held_by(data)
    assert [*found] == sorted(SIZES) or sum(SIZES.values()) - sum(found.values()) == 1
    assert [*found] == sorted(found)
    assert data.clients is not None
    # Of amy, of dan, and of nobody who trains: those are a test set of their own.
    assert {data.clients.names[i] for i in data.clients.test} == {"amy", "dan"}
    assert len(data.test) == 4
    assert len(data.extra_tests["unseen_clients"]) == 2
    assert "clients: 6 by who, of 1 to 12 training rows" in data.notes


def test_the_order_of_rows_decides_nothing_about_who_takes_part() -> None:
    train = rows(SIZES)
    turned = train.select(np.arange(len(train))[::-1])
    for split in ({"max_clients": 3}, {"unseen_clients": 2}, {"min_size": 3}, {"min_size": 3, "group_small": True}):
        found, other = load(split, train).clients, load(split, turned).clients
        assert found is not None
        assert other is not None
        assert found.names == other.names, split


def test_small_clients_are_left_out_or_put_together() -> None:
    apart = load({"min_size": 3})
    assert set(held_by(apart)) == {"amy", "cat", "dan", "zoe"}
    assert "clients: 2 with fewer than 3 rows are left out, 3 rows" in apart.notes
    together = load({"min_size": 3, "group_small": True})
    assert together.clients is not None
    assert "bob to eve" in together.clients.names
    assert "clients: 2 with fewer than 3 rows are put together to 1" in together.notes
    with pytest.raises(FedbenchError, match=r"none of the 6 clients by who has min_size 13 rows, the largest has 12"):
        load({"min_size": 13})


def test_at_most_so_many_clients_are_drawn_the_same_each_time() -> None:
    first, again = load({"max_clients": 2}), load({"max_clients": 2})
    assert first.clients is not None
    assert again.clients is not None
    assert len(first.clients.names) == 2
    assert first.clients.names == again.clients.names
    assert first.content_hash == again.content_hash != load({}).content_hash


def test_unseen_clients_train_nothing_and_are_a_test_of_their_own() -> None:
    data = load({"unseen_clients": 2}, test=rows(dict.fromkeys(SIZES, 2), "t"))
    assert data.clients is not None
    assert data.train.texts is not None
    assert len(data.clients.names) == 4
    unseen = set(SIZES) - set(data.clients.names)
    extra = data.extra_tests["unseen_clients"]
    assert extra.texts is not None
    assert len(extra) == sum(SIZES[name] + 2 for name in unseen)
    assert {text.split()[0].removeprefix("t") for text in extra.texts} == unseen
    assert not set(extra.texts) & {*data.train.texts, *(data.validation.texts or ())}
    assert (data.clients.test >= 0).all()
    with pytest.raises(FedbenchError, match=r"split.unseen_clients is 6.* 6 "):
        load({"unseen_clients": 6})


def test_a_client_is_what_some_columns_say_together() -> None:
    data = load({"by": ["town", "who"]})
    assert data.clients is not None
    assert data.clients.by == "town/who"
    assert "east/amy" in data.clients.names
    assert load({"by": "town"}).clients.names == ("east", "west")  # type: ignore[union-attr]
    with pytest.raises(FedbenchError, match="has no column 'city' of clients; it has who, town"):
        load({"by": "city"})


def test_a_data_set_without_a_column_of_clients_has_no_natural_split() -> None:
    bare = DataSet("bare", ("a", "b"), lambda about, revision, root: ({}, []))
    part = Part(np.zeros(4, dtype=int), ["a", "b", "c", "d"])
    from fedbench.data.natural import divide

    with pytest.raises(FedbenchError, match="names no column of clients; it has none"):
        divide(bare, SplitSettings(kind="natural"), part, part)


def test_whose_rows_are_is_part_of_what_the_data_is() -> None:
    train = rows(SIZES)
    other = train.groups["who"].copy()
    a, z = np.flatnonzero(other == "amy")[0], np.flatnonzero(other == "zoe")[0]
    other[[a, z]] = other[[z, a]]
    changed = Part(train.labels, train.texts, groups={**train.groups, "who": other})
    assert load({}, train).content_hash != load({}, changed).content_hash
    assert load({}, train).clients.column_hash != load({}, changed).clients.column_hash  # type: ignore[union-attr]


def test_a_cap_on_test_rows_keeps_whose_they_are() -> None:
    data = load({}, test_rows=2)
    assert data.clients is not None
    assert data.test.texts is not None
    assert [data.clients.names[i] for i in data.clients.test] == [t.split()[0][1:] for t in data.test.texts]


def test_a_test_without_the_column_is_everybodys() -> None:
    test = rows({"amy": 3, "new": 2}, "t")
    data = load({}, test=Part(test.labels, test.texts))
    assert data.clients is not None
    assert len(data.test) == 5
    assert (data.clients.test == -1).all()
    strangers = load({}, test=rows({"new": 4}, "t"))
    assert len(strangers.test) == 4
    assert "test: all of its rows are of clients who do not train" in strangers.notes


def test_the_partition_is_the_column() -> None:
    parts = natural_partition(np.array([1, 0, 2, 1, 0, 1]))
    assert [rows.tolist() for rows in parts.clients] == [[1, 4], [0, 3, 5], [2]]


def test_clients_are_scored_on_their_own_rows_by_hand() -> None:
    labels = np.array([0, 1, 0, 1, 0, 1])
    test = Evaluation(np.array([0, 1, 1, 1, 1, 0]), labels, 0.5)
    found = on_own_rows(test, np.array([0, 0, 0, 2, 2, -1]))
    # Client 0 has 2 of 3 right, client 1 no rows, client 2 has 1 of 2; the last row is nobody's.
    assert found["rows"] == [3, 2]
    assert found["values"] == [0.666667, 0.5]
    assert found["mean"] == pytest.approx(7 / 12)
    assert found["worst_tenth"] == 0.5


def test_divergence_of_words_by_hand() -> None:
    same = unigram_divergence(["a b", "B a"], np.array([0, 1]))
    assert same == pytest.approx(0)
    # Each client has one of two words: p = (1, 0), q = (1/2, 1/2), m = (3/4, 1/4).
    apart = unigram_divergence(["a", "b"], np.array([0, 1]))
    p_part, q_part = np.log2(1 / 0.75), 0.5 * np.log2(0.5 / 0.75) + 0.5 * np.log2(0.5 / 0.25)
    assert apart == pytest.approx(0.5 * p_part + 0.5 * q_part)
    assert unigram_divergence(["", "!"], np.array([0, 1])) == 0


def test_a_natural_split_counts_its_clients_itself(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a natural split has the clients of its data"):
        SplitSettings(kind="natural", clients=4)
    with pytest.raises(ValueError, match=re.escape('by is for kind = "natural"')):
        SplitSettings(kind="iid", clients=4, by="who")
