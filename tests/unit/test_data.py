"""Loaders, on small files in the layouts these data sets are really distributed in."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fedbench.data import TEXT_SETS, Batch, Examples, Part, encode, load_data, read_text_file, to_pixels, tweet_words
from fedbench.errors import FedbenchError
from fedbench.foundation import ImageProcessor
from fedbench.scenario import DatasetSettings, PublicSettings

OFFICIAL = '"3","Wall St. Bears","Short-sellers, ""Wall Street"" are\\seeing green"\n"1","Peace","talks\\begin"\n'
TEXT_FIRST = '"Wall St. Bears Short-sellers, ""green"" again",2\n"Peace talks, begin",0\n'
GLUE = 'sentence\tlabel\nhide new secretions\t0\na "quoted film\t1\n'
LABEL_FIRST = "label\tcontent\n0\thide new secretions\n1\ta fine film\n"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("name", "text", "labels", "first", "layout"),
    [
        ("a.csv", OFFICIAL, [2, 0], 'Wall St. Bears Short-sellers, "Wall Street" are\\seeing green', "official CSV"),
        ("a.csv", TEXT_FIRST, [2, 0], 'Wall St. Bears Short-sellers, "green" again', "text, label from 0"),
        ("a.tsv", GLUE, [0, 1], "hide new secretions", "TSV with header sentence, label"),
        ("a.tsv", LABEL_FIRST, [0, 1], "hide new secretions", "TSV with header label, content"),
        ("a.tsv", LABEL_FIRST.replace("\n", "\r\n"), [0, 1], "hide new secretions", "TSV"),
        ("a.csv", "text,label\nhide it,0\na film,1\n", [0, 1], "hide it", "CSV with header text, label"),
    ],
)
def test_known_layouts(tmp_path: Path, name: str, text: str, labels: list[int], first: str, layout: str) -> None:
    part, note = read_text_file(write(tmp_path / name, text), 4)
    assert part.labels.tolist() == labels
    assert part.texts is not None
    assert part.texts[0] == first
    assert layout in note


def test_glue_tsv_knows_no_quoting(tmp_path: Path) -> None:
    part, _ = read_text_file(write(tmp_path / "a.tsv", GLUE), 2)
    assert part.texts == ["hide new secretions", 'a "quoted film']


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "train-00000-of-00001.parquet"
    pd.DataFrame({"idx": [0, 1], "sentence": ["x", "y"], "label": [1, 0]}).to_parquet(path)
    part, note = read_text_file(path, 2)
    assert (part.labels.tolist(), part.texts) == ([1, 0], ["x", "y"])
    assert "sentence" in note


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.csv", "what,is,this,file\n1,2,3,4\n", "unknown layout; first line: 'what,is,this,file'"),
        ("a.tsv", "idx\tquestion\n0\twhat\n", "unknown layout; first line"),
        ("a.tsv", "label\tsentence\n0\ta\tb\n", ":2: 3 columns"),
        ("a.csv", '"9","t","d"\n', "row 1 has label '9', expected 1 to 4"),
        ("a.tsv", "label\tsentence\nx\ta\n", "row 1 has label 'x'"),
        ("a.csv", "", "is empty"),
        ("a.tsv", "\n", "is empty"),
        ("a.csv", "text,label\nhide it\n", "row 1 has 1 columns, the header has 2"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, text: str, says: str) -> None:
    path = write(tmp_path / name, text)
    with pytest.raises(FedbenchError, match=says) as caught:
        read_text_file(path, 4)
    assert str(path) in str(caught.value)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes('"café",1\n'.encode("latin-1"))
    (tmp_path / "a.parquet").write_bytes(b"not parquet")
    with pytest.raises(FedbenchError, match=r"a\.csv: is not UTF-8 at byte 4"):
        read_text_file(tmp_path / "a.csv", 4)
    with pytest.raises(FedbenchError, match=r"a\.parquet: cannot be read as parquet"):
        read_text_file(tmp_path / "a.parquet", 4)


@pytest.mark.parametrize(
    ("text", "label", "says"), [("x", 0.5, "label 0.5"), ("x", None, "label (nan|None)"), (None, 1, "no text")]
)
def test_holes_in_parquet_are_named(tmp_path: Path, text: str | None, label: float | None, says: str) -> None:
    path = tmp_path / "train.parquet"
    pd.DataFrame({"text": ["a", text], "label": [0, label]}, dtype=object).to_parquet(path)
    with pytest.raises(FedbenchError, match=f"row 2 has {says}"):
        read_text_file(path, 2)


def agnews(root: Path, train: str = "train_5k.csv") -> DatasetSettings:
    rows = "".join(f'"row number {i} of {"abcd"[i % 4]}",{i % 4}\n' for i in range(40))
    write(root / "ag_news" / train, rows)
    write(root / "ag_news" / "test.csv", OFFICIAL)
    return DatasetSettings(name="agnews", validation=8)


def test_a_folder_is_recognised_and_split_into_disjoint_parts(tmp_path: Path) -> None:
    settings = agnews(tmp_path)
    data = load_data(settings, None, tmp_path)
    assert (len(data.train), len(data.validation), len(data.test)) == (32, 8, 2)
    assert data.train.texts is not None
    assert data.validation.texts is not None
    assert len({*data.train.texts, *data.validation.texts}) == 40
    assert any("train_5k.csv" in note and "label from 0" in note for note in data.notes)
    assert load_data(settings, None, tmp_path).content_hash == data.content_hash
    capped = load_data(settings.model_copy(update={"train_rows": 10, "test_rows": 1}), None, tmp_path)
    assert (len(capped.train), len(capped.test)) == (10, 1)
    assert set(capped.train.texts or ()) <= set(data.train.texts)


def test_train_csv_wins_over_train_5k(tmp_path: Path) -> None:
    settings = agnews(tmp_path)
    write(tmp_path / "ag_news" / "train.csv", OFFICIAL * 10)
    assert len(load_data(settings, None, tmp_path).train) == 12


def test_the_folder_itself_may_be_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = agnews(tmp_path)
    monkeypatch.chdir(tmp_path / "ag_news")
    assert len(load_data(settings, None, Path(".")).train) == 32


def test_the_hub_is_asked_for_a_pinned_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[str] = []

    def load_dataset(name: str, configuration: str | None, revision: str) -> dict[str, dict[str, list[object]]]:
        asked.append(revision)
        rows: dict[str, list[object]] = {"text": [*"abcd"], "label": [0, 1, 2, 3]}
        return {"train": rows, "test": rows}

    monkeypatch.delenv("FEDBENCH_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("fedbench.data.hub_answers", lambda: True)
    data = load_data(DatasetSettings(name="agnews", validation=1), None, None)
    load_data(DatasetSettings(name="agnews", validation=1, revision="mine"), None, None)
    assert asked == [TEXT_SETS["agnews"].revision, "mine"]
    assert len(asked[0]) == 40, "a full commit, no branch"
    assert any(asked[0][:12] in note for note in data.notes)


def test_the_environment_variable_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDBENCH_DATA", str(tmp_path))
    assert len(load_data(agnews(tmp_path), None, None).train) == 32


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (lambda root: None, "three ways: connect to the hub .* cache .* --data-dir"),
        (lambda root: (root / "ag_news").mkdir(), "no train file for agnews"),
    ],
    ids=["nothing", "empty folder"],
)
def test_missing_data_is_one_line(tmp_path: Path, prepare: object, says: str) -> None:
    prepare(tmp_path)  # type: ignore[operator]
    with pytest.raises(FedbenchError, match=says) as caught:
        load_data(DatasetSettings(name="agnews"), None, tmp_path)
    assert "\n" not in str(caught.value)


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(FedbenchError, match="no such data set; known are tweets"):
        load_data(DatasetSettings(name="imdb"), None, None)
    with pytest.raises(FedbenchError, match="no such folder"):
        load_data(DatasetSettings(name="sst2"), None, tmp_path / "absent")
    with pytest.raises(FedbenchError, match="no such corpus"):
        load_data(DatasetSettings(name="digits"), PublicSettings(name="wiki"), None)


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
    fm = SimpleNamespace(name="m", family=SimpleNamespace(modality="text"), processor=processor)
    rows = encode(Part(np.array([1, 0]), ["a film", "a a a a a a"]), fm, 5)  # type: ignore[arg-type]
    assert rows.tokens is not None
    assert [t.tolist() for t in rows.tokens] == [[2, 4, 5, 3], [2, 4, 4, 4, 3]]
    assert rows.tokens[0].dtype == np.int32
    assert (rows.labels.tolist(), rows.pad_token) == ([1, 0], 0)


def test_images_are_resized_and_normalised() -> None:
    processor = ImageProcessor(size=4, mean=(0.5,), std=(0.25,), channels=3)
    pixels = to_pixels(np.ones((2, 8, 8), dtype=np.float32), processor)
    assert pixels.shape == (2, 3, 4, 4)
    assert torch.allclose(pixels, torch.full_like(pixels, 2.0))


def test_text_and_image_models_are_not_confused() -> None:
    text, image = (SimpleNamespace(name="m", family=SimpleNamespace(modality=m)) for m in ("text", "image"))
    with pytest.raises(FedbenchError, match="reads text, the data set holds images"):
        encode(Part(np.zeros(1), images=np.zeros((1, 8, 8))), text, 8)  # type: ignore[arg-type]
    with pytest.raises(FedbenchError, match="reads images, the data set holds text"):
        encode(Part(np.zeros(1), texts=["x"]), image, 8)  # type: ignore[arg-type]
