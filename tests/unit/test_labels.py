"""Labels of files: numbers and names of classes, and nothing else."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from fedbench.data.labels import class_numbers
from fedbench.errors import FedbenchError

NAMES = ("World", "Sports", "Sci/Tech")


@pytest.mark.parametrize(
    "labels",
    [
        [0, 1, 2],
        ["0", " 1", "+2"],
        ["0.0", "1.", "2.00"],
        [0.0, np.float32(1), Decimal("2.0")],
        np.array([0, 1, 2], dtype=np.uint64),
        ["world", " SPORTS ", "Sci/Tech"],
        ["World", 1, "2"],
    ],
)
def test_numbers_and_names_are_labels(labels: Any) -> None:
    found = class_numbers("a.csv", labels, NAMES)
    assert found.tolist() == [0, 1, 2]
    assert found.dtype == np.int64


def test_numbers_may_count_from_one_and_names_do_not() -> None:
    assert class_numbers("a.csv", ["1", 3, "Sports"], NAMES, first=1).tolist() == [0, 2, 1]


def test_names_that_are_numbers_are_numbers() -> None:
    """Flowers-102 calls its classes 1 to 102, and parquet numbers them from 0."""
    names = [str(i) for i in range(1, 103)]
    assert class_numbers("a.parquet", ["5", 5, "0", "101"], names).tolist() == [5, 5, 0, 101]
    with pytest.raises(FedbenchError, match="row 1 has label '102', expected 0 to 101"):
        class_numbers("a.parquet", ["102"], names)
    with pytest.raises(FedbenchError, match="row 1 has label 'rose', expected a whole number$"):
        class_numbers("a.parquet", ["rose"], names)


@pytest.mark.parametrize(
    "label",
    [
        0.5, float("nan"), float("inf"), "nan", "inf", "", "0.5", "1e0", "1_0", "١", "²", "0x1", "9" * 5000, None, b"1",
        True, np.True_, "true", [1], np.array([1]), {"label": 1}, Decimal("0.5"), 1 + 0j,
    ],
)  # fmt: skip
def test_what_is_no_label_is_named_with_its_row(label: Any) -> None:
    with pytest.raises(FedbenchError, match=r"^a\.csv: row 2 has label .*, expected a whole number or one of World, S"):
        class_numbers("a.csv", [0, label], NAMES)


@pytest.mark.parametrize("label", [-1, 3, "3", "9" * 30, 2**64, -(10**30), 1e300, np.uint64(2**63)])
def test_numbers_of_no_class_are_named_with_their_row(label: Any) -> None:
    with pytest.raises(FedbenchError, match=r"^a\.csv: row 2 has label .*, expected 0 to 2$") as caught:
        class_numbers("a.csv", [0, label], NAMES)
    assert len(str(caught.value)) < 120
