"""Rows as a data set holds them: texts, images and labels, before any model reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fedbench.data.image_files import ImageFiles


@dataclass(frozen=True)
class Part:
    """Rows as they are on disk, with labels [n] (zeros where unlabelled).

    texts, text_pairs: [n], the second segment where rows are pairs. images: [n, H, W] in 0..1, uint8 [n, H, W, 3], or
    files where sizes differ.
    """

    labels: np.ndarray
    texts: Sequence[str] | None = None
    images: np.ndarray | ImageFiles | None = None
    text_pairs: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: np.ndarray) -> Part:
        texts, pairs = (None if t is None else [t[i] for i in rows] for t in (self.texts, self.text_pairs))
        images = self.images.select(rows) if isinstance(self.images, ImageFiles) else self.images
        return Part(self.labels[rows], texts, images[rows] if isinstance(images, np.ndarray) else images, pairs)

    def digest(self) -> str:
        """SHA-256 of labels and inputs, in order."""
        digest = hashlib.sha256(self.labels.astype(np.int64).tobytes())
        for text in (*(self.texts or ()), *(self.text_pairs or ())):
            digest.update(text.encode() + b"\0")
        if isinstance(self.images, ImageFiles):
            for i in range(len(self.images)):
                digest.update(hashlib.sha256(self.images.content(i)).digest())
        elif self.images is not None:
            kind = np.uint8 if self.images.dtype == np.uint8 else np.float32
            digest.update(np.ascontiguousarray(self.images, dtype=kind).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class RawData:
    """A scenario's data. `notes` says what was recognised where; `content_hash` covers every part.

    extra_tests: further test sets by name, in order; `test_name` is what the first is called beside them. objective:
    name of what is asked of each row (`fedbench.objectives`).
    """

    train: Part
    validation: Part
    test: Part
    public: Part | None
    class_names: tuple[str, ...]
    notes: tuple[str, ...]
    content_hash: str
    test_name: str = "test"
    extra_tests: Mapping[str, Part] = field(default_factory=dict)
    objective: str = "classification"
