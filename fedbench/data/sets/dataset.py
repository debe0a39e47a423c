"""What a data set is: the record that `dataset.name` and `public.name` of a scenario stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from fedbench.data.rows import Part
from fedbench.errors import FedbenchError
from fedbench.names import bad_name

Rows: TypeAlias = tuple[dict[str, Part], list[str]]
"""Rows by role, and notes for the user: what was found where."""

Source: TypeAlias = "Callable[[DataSet, str | None, Path | None], Rows]"


@dataclass(frozen=True, eq=False)
class DataSet:
    """A data set: what it is called, what its classes are, and how its rows are read.

    name: what scenarios call it. classes: names of the classes, in the order of their numbers; none for rows that serve
    as a public corpus only. source: called with this record, the revision that the scenario asks for and the user's
    folder of data sets (either may be None); gives rows by role, and notes. about: one line that says what it is,
    whose, and under which licence. test_name: what the test set is called where there are others beside it. public:
    whether the source sets rows aside for a public corpus. note: what a user should know before trusting a number.
    client: the columns among `Part.groups` that together say whose a row is, for natural splits. held_out: whether the
    source sets validation rows aside.

    Roles are "train" and "test"; "public" where rows are set aside, and "validation"; any other is a further test set
    of that name.
    A data set is equal to itself only, so that nothing read for one is ever taken for another of its name.
    """

    name: str
    classes: tuple[str, ...]
    source: Source
    about: str = ""
    test_name: str = "test"
    public: bool = False
    note: str | None = None
    client: tuple[str, ...] = ()
    held_out: bool = False

    def read(self, revision: str | None, root: Path | None) -> Rows:
        """Rows by role and notes, checked. Raises FedbenchError where they cannot be had, or are no data set."""
        try:
            parts, notes = self.source(self, revision, root)
        except (FedbenchError, MemoryError):
            raise
        except Exception as error:  # a plugin's source can fail in any way
            raise FedbenchError(f"data set {self.name}: cannot be read: {type(error).__name__}: {error}") from error
        self._check(parts)
        return dict(parts), [*notes, *([f"{self.name}: {self.note}"] if self.note else [])]

    def _check(self, parts: Mapping[str, Part]) -> None:
        wanted = [*(("train", "test") if self.classes else ()), *(("public",) if self.public else ())]
        wanted += ["validation"] if self.held_out else []
        if missing := [role for role in wanted if role not in parts]:
            raise FedbenchError(f"data set {self.name}: its source gives no {missing[0]!r} rows, but {list(parts)}")
        if not self.public and "public" in parts:
            raise FedbenchError(f"data set {self.name}: its source gives 'public' rows; say public=True in its DataSet")
        for role, part in parts.items():
            if why := bad_name(role) or _fault(part, None if role == "public" else len(self.classes)):
                raise FedbenchError(f"data set {self.name}: {role}: {why}")
        if len({part.texts is None for part in parts.values()}) > 1:
            raise FedbenchError(f"data set {self.name}: some of its parts are texts, others images")


def _fault(part: Any, classes: int | None) -> str | None:
    """Why these are no rows of a data set with so many classes (None: labels are not read); None where they are."""
    if not isinstance(part, Part):
        return f"is a {type(part).__name__}, expected a Part"
    labels = part.labels
    if not isinstance(labels, np.ndarray) or labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        return "labels are no array of whole numbers [n]"
    if len(labels) == 0:
        return "holds no rows"
    if classes is not None and len(wrong := labels[(labels < 0) | (labels >= classes)]):
        return f"has the label {wrong[0]}, expected 0 to {classes - 1}"
    if (part.texts is None) == (part.images is None):
        return "holds both texts and images, or neither"
    columns: list[Any] = [column for column in (part.texts, part.text_pairs, part.images) if column is not None]
    columns += [*part.groups.values(), *(column for column in (part.chats, part.choices) if column is not None)]
    if lengths := [len(column) for column in columns if len(column) != len(labels)]:
        return f"has {len(labels)} labels and {lengths[0]} rows"
    if not all(isinstance(column, np.ndarray) for column in part.groups.values()):
        return "groups are no arrays"
    for texts in (part.texts, part.text_pairs):
        if (row := next((i for i, text in enumerate(texts or ()) if not isinstance(text, str)), None)) is not None:
            return f"row {row + 1} is no text"
    return _images_fault(part.images) if isinstance(part.images, np.ndarray) else None


def _images_fault(images: np.ndarray) -> str | None:
    if images.dtype == np.uint8:
        right = images.ndim == 4 and images.shape[3] == 3
    else:
        floats = images.ndim == 3 and np.issubdtype(images.dtype, np.floating)
        right = bool(floats and images.min() >= 0 and images.max() <= 1)
    shape = f"{images.dtype} {list(images.shape)}"
    return None if right else f"images are {shape}, expected uint8 [n, H, W, 3] or grey floats [n, H, W] in 0..1"
