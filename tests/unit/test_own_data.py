"""Rows of a user's own: every kind of file, what is recognised in it, and what is said of rows that cannot be used."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers import save_tiny_bert, smoke_request

from fedbench.data.load import load_data
from fedbench.data.own.source import own_data_set
from fedbench.data.rows import RawData
from fedbench.data.sources import HubState
from fedbench.errors import FedbenchError
from fedbench.run.prepare import prepare
from fedbench.run.run import run
from fedbench.scenario.load import load_scenario
from fedbench.scenario.tables import DatasetSettings, SplitSettings

IID = SplitSettings(kind="iid", clients=2)


def read(folder: Path, *, split: SplitSettings = IID, **settings: Any) -> RawData:
    """What a run reads for these settings of a scenario in `folder`."""
    asked = DatasetSettings(**{"kind": "text", "train": "train.*", "validation": 2, **settings})
    found = own_data_set(asked, split, folder)
    return load_data(found, None, asked, None, None, split if split.kind == "natural" else None)


def films(count: int = 20) -> list[dict[str, Any]]:
    """Rows with text, label and author."""
    return [{"text": f"film number {i}", "label": ("good", "bad")[i % 2], "author": f"a{i % 4}"} for i in range(count)]


def write_csv(path: Path, rows: list[dict[str, Any]], encoding: str = "utf-8", sep: str = ",") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(path, index=False, encoding=encoding, sep=sep)


def texts(data: RawData) -> list[str]:
    """All texts that were read, sorted."""
    return sorted(text for part in (data.train, data.validation, data.test) for text in part.texts or ())


def notes(data: RawData) -> str:
    return "\n".join(data.notes)


ALL = sorted(row["text"] for row in films())


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    rows = films()
    frame = pd.DataFrame(rows)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    write_csv(tmp_path / "csv/train.csv", rows)
    write_csv(tmp_path / "semicolons/train.csv", rows, sep=";")
    write_csv(tmp_path / "tsv/train.tsv", rows, sep="\t")
    for name in ("jsonl", "json", "records", "columns", "gz", "zst", "parquet"):
        (tmp_path / name).mkdir()
    (tmp_path / "jsonl/train.jsonl").write_text(lines)
    (tmp_path / "json/train.json").write_text(json.dumps(rows))
    (tmp_path / "records/train.json").write_text(json.dumps({"version": 1, "data": rows}))
    frame.to_json(tmp_path / "columns/train.json")
    with gzip.open(tmp_path / "gz/train.csv.gz", "wt") as file:
        file.write(frame.to_csv(index=False))
    import pyarrow as pa

    with pa.OSFile(str(tmp_path / "zst/train.jsonl.zst"), "wb") as raw, pa.CompressedOutputStream(raw, "zstd") as out:
        out.write(lines.encode())
    frame.to_parquet(tmp_path / "parquet/train.parquet")
    found = {folder.name: read(folder) for folder in sorted(tmp_path.iterdir())}
    assert {name for name, data in found.items() if texts(data) != ALL} == set()
    assert len({data.content_hash for data in found.values()}) == 1, "the content decides, not how it is packed"
    assert "train.csv.gz (CSV), 20 rows" in notes(found["gz"])
    assert "train.csv (CSV with semicolons), 20 rows" in notes(found["semicolons"])
    assert "labels: 2 names, bad, good" in notes(found["csv"])


def test_folders_of_save_to_disk_are_read_with_the_names_of_their_classes(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["yes", "no", "never"]))
    rows = {"text": ["a b", "c d", "e f", "g h"], "label": [0, 1, 0, 2]}
    whole = datasets.Dataset.from_dict(rows, features=features)
    test = datasets.Dataset.from_dict({"text": ["z"], "label": [0]}, features=features)
    datasets.DatasetDict(train=whole, test=test).save_to_disk(tmp_path / "d")
    data = read(tmp_path, train="d/train", test="d/test", validation=1)
    assert data.class_names == ("yes", "no", "never")
    assert (len(data.train), len(data.test), data.test.labels.tolist()) == (3, 1, [0])
    with pytest.raises(FedbenchError, match="name their folders, d/train, d/test"):
        read(tmp_path, train="d")
    whole.to_parquet(tmp_path / "train.parquet")
    assert read(tmp_path, validation=1).class_names == ("yes", "no", "never"), "the hub's parquet says them too"


def test_a_data_set_of_the_hub_is_read_at_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(name: str, configuration: str | None, revision: str) -> datasets.DatasetDict:
        asked.append((name, configuration, revision))
        rows = {"text": [f"row {i}" for i in range(6)], "label": [0, 1] * 3}
        return datasets.DatasetDict(train=datasets.Dataset.from_dict(rows))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("fedbench.data.sources.hub_state", lambda: HubState(True, ""))
    data = read(tmp_path, hub="me/mine", configuration="small", revision="v1", train="train")
    assert asked == [("me/mine", "small", "v1")]
    assert "row 3" in texts(data)
    with pytest.raises(FedbenchError, match="me/mine has the splits train, not dev"):
        read(tmp_path, hub="me/mine", train="dev")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: 1 / 0)
    with pytest.raises(FedbenchError, match=r"dataset.hub me/mine: cannot be had \(ZeroDivisionError\); connect"):
        read(tmp_path, hub="me/mine", train="train")


def test_leaf_users_are_clients(tmp_path: Path) -> None:
    lines = {"ann": ["to be", "or not"], "bob": ["that is", "the question"]}
    users = {name: {"x": said, "y": ["n", "t"]} for name, said in lines.items()}
    content = {"users": [*users], "num_samples": [2, 2], "user_data": users, "hierarchies": []}
    (tmp_path / "all_data.json").write_text(json.dumps(content))
    asked = {"train": "*.json", "text": "x", "label": "y", "client": "user", "validation": 1}
    write_csv(tmp_path / "test.csv", [{"x": "aye", "y": "n", "user": "bob"}])
    data = read(tmp_path, split=SplitSettings(kind="natural"), test="test.csv", **asked)
    assert data.clients is not None
    assert data.clients.names == ("ann", "bob")
    assert data.clients.test.tolist() == [1]
    assert "LEAF, 2 users" in notes(data)


def test_leaf_records_and_images_are_read(tmp_path: Path) -> None:
    said = {"u1": ["good day", "good day"], "u2": ["bad day", "day"]}
    records = {user: [["1", "Mon", "q", user, text, "t"] for text in each] for user, each in said.items()}
    sent140 = {user: {"x": each, "y": [0, 4]} for user, each in records.items()}
    (tmp_path / "sent.json").write_text(json.dumps({"users": ["u1", "u2"], "user_data": sent140}))
    data = read(tmp_path, train="sent.json", text="5", label="y", validation=1)
    assert texts(data) == ["bad day", "day", "good day"], "a text that stands twice is kept once"
    assert data.class_names == ("0", "4")
    femnist = {"u1": {"x": [[i / 10] * 16 for i in range(5)], "y": [0, 1, 2, 0, 1]}}
    (tmp_path / "femnist.json").write_text(json.dumps({"users": ["u1"], "user_data": femnist}))
    images = read(tmp_path, kind="images", train="femnist.json", image="x", label="y", validation=1)
    assert isinstance(images.train.images, np.ndarray)
    assert images.train.images.shape[1:] == (4, 4)


def test_images_come_from_folders_and_from_tables_of_paths(tmp_path: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    listed = []
    for i in range(12):
        place = tmp_path / "photos" / ("cat", "dog")[i % 2] / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).save(place)
        listed.append({"file": f"photos/{place.parent.name}/{i}.png", "animal": place.parent.name})
    write_csv(tmp_path / "list.csv", listed)
    folder = read(tmp_path, kind="images", train="photos")
    table = read(tmp_path, kind="images", train="list.csv", image="file", label="animal")
    assert folder.class_names == table.class_names == ("cat", "dog")
    assert len(folder.train) + len(folder.test) + len(folder.validation) == 12
    assert isinstance(folder.train.images, np.ndarray)
    assert folder.train.images.shape[1:] == (6, 6, 3)
    (tmp_path / listed[3]["file"]).unlink()
    with pytest.raises(FedbenchError, match=r"1 row that has an image that is not there: .*list.csv: line 5"):
        read(tmp_path, kind="images", train="list.csv", image="file", label="animal")


def test_columns_are_joined_or_paired_as_the_scenario_says(tmp_path: Path) -> None:
    rows = [{"title": f"t{i}", "body": f"b{i}", "label": i % 2} for i in range(10)]
    write_csv(tmp_path / "train.csv", rows)
    joined = read(tmp_path, text=["title", "body"])
    assert "t3 b3" in texts(joined)
    assert joined.class_names == ("0", "1")
    paired = read(tmp_path, kind="pairs", text=["title", "body"])
    assert paired.train.text_pairs is not None
    assert paired.train.text_pairs[0] == "b" + (paired.train.texts or [""])[0][1:]
    assert read(tmp_path, kind="pairs", text="title", text2="body").content_hash == paired.content_hash
    with pytest.raises(FedbenchError, match=r"train.csv: has no column 'titel', which .*did you mean title"):
        read(tmp_path, text="titel")


def test_a_table_without_header_has_numbers_for_columns(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("".join(f'"news; number; {i}",{i % 3}\n' for i in range(12)))
    data = read(tmp_path, header=False, text="1", label="2")
    assert "news; number; 0" in texts(data)
    assert data.class_names == ("0", "1", "2")


def test_encodings_are_recognised_and_said(tmp_path: Path) -> None:
    rows = [{"text": f"Füße und Cafés, die Nummer {i}", "label": i % 2} for i in range(8)]
    hashes = set()
    for encoding in ("utf-8", "utf-8-sig", "cp1252", "utf-16"):
        write_csv(tmp_path / "train.csv", rows, encoding)
        data = read(tmp_path)
        hashes.add(data.content_hash)
        assert (encoding == "cp1252") == ("cp1252, since it is not UTF-8 at byte" in notes(data))
        assert (encoding == "utf-16") == ("UTF-16" in notes(data))
    assert len(hashes) == 1
    both = pd.DataFrame(rows[:4]).to_csv(index=False).encode()
    both += pd.DataFrame(rows[4:]).to_csv(index=False, header=False).encode("cp1252")
    (tmp_path / "train.csv").write_bytes(both)
    mixed = read(tmp_path)
    assert {mixed.content_hash} == hashes
    assert "UTF-8, 4 of its lines cp1252" in notes(mixed)


def test_text_that_is_not_western_is_not_guessed(tmp_path: Path) -> None:
    rows = [{"text": f"новости дня {i}", "label": i % 2} for i in range(8)]
    write_csv(tmp_path / "train.csv", rows, "cp1251")
    with pytest.raises(FedbenchError, match="is not UTF-8 at byte 11, and not text in cp1252 either"):
        read(tmp_path)
    assert "новости дня 3" in texts(read(tmp_path, encoding="cp1251"))
    with pytest.raises(FedbenchError, match="Python knows no such encoding"):
        read(tmp_path, encoding="latin-99")
    with pytest.raises(FedbenchError, match=r"train.csv: is not utf-8 at byte 11; leave dataset.encoding out"):
        read(tmp_path, encoding="utf-8")


BAD = """text,label
one film,good
,good
two films,bad
three films,
four films,0.5
five,films,bad
"six
films",good
seven films,bad
"""


def test_bad_rows_are_counted_and_named_by_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(BAD)
    (tmp_path / "test.csv").write_text("text,label\nnine films,good\nten films,great\n")
    with pytest.raises(FedbenchError) as error:
        read(tmp_path, test="test.csv")
    message = str(error.value)
    assert "1 row that has no text" in message
    assert re.search(r"train.csv: line 3 has no text; .*train.csv: line 5 has no label", message)
    assert "train.csv: line 6 has a fraction for a label, 0.5" in message
    assert "train.csv: line 7 has another number of columns (3, not 2)" in message
    assert "test.csv: line 3 has an unknown label, 'great'" in message
    assert 'bad_rows = "drop"' in message
    data = read(tmp_path, test="test.csv", validation=1, bad_rows="drop")
    assert texts(data) == ["nine films", "one film", "seven films", "six\nfilms", "two films"]
    assert "left out: 1 row that has another number of columns" in notes(data)


def test_lines_are_right_below_a_cell_of_several_lines(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text('text,label\n"one\ntwo\nthree",a\n,b\n')
    with pytest.raises(FedbenchError, match="train.csv: line 5 has no text"):
        read(tmp_path)


def test_many_bad_rows_are_counted_and_the_first_are_named(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label": 1}\n' + '{"text": ""}\n' * 9 + "{\n")
    with pytest.raises(FedbenchError, match=r"9 rows that have no text.*line 2 has no text.*line 5.*; and 5 more"):
        read(tmp_path)


def test_glues_stray_marks_stay_and_spreadsheets_quotes_go(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text('text\tlabel\n"a film" of note\t0\nb "film\t1\nc film\t0\nd film\t1\n')
    assert '"a film" of note' in texts(read(tmp_path, validation=1))
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(['he said "a\tb"', "c", "d", "e"])]
    write_csv(tmp_path / "train.tsv", rows, sep="\t")
    assert 'he said "a\tb"' in texts(read(tmp_path, validation=1))


def test_labels_are_numbers_in_order_or_names(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", [{"text": f"t{i}", "label": (10, 9, 2)[i % 3]} for i in range(12)])
    assert read(tmp_path).class_names == ("2", "9", "10")
    write_csv(tmp_path / "train.csv", [{"text": f"t{i}", "label": ("Yes", "no", "yes")[i % 3]} for i in range(12)])
    data = read(tmp_path)
    assert len(data.class_names) == 2
    assert "1 that differ in capitals alone are taken for the same" in notes(data)
    write_csv(tmp_path / "train.csv", [{"text": f"t{i}", "label": i % 2} for i in range(12)])
    assert read(tmp_path, classes=["bad", "good"]).class_names == ("bad", "good")
    with pytest.raises(FedbenchError, match="has an unknown label, '1'"):
        read(tmp_path, classes=["bad"])


@pytest.mark.parametrize(
    ("labels", "complaint"),
    [([3] * 12, "has one label, '3'"), (range(60), "has 60 labels in 60 rows; is it the column of classes")],
)
def test_a_column_that_holds_no_classes_is_refused(tmp_path: Path, labels: Any, complaint: str) -> None:
    write_csv(tmp_path / "train.csv", [{"text": f"t{i}", "label": label} for i, label in enumerate(labels)])
    with pytest.raises(FedbenchError, match=re.escape(complaint)):
        read(tmp_path)


def test_without_a_test_the_same_share_of_each_client_is_held_out(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", films(40))
    data = read(tmp_path, client="author")
    again = read(tmp_path, client="author", max_length=9)
    assert data.test.texts == again.test.texts
    assert np.unique(data.test.groups["author"], return_counts=True)[1].tolist() == [2, 2, 2, 2]
    assert "test: none is given, so 8 of 40 training rows are held out, of each client its share" in notes(data)
    assert len(read(tmp_path, test_share=0.5).test) == 20
    held = {*(data.test.texts or ())}
    assert not held & {*(data.train.texts or ()), *(data.validation.texts or ())}


def test_no_row_stands_both_in_training_and_in_the_test(tmp_path: Path) -> None:
    rows = [*films(8), {"text": "Film  NUMBER 0", "label": "bad", "author": "x"}]
    write_csv(tmp_path / "train.csv", rows)
    alone = read(tmp_path)
    assert "train: 1 rows left out, copies of others, the first of which stays (1 with another label)" in notes(alone)
    write_csv(tmp_path / "test.csv", rows[:2])
    given = read(tmp_path, test="test.csv")
    assert len(given.test) == 2, "the test that is given stays whole"
    assert "train: 3 rows left out, copies of test or validation rows (1 with another label)" in notes(given)


def test_validation_rows_may_be_a_file(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", films(10))
    write_csv(tmp_path / "valid.csv", [{"text": "v1", "label": "bad"}, {"text": "v2", "label": "good"}])
    data = read(tmp_path, train="train.csv", validation="valid.csv")
    assert sorted(data.validation.texts or ()) == ["v1", "v2"]
    with pytest.raises(FedbenchError, match="train.csv is named for two of train, test and validation"):
        read(tmp_path, train="train.csv", test="train.csv")


def test_files_are_found_beside_the_scenario_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name, part in (("b", films(20)[10:]), ("a", films(20)[:10])):
        write_csv(tmp_path / "my" / f"{name}.csv", part)
    data = read(tmp_path, train="my/*.csv")
    assert "2 files from" in notes(data)
    write_csv(tmp_path / "train.csv", films())
    assert read(tmp_path).content_hash == data.content_hash
    with pytest.raises(FedbenchError, match=r"dataset.train: no file 'mine/\*.csv'"):
        read(tmp_path, train="mine/*.csv")
    with pytest.raises(FedbenchError, match=r"is a folder; name its files, such as my/\*.csv"):
        read(tmp_path, train="my")
    (tmp_path / "train.doc").write_text("x")
    with pytest.raises(FedbenchError, match="no kind of file that is known"):
        read(tmp_path, train="train.doc")


SCENARIO = """
title = "Films"
fm = "minilm-l6"
[dataset]
kind = "text"
train = "films.csv"
client = "author"
max_length = 16
validation = 4
[splits.iid]
kind = "iid"
clients = 3
[splits.natural]
kind = "natural"
unseen_clients = 1
[federation]
fraction = 0.5
rounds = 1
batch_size = 4
[evaluation]
probe_size = 4
[profiles.smoke]
federation = { max_steps = 2 }
"""


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    write_csv(tmp_path / "films.csv", films(40))
    (tmp_path / "films.toml").write_text(SCENARIO)
    return tmp_path / "films.toml"


def asked(scenario: Path, split: str = "natural", method: str = "fedavg-lora") -> Any:
    from dataclasses import replace

    fm = scenario.parent / "bert"
    request = smoke_request(scenario.parent, method, f"films-{split}", fm if fm.is_dir() else save_tiny_bert(fm))
    return replace(request, plugins=(str(scenario),), workers=1)


def test_a_csv_with_a_client_column_is_federated(scenario: Path) -> None:
    record = run(prepare(asked(scenario)))
    assert record.status == "complete"
    assert record.scenario.split is not None
    assert record.scenario.split.clients == len(record.partition.sizes or ()) == 3
    assert record.partition.by == "author"
    assert record.accuracy.extra_tests is not None
    assert [*record.accuracy.extra_tests] == ["unseen_clients"]
    assert record.accuracy.per_client is not None
    assert record.accuracy.per_client.rows == [2, 2, 2]
    assert any("labels: 2 names, bad, good" in note for note in record.provenance.notes)


def test_a_server_without_rows_knows_the_same_division(scenario: Path) -> None:
    prepared = prepare(asked(scenario))
    server = prepared.without_rows()
    assert not server.rows()
    assert server.division.partition.hash() == prepared.division.partition.hash()
    assert server.division.skew["mean_jensen_shannon"] > 0


def test_centralised_training_is_scored_on_the_same_clients(scenario: Path) -> None:
    prepared = prepare(asked(scenario, method="centralised-lora"))
    assert len(prepared.division.partition.clients) == 1
    assert prepared.held_out.test_clients is not None
    assert len(prepared.held_out.test_clients) == len(prepared.loaded.test)


def test_the_content_of_the_files_is_in_the_key_and_their_place_is_not(scenario: Path) -> None:
    key = prepare(asked(scenario, "iid")).key
    assert prepare(asked(scenario, "iid")).key == key
    (scenario.parent / "films.csv").rename(scenario.parent / "moved.csv")
    scenario.write_text(SCENARIO.replace("films.csv", "moved.csv"))
    assert prepare(asked(scenario, "iid")).key == key
    rows = films(40)
    rows[7]["text"] += "!"
    write_csv(scenario.parent / "moved.csv", rows)
    changed = prepare(asked(scenario, "iid")).key
    assert changed != key
    assert changed != prepare(asked(scenario, "natural")).key


def test_settings_of_own_data_say_nothing_of_other_data(tmp_path: Path) -> None:
    built_in = DatasetSettings(name="tweets").model_dump(mode="json")
    assert [*built_in] == ["name", "revision", "max_length", "validation", "train_rows", "test_rows"]
    split = SplitSettings(kind="iid", clients=3).model_dump(mode="json")
    assert [*split] == ["kind", "clients", "alpha", "shards_per_client", "min_size"]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (('kind = "text"', 'kind = "chat"'), 'films.toml: objective: rows of kind = "chat" need a table [objective]'),
        (('kind = "text"', 'kind = "text"\nanswer = "a"'), 'films.toml: dataset: answer is for kind = "chat"'),
        (('kind = "text"', 'kind = "text"\nchoices = "a"'), 'films.toml: dataset: choices is for kind = "choices"'),
        (('kind = "text"', ""), "films.toml: dataset.name: field required"),
        (('kind = "text"', 'name = "tweets"'), "films.toml: dataset: client is for data sets of your own"),
        (('train = "films.csv"', ""), "films.toml: dataset: a data set of your own needs train"),
        (('kind = "text"', 'kind = "pairs"'), "films.toml: dataset: pairs need two columns"),
        (('kind = "text"', 'kind = "text"\nrevision = "x"'), "revision and configuration are for a data set of"),
        (("clients = 3", ""), "films.toml: split.clients: field required"),
        (("clients = 3", 'clients = 3\nby = "author"'), 'films.toml: split: by is for kind = "natural"'),
    ],
)
def test_a_wrong_table_is_one_line_that_names_it(scenario: Path, change: tuple[str, str], complaint: str) -> None:
    scenario.write_text(SCENARIO.replace(*change))
    with pytest.raises(FedbenchError, match=re.escape(complaint)):
        load_scenario(scenario, "iid")
