"""Loaders, on small files in the layouts these data sets are really distributed in."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from fedbench.data import Batch, Examples, Part, encode, load_data, read_text_file, to_pixels
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
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, text: str, says: str) -> None:
    path = write(tmp_path / name, text)
    with pytest.raises(FedbenchError, match=says) as caught:
        read_text_file(path, 4)
    assert str(path) in str(caught.value)


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
    parts = [set(p.texts or ()) for p in (data.train, data.validation, data.test, data.public) if p is not None]
    assert sum(map(len, parts)) == len(set.union(*parts)), "no tweet is in two parts, or twice in one"
    assert set(np.unique(data.train.labels)) == {0, 1, 2}
    assert data.public is not None
    assert not data.public.labels.any(), "public rows carry no labels"


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
