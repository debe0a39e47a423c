"""Data sets of plugins, written as docs/adding-a-data-set.md says, and what is checked of any data set's rows."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _data import load_data
from helpers import WORDS, save_tiny_bert, smoke_request

from fedbench.data.rows import Part
from fedbench.data.sets.dataset import DataSet
from fedbench.errors import FedbenchError
from fedbench.registry import Registry
from fedbench.run.prepare import prepare
from fedbench.run.request import RunRequest
from fedbench.run.run import run
from fedbench.scenario.tables import DatasetSettings, PublicSettings

PAGE = Path(__file__).parents[2] / "docs/adding-a-data-set.md"


def blocks(language: str) -> list[str]:
    """The page's blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.S | re.M)


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """The page's data set in a known layout and its scenario, in a folder `plugins`, with rows to read."""
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    (plugins / "reviews.py").write_text(blocks("python")[0])
    (plugins / "reviews.toml").write_text(blocks("toml")[0])
    (tmp_path / "reviews").mkdir()
    for stem, count in (("train", 160), ("test", 20)):
        lines = [f"the film is {WORDS[i % 20]},{('bad', 'good')[i % 2]}" for i in range(count)]
        (tmp_path / "reviews" / f"{stem}.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    return plugins


@pytest.fixture
def tickets(tmp_path: Path) -> Path:
    """The page's data set that reads its own files, with rows to read."""
    folder = tmp_path / "tickets"
    folder.mkdir()
    for role in ("train", "test", "public"):
        lines = [{"text": f"{role} {i}", "label": ("fault", "praise")[i % 2]} for i in range(12)]
        (folder / f"{role}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "tickets.py").write_text(blocks("python")[1])
    return tmp_path / "tickets.py"


def asked(folder: Path, reviews: Path, **changes: Any) -> RunRequest:
    fm = save_tiny_bert(folder / "bert")
    return replace(
        smoke_request(folder, "fedavg-lora", "reviews-noniid", fm), plugins=(str(reviews),), workers=1, **changes
    )


def test_a_plugin_brings_a_data_set(tmp_path: Path, reviews: Path) -> None:
    registry = Registry([str(reviews)])
    assert registry.datasets["reviews"].summary == "reviews of restaurants, collected by ourselves, CC BY 4.0 (folder)"
    assert not registry.methods.keys() & {"reviews"}, "a file that brings a data set is no method"
    prepared = prepare(asked(tmp_path, reviews))
    assert (len(prepared.loaded.train), len(prepared.loaded.validation), len(prepared.loaded.test)) == (120, 40, 20)
    assert prepared.loaded.data.class_names == ("bad", "good")
    assert prepared.loaded.data.train.texts is not None
    assert any(f"{tmp_path / 'reviews' / 'test.csv'}" in note for note in prepared.notes)


def test_a_run_on_a_plugins_data_set_is_complete(tmp_path: Path, reviews: Path) -> None:
    record = run(prepare(asked(tmp_path, reviews)))
    assert record.status == "complete"
    assert record.accuracy.plug_in.rows == 20


def test_a_data_set_reads_its_own_files_and_sets_rows_aside(tmp_path: Path, tickets: Path) -> None:
    settings = DatasetSettings(name="tickets", validation=2)
    data = load_data(settings, PublicSettings(name="tickets", rows=5), tmp_path, str(tickets))
    assert (len(data.train), len(data.validation), len(data.test)) == (10, 2, 12)
    assert data.public is not None and data.public.texts is not None
    assert all(text.startswith("public") for text in data.public.texts)
    assert (len(data.public), data.public.labels.any()) == (5, np.False_)
    assert data.notes[0] == f"{tmp_path / 'tickets'}: 12 messages, 12 for the test"
    assert not data.extra_tests
    assert load_data(settings, None, tmp_path, str(tickets)).public is None


def test_a_plugins_data_set_is_a_public_corpus_of_another(tmp_path: Path, tickets: Path, reviews: Path) -> None:
    settings = DatasetSettings(name="reviews", validation=2)
    data = load_data(settings, PublicSettings(name="tickets"), tmp_path, str(reviews), str(tickets))
    assert data.public is not None and data.public.texts is not None
    assert sorted(data.public.texts) == sorted(f"public {i}" for i in range(12)), "the rows set aside, not the training"
    assert any("12 messages" in note for note in data.notes)
    other = load_data(
        DatasetSettings(name="tickets", validation=2), PublicSettings(name="reviews"), tmp_path, str(reviews),
        str(tickets),
    )  # fmt: skip
    assert other.public is not None
    assert len(other.public) == 160, "no rows are set aside, so it is the training rows"


def test_rows_that_are_not_at_hand_are_one_line(tmp_path: Path, tickets: Path, reviews: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for name, plugin in (("tickets", tickets), ("reviews", reviews)):
        for root in (None, empty):
            with pytest.raises(FedbenchError, match=f"data set {name}: not found; give --data-dir DIR .*DIR/{name}"):
                load_data(DatasetSettings(name=name), None, root, str(plugin))
    (tmp_path / "tickets" / "public.jsonl").unlink()
    with pytest.raises(FedbenchError, match=r"data set tickets: cannot be read: FileNotFoundError: .*public\.jsonl"):
        load_data(DatasetSettings(name="tickets", validation=2), None, tmp_path, str(tickets))


def test_a_data_set_that_nobody_brings_is_answered_with_how_to_add_one(tmp_path: Path, tickets: Path) -> None:
    with pytest.raises(
        FedbenchError,
        match=r"no data set 'ticket'; did you mean tickets\?; docs/adding-a-data-set.md says how .* brings tickets",
    ):
        Registry([str(tickets)]).load_dataset("ticket")


def test_a_corpus_without_classes_is_no_data_set_of_clients() -> None:
    with pytest.raises(FedbenchError, match="'mnist': has no classes, so it can only be a public corpus"):
        load_data(DatasetSettings(name="mnist"), None, None)


def test_two_data_sets_of_one_name_are_an_error(tmp_path: Path, tickets: Path) -> None:
    again = tmp_path / "again.py"
    again.write_text(tickets.read_text())
    with pytest.raises(FedbenchError, match="two plugins are called 'tickets': one of --plugin .*tickets.py, one of"):
        Registry([str(tickets), str(again)])
    again.write_text(tickets.read_text().replace('"tickets"', '"sst2"'))
    with pytest.raises(FedbenchError, match="two plugins are called 'sst2': one of fedbench, one of --plugin"):
        Registry([str(again)])
    twice = 'from fedbench.data.sets.dataset import DataSet\nA = DataSet("x", (), print)\nB = DataSet("x", (), print)\n'
    again.write_text(twice)
    with pytest.raises(FedbenchError, match="two plugins are called 'x'"):
        Registry([str(again)])


def test_another_data_set_of_the_same_name_is_read_anew_in_the_same_process(tmp_path: Path, reviews: Path) -> None:
    first = prepare(asked(tmp_path, reviews))
    other = tmp_path / "other"
    other.mkdir()
    (other / "reviews.toml").write_text(blocks("toml")[0])
    (other / "reviews.py").write_text(blocks("python")[0].replace('("bad", "good")', '("bad", "good", "fine")'))
    second = prepare(asked(tmp_path, other))
    assert first.loaded.data.class_names != second.loaded.data.class_names
    assert prepare(asked(tmp_path, reviews)).key == first.key != second.key


# ---------------------------------------------------------------- what is checked of rows

GOOD = {"train": Part(np.array([0, 1]), ["a", "b"]), "test": Part(np.array([1]), ["c"])}
GREY = np.zeros((1, 4, 4))


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"train": GOOD["train"]}, r"its source gives no 'test' rows, but \['train'\]"),
        (GOOD | {"public": GOOD["test"]}, r"gives 'public' rows; say public=True"),
        (GOOD | {"test": None}, "test: is a NoneType, expected a Part"),
        (GOOD | {"test": Part(np.array([2]), ["c"])}, "test: has the label 2, expected 0 to 1"),
        (GOOD | {"test": Part(np.array([-1]), ["c"])}, "test: has the label -1, expected 0 to 1"),
        (GOOD | {"test": Part(np.array([1.0]), ["c"])}, "test: labels are no array of whole numbers"),
        (GOOD | {"test": Part(np.array([], dtype=int), [])}, "test: holds no rows"),
        (GOOD | {"train": Part(np.array([0, 1]), ["a"])}, "train: has 2 labels and 1 rows"),
        (GOOD | {"train": Part(np.array([0]), ["a"], text_pairs=[])}, "train: has 1 labels and 0 rows"),
        (GOOD | {"train": Part(np.array([0]))}, "train: holds both texts and images, or neither"),
        (GOOD | {"train": Part(np.array([0]), ["a"], GREY)}, "train: holds both texts and images, or neither"),
        (GOOD | {"train": Part(np.array([0, 1]), ["a", None])}, "train: row 2 is no text"),
        (GOOD | {"test": Part(np.array([0]), images=GREY)}, "some of its parts are texts, others images"),
        (GOOD | {"test": Part(np.array([0]), images=GREY + 2)}, r"images are float64 \[1, 4, 4\], expected uint8"),
        (GOOD | {"test": Part(np.array([0]), images=GREY * np.nan)}, r"images are float64 \[1, 4, 4\], expected"),
        (GOOD | {"test": Part(np.array([0]), images=np.zeros((1, 4, 4), np.uint8))}, "images are uint8"),
        (GOOD | {"../up": GOOD["test"]}, "'../up' is no name"),
    ],
)
def test_rows_that_are_no_data_set_are_refused(parts: dict[str, Any], says: str) -> None:
    data_set = DataSet("mine", ("no", "yes"), lambda *_: (parts, []))
    with pytest.raises(FedbenchError, match=f"data set mine: .*{says}"):
        data_set.read(None, None)


def test_a_further_role_is_a_further_test_set_and_the_note_is_said() -> None:
    parts = GOOD | {"odd": GOOD["test"]}
    data_set = DataSet("mine", ("no", "yes"), lambda *_: (parts, ["found"]), note="take care")
    read, notes = data_set.read(None, None)
    assert [*read] == ["train", "test", "odd"]
    assert notes == ["found", "mine: take care"]
    assert read is not parts, "what a source keeps stays as it is"
