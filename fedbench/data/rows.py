"""Rows, raw and encoded: what a data set holds, and what a model is fed.

`fedbench.data.load` finds and splits data sets; here their rows are held, tokenised or made into pixels, and batched.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fedbench.data.image_files import ImageFiles
from fedbench.errors import FedbenchError

if TYPE_CHECKING:
    from fedbench.models.foundation import FoundationModel
    from fedbench.models.reading import ImageProcessor

CHUNK = 8192
"""Rows tokenised at once: a tokenizer's answer takes many times the memory of the arrays made of it."""


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

    extra_tests: further test sets by name, in order; `test_name` is what the first is called beside them.
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


@dataclass(frozen=True)
class Batch:
    """Rows padded to the longest of them, as a model takes them.

    inputs: input_ids and attention_mask [B, T], token_type_ids [B, T] for pairs where the family has them; or
    pixel_values [B, C, H, W]. labels: [B]. mask: [B, T], 1 for real tokens; None where every position is real.
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
    """

    labels: Tensor
    tokens: Sequence[np.ndarray] | None = None
    pixels: Tensor | None = None
    pad_token: int = 0
    segments: Sequence[np.ndarray] | None = None
    processor: ImageProcessor | None = None

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
        return Examples(
            self.labels[index],
            None if self.tokens is None else [self.tokens[i] for i in index.tolist()],
            None if self.pixels is None else self.pixels[index],
            self.pad_token,
            None if self.segments is None else [self.segments[i] for i in index.tolist()],
            self.processor,
        )

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


def encode(part: Part, fm: FoundationModel, max_length: int) -> Examples:
    """Tokenise texts for this FM, or make images ready for it.

    A row keeps at most `max_length` tokens; of a pair the longer segment is cut first. Raises FedbenchError where FM
    and data set are of different kinds, and where a row has more tokens than the FM has positions or token types.
    """
    labels = torch.from_numpy(part.labels.astype(np.int64))
    if fm.family.modality == "image":
        if part.images is None:
            raise FedbenchError(f"FM {fm.name} reads images, the data set holds text; choose another --fm")
        return _encode_images(labels, part.images, fm.processor)
    if part.texts is None:
        raise FedbenchError(f"FM {fm.name} reads text, the data set holds images; choose another --fm")
    tokens: list[np.ndarray] = []
    segments: list[np.ndarray] | None = [] if part.text_pairs is not None and fm.family.token_types else None
    for start in range(0, len(part), CHUNK):
        chosen = slice(start, start + CHUNK)
        texts = [list(t[chosen]) for t in (part.texts, part.text_pairs) if t is not None]
        asked = {} if segments is None else {"return_token_type_ids": True}
        found = fm.processor(*texts, truncation="longest_first", max_length=max_length, padding=False, **asked)
        tokens += [np.asarray(row, dtype=np.int32) for row in found["input_ids"]]
        if segments is not None:
            segments += [np.asarray(row, dtype=np.int8) for row in found["token_type_ids"]]
    if (longest := max(map(len, tokens), default=0)) > (room := fm.positions()):
        raise FedbenchError(
            f"dataset.max_length is {max_length} and a row has {longest} tokens, but FM {fm.name} has positions for "
            f"{room}; set dataset.max_length to {room} or less"
        )
    if segments and (types := 1 + max(int(row.max()) for row in segments)) > fm.segments():
        raise FedbenchError(
            f"FM {fm.name}: its tokenizer gives {types} token types to pairs, the model has {fm.segments()}; they "
            "belong to different models"
        )
    return Examples(labels, tokens, None, int(fm.processor.pad_token_id), segments)


def inputs_hash(parts: Mapping[str, Examples], fm: FoundationModel) -> str:
    """SHA-256 of what the FM's tokenizer or image settings made of the rows, by role.

    Of images, whose contents are part of the data's own hash, sizes and settings stand for the pixels.
    """
    text = fm.family.modality == "text"
    made = {
        role: rows.content_hash() if text or rows.pixels is None else list(rows.pixels.shape)
        for role, rows in parts.items()
    }
    about = [made, None if text else repr(fm.processor)]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _encode_images(labels: Tensor, images: np.ndarray | ImageFiles, processor: ImageProcessor) -> Examples:
    """Grey images become pixel values at once; colour images stay uint8, shrunk here where larger than the model's."""
    if isinstance(images, np.ndarray):
        if images.dtype != np.uint8:
            return Examples(labels, pixels=to_pixels(torch.from_numpy(images.astype(np.float32))[:, None], processor))
        stored = torch.from_numpy(images).permute(0, 3, 1, 2)
        if max(stored.shape[2:]) > processor.size:
            stored = torch.cat([resize(chunk, processor) for chunk in stored.split(256)])
        return Examples(labels, pixels=stored, processor=processor)
    stored = torch.empty((len(images), 3, processor.size, processor.size), dtype=torch.uint8)
    for i in range(len(images)):
        stored[i] = resize(torch.from_numpy(images.decode(i)).permute(2, 0, 1)[None], processor)[0]
    return Examples(labels, pixels=stored, processor=processor)


def resize(images: Tensor, processor: ImageProcessor) -> Tensor:
    """Images [B, C, H, W], uint8 or float -> [B, C, size, size] of the same type, with antialiasing."""
    from torchvision.transforms.v2 import InterpolationMode, functional

    mode = InterpolationMode(processor.resample)
    return functional.resize(images, [processor.size, processor.size], interpolation=mode, antialias=True)


def to_pixels(images: Tensor, processor: ImageProcessor) -> Tensor:
    """Images [B, 1 or 3, H, W], uint8 or float in 0..1 -> what the model takes: float32 [B, C, size, size].

    Resized, scaled to 0..1 and normalised as the checkpoint's processor says; grey is repeated over the channels of a
    colour model, colour made grey for a model of one channel.
    """
    from torchvision.transforms.v2 import functional

    pixels = functional.to_dtype(resize(images, processor), torch.float32, scale=True)
    if pixels.shape[1] != processor.channels:
        if processor.channels == 1:
            pixels = functional.rgb_to_grayscale(pixels, num_output_channels=1)
        else:
            pixels = pixels.expand(-1, processor.channels, -1, -1)
    return functional.normalize(pixels, list(processor.mean), list(processor.std)).contiguous()
