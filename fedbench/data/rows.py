"""Rows as a data set holds them: texts, images and labels, before any model reads them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fedbench.data.image_files import ImageFiles
from fedbench.errors import FedbenchError

Chat = tuple[tuple[str, str], ...]
"""A conversation: role ("system", "user", "assistant") and words of each turn, the last of them an answer."""


@dataclass(frozen=True)
class Part:
    """Rows as they are on disk, with labels [n] (zeros where unlabelled).

    texts, text_pairs: [n], the second segment where rows are pairs. images: [n, H, W] in 0..1, uint8 [n, H, W, 3], or
    files where sizes differ. groups: columns by which rows belong to clients, by name, [n] each; no model sees them.
    chats: [n], conversations, of which `texts` then holds all words. choices: [n], the answers to choose from of the
    questions in `texts`, of which the labels name the right one.
    """

    labels: np.ndarray
    texts: Sequence[str] | None = None
    images: np.ndarray | ImageFiles | None = None
    text_pairs: Sequence[str] | None = None
    groups: Mapping[str, np.ndarray] = field(default_factory=dict)
    chats: Sequence[Chat] | None = None
    choices: Sequence[tuple[str, ...]] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: np.ndarray) -> Part:
        texts, pairs = (None if t is None else [t[i] for i in rows] for t in (self.texts, self.text_pairs))
        images = self.images.select(rows) if isinstance(self.images, ImageFiles) else self.images
        groups = {name: column[rows] for name, column in self.groups.items()}
        chats = None if self.chats is None else [self.chats[i] for i in rows]
        choices = None if self.choices is None else [self.choices[i] for i in rows]
        images = images[rows] if isinstance(images, np.ndarray) else images
        return Part(self.labels[rows], texts, images, pairs, groups, chats, choices)

    def columns_of_text(self) -> list[Sequence[str]]:
        """The segments of its rows, one column each; none of images."""
        return [texts for texts in (self.texts, self.text_pairs) if texts is not None]

    @classmethod
    def joined(cls, parts: Sequence[Part]) -> Part:
        """Rows of several parts of one kind as one, part after part."""
        first = parts[0]
        texts, pairs, chats, choices = (
            None if getattr(first, name) is None else [cell for part in parts for cell in getattr(part, name)]
            for name in ("texts", "text_pairs", "chats", "choices")
        )
        groups = {name: np.concatenate([part.groups[name] for part in parts]) for name in first.groups}
        labels = np.concatenate([part.labels for part in parts])
        images = _joined_images([p.images for p in parts if p.images is not None])
        return cls(labels, texts, images, pairs, groups, chats, choices)

    def digest(self) -> str:
        """SHA-256 of labels and inputs, in order."""
        digest = hashlib.sha256(self.labels.astype(np.int64).tobytes())
        for text in (*(self.texts or ()), *(self.text_pairs or ())):
            digest.update(text.encode() + b"\0")
        for cell in (*(self.chats or ()), *(self.choices or ())):
            digest.update(json.dumps(cell).encode() + b"\0")
        if isinstance(self.images, ImageFiles):
            for i in range(len(self.images)):
                digest.update(hashlib.sha256(self.images.content(i)).digest())
        elif self.images is not None:
            kind = np.uint8 if self.images.dtype == np.uint8 else np.float32
            digest.update(np.ascontiguousarray(self.images, dtype=kind).tobytes())
        return digest.hexdigest()


def _joined_images(images: Sequence[np.ndarray | ImageFiles]) -> np.ndarray | ImageFiles | None:
    """Images of several parts. Raises FedbenchError where some were decoded at once and others, of other sizes, not."""
    arrays = [each for each in images if isinstance(each, np.ndarray)]
    files = [each for each in images if isinstance(each, ImageFiles)]
    if arrays and (files or len({each.shape[1:] for each in arrays}) > 1):
        raise FedbenchError("images of one size and of several cannot be joined; bring them all to one size")
    if arrays:
        return np.concatenate(arrays)
    chosen = [each.source[int(row)] for each in files for row in each.rows]
    return ImageFiles(chosen, np.arange(len(chosen))) if files else None


@dataclass(frozen=True)
class NaturalClients:
    """Whose a row is, where clients are those of the data.

    names: of the clients, sorted. train, test: the number of the client of each row, [n]; -1 in the test where nobody's
    who trains. by: the column, or columns, that say so. column_hash: SHA-256 of what these hold for all rows.
    """

    names: tuple[str, ...]
    train: np.ndarray
    test: np.ndarray
    by: str
    column_hash: str

    def without(self, role: str, rows: Sequence[int]) -> NaturalClients:
        """The same without some rows of "train" or "test"; who has no training rows left takes no part."""
        train, test = (np.delete(getattr(self, name), rows if role == name else []) for name in ("train", "test"))
        left, numbered = np.unique(train, return_inverse=True)
        number = {int(old): new for new, old in enumerate(left)}
        names = tuple(self.names[old] for old in left)
        own = np.array([number.get(int(old), -1) for old in test], dtype=np.int64)
        return NaturalClients(names, numbered.astype(np.int64), own, self.by, self.column_hash)


@dataclass(frozen=True)
class RawData:
    """A scenario's data. `notes` says what was recognised where; `content_hash` covers every part.

    extra_tests: further test sets by name, in order; `test_name` is what the first is called beside them. objective:
    name of what is asked of each row (`fedbench.objectives`). clients: of a natural split, else None.
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
    clients: NaturalClients | None = None

    def roles(self) -> dict[str, Part]:
        """All parts by role; a further test set's is "test NAME"."""
        found = {"train": self.train, "validation": self.validation, "test": self.test}
        found |= {} if self.public is None else {"public": self.public}
        return found | {f"test {name}": part for name, part in self.extra_tests.items()}

    def without(self, role: str, rows: Sequence[int], why: str) -> RawData:
        """The same without some rows of a role, which a note says. Raises FedbenchError where none is left."""
        part = self.roles()[role]
        left = np.delete(np.arange(len(part)), rows)
        if not len(left):
            raise FedbenchError(f"{role}: no rows are left: {why}")
        note = f"{role}: {len(rows)} rows left out, {why}"
        kept = replace(self, notes=(*self.notes, note))
        if role.startswith("test "):
            extra = {**self.extra_tests, role.removeprefix("test "): part.select(left)}
            return replace(kept, extra_tests=extra)
        clients = self.clients
        if clients is not None and role in ("train", "test"):
            clients = clients.without(role, rows)
        return replace(kept, clients=clients, **{role: part.select(left)})  # type: ignore[arg-type]
