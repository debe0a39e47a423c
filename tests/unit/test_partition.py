"""Partitioners: every row exactly once, the same seed the same split, minimum size honoured or refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbench.errors import FedbenchError
from fedbench.partition import partition
from fedbench.scenario import SplitSettings

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
    with pytest.raises(FedbenchError, match=r"1000 draws of dirichlet .* raise split\.alpha"):
        partition(np.zeros(100, dtype=int), hopeless, np.random.default_rng(0))
    uneven = SplitSettings(kind="shards", clients=2, shards_per_client=1, min_size=2)
    with pytest.raises(FedbenchError, match="need 4 rows, there are 3"):
        partition(np.zeros(3, dtype=int), uneven, np.random.default_rng(0))
    scarce = SplitSettings(kind="shards", clients=20, shards_per_client=20, min_size=2)
    with pytest.raises(FedbenchError, match=r"1000 draws of shards \(20 shards a client\).* split\.shards_per_client"):
        partition(np.zeros(40, dtype=int), scarce, np.random.default_rng(0))
