"""Partitioners: every row exactly once, the same seed the same split, minimum size honoured or refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbench.data.partition import partition
from fedbench.errors import FedbenchError
from fedbench.scenario.tables import SplitSettings

KINDS = ["iid", "dirichlet", "dirichlet-clients", "shards", "quantity"]


@given(
    kind=st.sampled_from(KINDS),
    rows=st.integers(1, 300),
    classes=st.integers(1, 6),
    clients=st.integers(1, 20),
    alpha=st.floats(0.05, 100),
    min_size=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=150)
def test_every_row_once_same_seed_same_split_minimum_or_error(
    kind: str, rows: int, classes: int, clients: int, alpha: float, min_size: int, seed: int
) -> None:
    labels = np.random.default_rng(seed).integers(0, classes, rows)
    split = SplitSettings(kind=kind, clients=clients, alpha=alpha, min_size=min_size)  # type: ignore[arg-type]
    try:
        first = partition(labels, split, np.random.default_rng(seed))
    except FedbenchError:
        return  # refused after bounded tries; what the message says is tested below
    assert len(first.clients) == clients
    assert np.array_equal(np.sort(np.concatenate(first.clients)), np.arange(rows))
    assert min(first.sizes()) >= min_size
    assert all(np.array_equal(c, np.sort(c)) for c in first.clients)
    assert first.hash() == partition(labels, split, np.random.default_rng(seed)).hash()
    assert np.asarray(first.label_counts(labels, classes)).sum() == rows
    skew = first.skew(labels, classes)
    assert 0 <= skew["mean_total_variation"] <= 1
    assert -1e-12 <= skew["gini"] <= 1


def test_skew_of_a_hand_made_split() -> None:
    labels = np.array([0, 0, 1, 1])
    split = SplitSettings(kind="shards", clients=2, shards_per_client=1)
    parts = partition(labels, split, np.random.default_rng(0))
    assert parts.skew(labels, 2) == {"mean_total_variation": 0.5, "gini": 0.0}


def test_equal_sizes_per_client_and_smaller_alpha_more_skew() -> None:
    labels = np.random.default_rng(0).integers(0, 4, 2000)

    def skew(kind: str, alpha: float) -> float:
        split = SplitSettings(kind=kind, clients=20, alpha=alpha)  # type: ignore[arg-type]
        parts = partition(labels, split, np.random.default_rng(1))
        if kind == "dirichlet-clients":
            assert set(parts.sizes()) == {100}
        return parts.skew(labels, 4)["mean_total_variation"]

    for kind in ("dirichlet", "dirichlet-clients"):
        assert skew(kind, 0.3) > skew(kind, 3) > skew(kind, 300)


def test_what_cannot_be_is_refused_at_once() -> None:
    with pytest.raises(FedbenchError, match="need 100 rows, there are 99"):
        partition(np.zeros(99, dtype=int), SplitSettings(kind="iid", clients=10, min_size=10), np.random.default_rng(0))
    hopeless = SplitSettings(kind="dirichlet", clients=10, alpha=0.01, min_size=9)
    with pytest.raises(FedbenchError, match=r"\d+ draws of dirichlet .* raise split\.alpha"):
        partition(np.zeros(100, dtype=int), hopeless, np.random.default_rng(0))
    uneven = SplitSettings(kind="shards", clients=2, shards_per_client=1, min_size=2)
    with pytest.raises(FedbenchError, match="need 4 rows, there are 3"):
        partition(np.zeros(3, dtype=int), uneven, np.random.default_rng(0))
    scarce = SplitSettings(kind="shards", clients=20, shards_per_client=20, min_size=2)
    with pytest.raises(FedbenchError, match=r"\d+ draws of shards \(20 shards a client\).* split\.shards_per_client"):
        partition(np.zeros(40, dtype=int), scarce, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("kind", "digest", "attempts"),
    [
        ("iid", "f1e174ab66ea5d8e", 1),
        ("dirichlet", "4dc0701aa133b680", 7),
        ("dirichlet-clients", "1f3590af1fe347f6", 1),
        ("shards", "cd181302745825ee", 1),
        ("quantity", "5e176b40c36f6fa3", 8),
    ],
)
def test_what_a_seed_draws_stays_what_it_was(kind: str, digest: str, attempts: int) -> None:
    labels = np.random.default_rng(0).integers(0, 3, 400)
    split = SplitSettings(kind=kind, clients=8, alpha=0.5, min_size=9)  # type: ignore[arg-type]
    parts = partition(labels, split, np.random.default_rng(0))
    assert (parts.hash()[:16], parts.attempts) == (digest, attempts)


@pytest.mark.parametrize("kind", ["dirichlet", "quantity"])
def test_a_split_far_out_of_reach_is_refused_after_its_first_draws(kind: str) -> None:
    labels = np.random.default_rng(0).integers(0, 4, 120_000)
    split = SplitSettings(kind=kind, clients=10_000, alpha=0.1, min_size=2)  # type: ignore[arg-type]
    with pytest.raises(FedbenchError, match=r"split: 16 draws of .* \d+ had fewer on average; raise split\.alpha"):
        partition(labels, split, np.random.default_rng(0))


def test_a_split_that_only_luck_reaches_is_still_tried() -> None:
    labels = np.zeros(3000, dtype=int)
    split = SplitSettings(kind="quantity", clients=20, alpha=1.0, min_size=30)
    parts = partition(labels, split, np.random.default_rng(2))
    assert min(parts.sizes()) >= 30
    assert parts.attempts == 377


@pytest.mark.parametrize("kind", ["dirichlet", "dirichlet-clients", "quantity"])
def test_the_largest_alpha_is_an_even_split(kind: str) -> None:
    labels = np.arange(400) % 4
    split = SplitSettings(kind=kind, clients=4, alpha=1e9)  # type: ignore[arg-type]
    with np.errstate(all="raise"):
        parts = partition(labels, split, np.random.default_rng(0))
    assert all(abs(size - 100) <= 4 for size in parts.sizes())


def test_more_shards_than_memory_are_refused() -> None:
    split = SplitSettings(kind="shards", clients=4, shards_per_client=10**9)
    with pytest.raises(FedbenchError, match=r"need 4000000000 shards, there are 400 rows.*split\.shards_per_client"):
        partition(np.zeros(400, dtype=int), split, np.random.default_rng(0))
