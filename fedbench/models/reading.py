"""What makes numbers of an FM's inputs: its tokenizer, or its image settings, read from its folder and checked.

Both decide a result as much as the weights do, and both are easily lost: transformers makes up a tokenizer of special
tokens alone where a vocabulary is missing. What cannot belong to the model is refused, what looks odd is noted.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fedbench.data.examples import Examples
from fedbench.data.image_files import ImageFiles
from fedbench.data.pixels import ImageProcessor, resize, to_pixels
from fedbench.data.rows import Part
from fedbench.errors import FedbenchError
from fedbench.models.conversation import CHUNK, encode_language
from fedbench.models.foundation import FoundationModel
from fedbench.models.spec import ModelSpec
from fedbench.objectives.named import objective_of

VOCABULARIES = (("tokenizer.json",), ("vocab.txt",), ("vocab.json", "merges.txt"))
"""Files that hold a vocabulary: one of these sets has to be whole."""
SMALLEST_SHARE = 0.5
"""A tokenizer with fewer tokens than this share of the model's embeddings is another model's."""
UNKNOWN_NOTED = 0.05
"""Share of unknown tokens in the data from which on the notes say so."""


def read_tokenizer(folder: Path, spec: ModelSpec, embeddings: int) -> Any:
    """The tokenizer in a checkpoint's folder, which has to be one of a model with that many token embeddings.

    Raises FedbenchError where there is no vocabulary, where its size or a token's number does not fit the model, where
    a special token is missing, and where rows do not begin with a special token, which is what a head reads. A decoder
    needs a token for padding alone, for which the one that ends texts will do.
    """
    from transformers import AutoConfig, AutoTokenizer

    files = {path.name for path in folder.iterdir()}
    if not any(files.issuperset(names) for names in VOCABULARIES):
        known = ", ".join(" with ".join(names) for names in VOCABULARIES)
        raise FedbenchError(f"{folder} has no vocabulary: it lacks {known}; add the files of the model's tokenizer")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    config = AutoConfig.for_model(spec.model_type, **spec.config)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            folder, config=config, local_files_only=True, trust_remote_code=False
        )
        vocabulary: Mapping[str, int] = tokenizer.get_vocab()
    except Exception as error:  # transformers and tokenizers raise many kinds for files that are not what they seem
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise FedbenchError(f"{folder} has no tokenizer that can be read ({why}); fetch its files again") from None
    decoder = spec.family.reads == "last"
    if decoder and tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # decoders are trained without padding; a mask hides it
    special = {str(token) for token in tokenizer.all_special_tokens}
    if not set(vocabulary) - special:
        raise FedbenchError(f"{folder}: the vocabulary holds special tokens alone; fetch the tokenizer's files again")
    if (largest := max(vocabulary.values())) >= embeddings or len(vocabulary) < SMALLEST_SHARE * embeddings:
        raise FedbenchError(
            f"{folder}: the tokenizer has {len(vocabulary)} tokens up to number {largest}, the model has embeddings of "
            f"{embeddings}; they belong to different models"
        )
    roles = [("padding", tokenizer.pad_token_id)]
    if not decoder:
        roles += [
            ("unknown words", tokenizer.unk_token_id),
            ("the start of a row", tokenizer.cls_token_id),
            ("the end of a segment", tokenizer.sep_token_id),
        ]
    for role, token in roles:
        if token is None or token not in vocabulary.values():
            raise FedbenchError(f"{folder}: the tokenizer has no token for {role}; complete its files")
    if spec.family.position_offset == "after padding token" and tokenizer.pad_token_id != spec.config["pad_token_id"]:
        raise FedbenchError(
            f"{folder}: the model counts positions from padding token {spec.config['pad_token_id']}, the tokenizer "
            f"pads with {tokenizer.pad_token_id}; they belong to different models"
        )
    if spec.family.padding_token not in (None, tokenizer.pad_token_id):
        raise FedbenchError(
            f"{folder}: the model counts positions from padding token {spec.family.padding_token}, the tokenizer pads "
            f"with {tokenizer.pad_token_id}; they belong to different models"
        )
    if decoder:
        return tokenizer
    row = tokenizer("a")["input_ids"]
    if len(row) < 3 or row[0] != tokenizer.cls_token_id or row[-1] != tokenizer.sep_token_id:
        raise FedbenchError(
            f"{folder}: the tokenizer puts no {tokenizer.cls_token} and {tokenizer.sep_token} around a row, which the "
            "model was trained with; complete its files"
        )
    return tokenizer


def unknown_tokens(tokenizer: Any, rows: Sequence[np.ndarray]) -> str | None:
    """A note where more than `UNKNOWN_NOTED` of the tokens of `rows` are unknown to the tokenizer."""
    tokens = np.concatenate(rows)
    other = [token for token in tokenizer.all_special_ids if token != tokenizer.unk_token_id]
    words = tokens[~np.isin(tokens, other)]
    if tokenizer.unk_token_id is None:  # bytes: every text can be written with them
        return None
    share = float((words == tokenizer.unk_token_id).mean()) if len(words) else 0.0
    if share <= UNKNOWN_NOTED:
        return None
    return f"{share:.0%} of the tokens are unknown to the tokenizer; see that it is the model's and of this language"


_RESAMPLE: dict[int, Literal["nearest", "bilinear", "bicubic"]] = {0: "nearest", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers, which checkpoints use, and torchvision's names."""
_STEPS = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")
_EXPLICIT = ("size", "image_mean", "image_std", "resample", "do_center_crop")


