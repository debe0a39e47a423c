"""Rows as a model takes them: encoded, labelled, and batched."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fedbench.data.answers import Choices, References
from fedbench.data.pixels import ImageProcessor, to_pixels


@dataclass(frozen=True)
class Batch:
    """Rows padded to the longest of them, as a model takes them.

    inputs: input_ids and attention_mask [B, T], token_type_ids [B, T] for pairs where the family has them; or
    pixel_values [B, C, H, W]. labels: the targets, [B], or of each token [B, T]. mask: [B, T], 1 for real tokens; None
    where every position is real.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class Examples:
    """Encoded, labelled rows: ragged token ids (int32, special tokens included) or pixels.

    segments: the token types of pairs, as ragged as the tokens; None where all is segment 0, which is what a model
    takes when it is given none. pixels: [n, C, H, W] ready for the model; or, where `processor` is given, uint8
    [n, 3, h, w] no larger than the model's images, which become pixel values batch by batch: at 224 pixels in float32
    the 60,000 images of CIFAR would take 36 GB.

    objective: name of what is asked of the rows (`fedbench.objectives`). labels: that, as the objective encodes it: the
    targets [n], or of each token [n, longest row]. answers: what rows are scored by beside that, of language.
    """

    labels: Tensor
    tokens: Sequence[np.ndarray] | None = None
    pixels: Tensor | None = None
    pad_token: int = 0
    segments: Sequence[np.ndarray] | None = None
    processor: ImageProcessor | None = None
    objective: str = "classification"
    answers: Choices | References | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, [n]; 1 for images, which are all alike."""
        if self.tokens is None:
            return np.ones(len(self), dtype=np.int64)
        return np.fromiter((len(t) for t in self.tokens), dtype=np.int64, count=len(self.tokens))

    def select(self, rows: np.ndarray | Sequence[int]) -> Examples:
        """Some rows, in this order."""
        index = torch.as_tensor(np.asarray(rows, dtype=np.int64))
        chosen = Examples(
            self.labels[index],
            None if self.tokens is None else [self.tokens[i] for i in index.tolist()],
            None if self.pixels is None else self.pixels[index],
            self.pad_token,
            None if self.segments is None else [self.segments[i] for i in index.tolist()],
            self.processor,
            self.objective,
            None if self.answers is None else self.answers.select(index.tolist()),
        )
        if "lengths" in vars(self):  # where they were counted once, they are not counted again
            vars(chosen)["lengths"] = self.lengths[index.numpy()]
        return chosen

    @classmethod
    def joined(cls, parts: Sequence[Examples]) -> Examples:
        """Rows of several parts that are of one kind, part after part."""
        first = parts[0]
        return cls(
            torch.cat([part.labels for part in parts]),
            None if first.tokens is None else [row for part in parts for row in part.tokens or ()],
            None if first.pixels is None else torch.cat([p.pixels for p in parts if p.pixels is not None]),
            first.pad_token,
            None if first.segments is None else [row for part in parts for row in part.segments or ()],
            first.processor,
            first.objective,
        )

    def content_hash(self) -> str:
        """SHA-256 of everything a model can see."""
        digest = hashlib.sha256(self.labels.numpy().tobytes() + self.lengths.tobytes() + str(self.pad_token).encode())
        for row in self.tokens or ():
            digest.update(row.astype(np.int32).tobytes())
        for row in self.segments or ():
            digest.update(row.astype(np.int8).tobytes())
        if self.pixels is not None:
            digest.update(self.pixels.contiguous().numpy().tobytes())
        if self.objective != "classification":  # what a hash is of when it says nothing
            digest.update(self.objective.encode())
        if self.answers is not None:
            digest.update(self.answers.digest().encode())
        if self.processor is not None:
            digest.update(repr(self.processor).encode())
        return digest.hexdigest()

    def batch(self, rows: np.ndarray | Sequence[int], device: torch.device | str = "cpu") -> Batch:
        """These rows as one padded batch on `device`."""
        index = np.asarray(rows, dtype=np.int64)
        labels = self.labels[torch.from_numpy(index)].to(device)
        if self.tokens is None:
            assert self.pixels is not None
            pixels = self.pixels[torch.from_numpy(index)].to(device)
            if self.processor is not None:
                pixels = to_pixels(pixels, self.processor)
            return Batch({"pixel_values": pixels}, labels, None)
        width = max(len(self.tokens[i]) for i in index)
        if labels.dim() > 1:
            labels = labels[:, :width]
        real = _padded([np.ones(len(self.tokens[i]), dtype=np.int64) for i in index], width, 0).to(device)
        ids = _padded([self.tokens[i] for i in index], width, self.pad_token).to(device)
        inputs = {"input_ids": ids, "attention_mask": real}
        if self.segments is not None:
            inputs["token_type_ids"] = _padded([self.segments[i] for i in index], width, 0).to(device)
        return Batch(inputs, labels, real)

    def length_sorted_batches(self, size: int) -> list[np.ndarray]:
        """Indices of all rows in batches of at most `size` rows of similar length."""
        order = np.argsort(self.lengths, kind="stable")
        return [order[start : start + size] for start in range(0, len(order), size)]


def _padded(rows: Sequence[np.ndarray], width: int, fill: int) -> Tensor:
    """Ragged rows as one tensor [B, width] of int64."""
    out = np.full((len(rows), width), fill, dtype=np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return torch.from_numpy(out)