def read_image_processor(path: Path, spec: ModelSpec) -> ImageProcessor:
    """Image size and normalisation from the checkpoint's processor; the family's defaults where it has none.

    Raises FedbenchError for a processor that does other things than resizing to a square, scaling to 0..1 and
    normalising, and for values that no image can be normalised with.
    """
    settings: Any = {}
    if path.exists():
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise FedbenchError(f"cannot read {path}: {error}; fetch it again") from None
    if not isinstance(settings, dict):
        raise FedbenchError(f"{path} holds no JSON object; fetch it again")
    settings = {key: value for key, value in settings.items() if value is not None}  # null stands for the default
    kind = str(settings.get("image_processor_type") or settings.get("feature_extractor_type") or "ViT")
    if not kind.startswith("ViT") and (unsaid := [key for key in _EXPLICIT if key not in settings]):
        raise FedbenchError(f"{path} is of a {kind}, whose defaults may differ; set {unsaid[0]} in it")
    expected, channels = int(spec.config.get("image_size", 224)), int(spec.config.get("num_channels", 3))
    size = settings.get("size", expected)
    if isinstance(size, dict):
        sides = [size.get("height"), size.get("width")]
    else:
        sides = list(size) if isinstance(size, list) else [size]
    if any(side != expected for side in sides) or not sides:
        raise FedbenchError(
            f"{path} asks for images of size {size}, the model takes {expected} x {expected}; "
            "set size to that, a square"
        )
    resample = settings.get("resample", 2)
    other = [key for key, value in settings.items() if key.startswith("do_") and key not in _STEPS and value]
    other += [key for key in ("crop_pct",) if settings.get(key)]
    skipped = [key for key in ("do_resize", "do_rescale") if not settings.get(key, True)]
    scaled = settings.get("rescale_factor", 1 / 255)
    if other or skipped or not _is(scaled, 1 / 255) or isinstance(resample, (list, dict)) or resample not in _RESAMPLE:
        asked = [f"{key} {settings[key]}".lower() for key in (*other, *skipped)]
        asked += [] if _is(scaled, 1 / 255) else [f"rescale_factor {scaled}"]
        asked = asked or [f"resample {resample}"]
        raise FedbenchError(
            f"{path} asks for {', '.join(asked)}; supported are resizing to a square by "
            f"{', '.join(_RESAMPLE.values())} ({', '.join(map(str, _RESAMPLE))}) and scaling 8 bits to 0..1"
        )
    mean, std = (0.0,) * channels, (1.0,) * channels
    if settings.get("do_normalize", True):
        mean, std = (_each(path, key, settings.get(key, 0.5), channels) for key in ("image_mean", "image_std"))
    if min(std) <= 0:
        raise FedbenchError(f"{path}: image_std is {settings['image_std']}; a deviation has to be above 0")
    return ImageProcessor(expected, mean, std, channels, _RESAMPLE[resample])


def _is(value: Any, expected: float) -> bool:
    return isinstance(value, (int, float)) and math.isclose(value, expected, rel_tol=1e-6)


def _each(path: Path, key: str, value: Any, channels: int) -> tuple[float, ...]:
    """A mean or deviation of each channel; a single number is that of all."""
    values = value if isinstance(value, list) else [value] * channels
    if len(values) != channels or not all(type(v) in (int, float) and math.isfinite(v) for v in values):
        raise FedbenchError(f"{path}: {key} is {value}, expected {channels} numbers, one a channel")
    return tuple(map(float, values))


def encode(
    part: Part, fm: FoundationModel, max_length: int, objective: str = "classification", answers_only: bool = True
) -> Examples:
    """Tokenise texts for this FM, or make images ready for it, with targets as the named objective encodes them.

    A row keeps at most `max_length` tokens; of a pair the longer segment is cut first. answers_only: of a row of
    language with a second text, whether that alone is asked for. Raises FedbenchError where FM and data set are of
    different kinds, and where a row has more tokens than the FM has positions or token types.
    """
    asks = objective_of(objective)
    if fm.family.modality == "image":
        if part.images is None:
            raise FedbenchError(f"FM {fm.name} reads images, the data set holds text; choose another --fm")
        images = _encode_images(asks.targets(part.labels, None), part.images, fm.processor)
        return replace(images, objective=objective)
    if part.texts is None:
        raise FedbenchError(f"FM {fm.name} reads text, the data set holds images; choose another --fm")
    if asks.every_token and fm.spec.head == "vocabulary":
        rows = encode_language(part, fm, max_length, asks, answers_only)
        _check_lengths(rows.tokens or (), fm, max_length)
        return rows
    decoder = fm.family.reads == "last"
    tokens: list[np.ndarray] = []
    segments: list[np.ndarray] | None = [] if part.text_pairs is not None and fm.family.token_types else None
    for start in range(0, len(part), CHUNK):
        chosen = slice(start, start + CHUNK)
        texts = [list(t[chosen]) for t in (part.texts, part.text_pairs) if t is not None]
        if decoder and len(texts) == 2:
            texts[1] = [f"\n{text}" for text in texts[1]]  # decoders' tokenizers put nothing between two texts
        asked = {} if segments is None else {"return_token_type_ids": True}
        found = fm.processor(*texts, truncation="longest_first", max_length=max_length, padding=False, **asked)
        ids = [_without_padding(row, fm.processor) for row in found["input_ids"]] if decoder else found["input_ids"]
        tokens += [np.asarray(row, dtype=np.int32) for row in ids]
        if segments is not None:
            segments += [np.asarray(row, dtype=np.int8) for row in found["token_type_ids"]]
    _check_lengths(tokens, fm, max_length)
    if segments and (types := 1 + max(int(row.max()) for row in segments)) > fm.segments():
        raise FedbenchError(
            f"FM {fm.name}: its tokenizer gives {types} token types to pairs, the model has {fm.segments()}; they "
            "belong to different models"
        )
    labels, pad_token = asks.targets(part.labels, tokens), int(fm.processor.pad_token_id)
    return Examples(labels, tokens, None, pad_token, segments, objective=objective)


def _check_lengths(tokens: Sequence[np.ndarray], fm: FoundationModel, max_length: int) -> None:
    if (longest := max(map(len, tokens), default=0)) > (room := fm.positions()):
        raise FedbenchError(
            f"dataset.max_length is {max_length} and a row has {longest} tokens, but FM {fm.name} has positions for "
            f"{room}; set dataset.max_length to {room} or less"
        )


def _without_padding(row: Sequence[int], tokenizer: Any) -> Sequence[int]:
    """A decoder's row without padding tokens at its end, and with at least one token.

    The token that ends texts may be that of padding; transformers' own heads read the last token before it.
    """
    end = len(row)
    while end and row[end - 1] == tokenizer.pad_token_id:
        end -= 1
    start = tokenizer.bos_token_id
    return row[:end] or [tokenizer.pad_token_id if start is None else start]


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
