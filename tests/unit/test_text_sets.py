"""Text data sets, on small files in the layouts they are really distributed in."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pytest
from _data import load_data
from helpers import WORDS, save_tiny_bert, smoke_request

from fedbench.data.formats.text import TextSource, read_text_file
from fedbench.data.rows import Part
from fedbench.data.sets.dataset import DataSet
from fedbench.data.sets.text import AGNEWS, MNLI, QNLI, QQP, SST2
from fedbench.data.sources import HubState
from fedbench.errors import FedbenchError
from fedbench.run.prepare import prepare
from fedbench.run.run import run
from fedbench.scenario.tables import DatasetSettings, PublicSettings

OFFICIAL = '"3","Wall St. Bears","Short-sellers, ""Wall Street"" are\\seeing green"\n"1","Peace","talks\\begin"\n'
TEXT_FIRST = '"Wall St. Bears Short-sellers, ""green"" again",2\n"Peace talks, begin",0\n'
GLUE = 'sentence\tlabel\nhide new secretions\t0\na "quoted film\t1\n'
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n"
LABEL_FIRST = "label\tcontent\n0\thide new secretions\n1\ta fine film\n"


def read(path: Path, data_set: DataSet) -> tuple[Part, str]:
    assert isinstance(data_set.source, TextSource)
    return read_text_file(path, data_set.source, data_set.classes)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("name", "text", "labels", "first", "layout"),
    [
        ("a.csv", OFFICIAL, [2, 0], 'Wall St. Bears Short-sellers, "Wall Street" are\\seeing green', "official CSV"),
        ("a.csv", TEXT_FIRST, [2, 0], 'Wall St. Bears Short-sellers, "green" again', "text, label from 0"),
        ("a.tsv", GLUE, [0, 1], "hide new secretions", "TSV, columns sentence and label"),
        ("a.tsv", LABEL_FIRST, [0, 1], "hide new secretions", "TSV, columns content and label"),
        ("a.tsv", LABEL_FIRST.replace("\n", "\r\n"), [0, 1], "hide new secretions", "TSV"),
        ("a.csv", "text,label\nhide it,0\na film,1\n", [0, 1], "hide it", "CSV, columns text and label"),
    ],
)
def test_known_layouts(tmp_path: Path, name: str, text: str, labels: list[int], first: str, layout: str) -> None:
    part, note = read(write(tmp_path / name, text), AGNEWS)
    assert part.labels.tolist() == labels
    assert part.texts is not None
    assert part.texts[0] == first
    assert layout in note


def test_glue_tsv_knows_no_quoting(tmp_path: Path) -> None:
    part, _ = read(write(tmp_path / "a.tsv", GLUE), SST2)
    assert part.texts == ["hide new secretions", 'a "quoted film']


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "train-00000-of-00001.parquet"
    pd.DataFrame({"idx": [0, 1], "sentence": ["x", "y"], "label": [1, 0]}).to_parquet(path)
    part, note = read(path, SST2)
    assert (part.labels.tolist(), part.texts) == ([1, 0], ["x", "y"])
    assert "sentence" in note


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.csv", "what,is,this,file\n1,2,3,4\n", "unknown layout; first line: 'what,is,this,file'"),
        ("a.tsv", "idx\tquestion\n0\twhat\n", "unknown layout; first line"),
        ("a.tsv", "label\tsentence\n0\ta\tb\n", "row 1 has 3 columns, the header has 2"),
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
        read(path, AGNEWS)
    assert str(path) in str(caught.value)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes('"café",1\n'.encode("latin-1"))
    (tmp_path / "a.parquet").write_bytes(b"not parquet")
    with pytest.raises(FedbenchError, match=r"a\.csv: is not UTF-8 at byte 4"):
        read(tmp_path / "a.csv", AGNEWS)
    with pytest.raises(FedbenchError, match=r"a\.parquet: cannot be read as parquet"):
        read(tmp_path / "a.parquet", AGNEWS)


@pytest.mark.parametrize(
    ("text", "label", "says"), [("x", 0.5, "label 0.5"), ("x", None, "label (nan|None)"), (None, 1, "no text")]
)
def test_holes_in_parquet_are_named(tmp_path: Path, text: str | None, label: float | None, says: str) -> None:
    path = tmp_path / "train.parquet"
    pd.DataFrame({"text": ["a", text], "label": [0, label]}, dtype=object).to_parquet(path)
    with pytest.raises(FedbenchError, match=f"row 2 has {says}"):
        read(path, SST2)


DOCUMENT = "a good film, " * 11_000


def test_a_cell_may_hold_a_whole_document(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    path = write(tmp_path / "train.csv", f'text,label\n"{DOCUMENT}",1\nshort,0\n')
    part, note = read(path, SST2)
    assert (part.texts, part.labels.tolist()) == ([DOCUMENT, "short"], [1, 0])
    assert note == "CSV, columns text and label"
    assert csv.field_size_limit() == limit, "the module's limit is the process's"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('text,label\na film,1\n"never closed,0\nanother,1\nthe last,0\n', 3),
        ('text,label\na film,1\n\n"two\nlines",0\n"quoted" and not,1\n', 6),
        ('"a film",1\n"stray,0\n"another",1\n', 2),
        ('"3","Bears","short"\n"1","Peace","talks\n', 2),
    ],
)
def test_marks_that_leave_open_where_a_cell_ends_are_an_error(tmp_path: Path, text: str, line: int) -> None:
    """A mark that is never closed would swallow the rest of the file as one text."""
    path = write(tmp_path / "train.csv", text)
    with pytest.raises(
        FedbenchError, match=rf"train\.csv: the row that begins in line {line} has a stray quotation mark"
    ):
        read(path, AGNEWS)


def test_marks_within_a_cell_are_text(tmp_path: Path) -> None:
    part, note = read(write(tmp_path / "train.csv", 'text,label\na 12" disc,1\nb,0\n'), SST2)
    assert part.texts == ['a 12" disc', "b"]
    assert "span" not in note


@pytest.mark.parametrize("text", ['text,label\n"two\nlines",0\na,1\n', '"two\r\nlines",0\r\na,1\r\n'])
def test_rows_of_several_lines_are_said(tmp_path: Path, text: str) -> None:
    part, note = read(write(tmp_path / "train.csv", text), SST2)
    assert part.texts == ["two\nlines", "a"]
    assert "1 rows span several lines" in note


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", "text,label\nx,1\n".encode("utf-16"), "is UTF-16 or UTF-32; save it as UTF-8"),
        ("a.tsv", "text\tlabel\nx\t1\n".encode("utf-32"), "is UTF-16 or UTF-32; save it as UTF-8"),
        ("a.csv", "text,label\nx,1\n".encode("utf-16-le"), "line 1 holds a NUL byte, so it is UTF-16 or damaged"),
        ("a.tsv", b"text\tlabel\na\t1\nb\0c\t0\n", "line 3 holds a NUL byte, so it is UTF-16 or damaged"),
        (
            "a.csv",
            gzip.compress(b"text,label\nx,1\n", mtime=0),
            "is not UTF-8 at byte 1; it is packed with gzip; unpack it",
        ),
        ("a.csv", LFS, "is no table; it is a pointer of git-lfs; run git lfs pull"),
        ("a.parquet", LFS, "cannot be read as parquet: .*; it is a pointer of git-lfs; run git lfs pull"),
        ("a.csv", b"<html><body>Sign in</body></html>", "is no table; it is a web page; fetch the file itself"),
        ("a.parquet", b"", "cannot be read as parquet: .*; fetch it again"),
        ("a.csv", b"\xef\xbb\xbf", "is empty"),
        ("a.csv", b"text,label\n", "holds no rows"),
        ("a.tsv", b"text\tlabel\na\t1\nb", "row 2 has 1 columns, the header has 2"),
        ("a.tsv", b"text\tlabel\na\t1\nb\t", "row 2 has label '', expected a whole number"),
        ("a.csv", b"text,label\na,1,,\n", "row 1 has 4 columns, the header has 2"),
        ("a.csv", b"text,label\na,1\n,\n", "row 2 has label '', expected a whole number"),
        ("a.csv", b"text,label,Text\na,1,b\n", "has 2 columns called 'text'; keep one of them"),
        ("a.tsv", b"text\tlabel\tlabel\na\t1\t0\n", "has 2 columns called 'label'; keep one of them"),
        ("a.csv", b"text,label\na,1\nb," + b"9" * 30 + b"\n", "row 2 has label '9{30}', expected 0 to 1"),
        ("a.csv", b"text,label\na,1\nb,inf\n", "row 2 has label 'inf', expected a whole number or one of negative"),
        ("a.csv", b"text,label\na,1\nb,True\n", "row 2 has label 'True', expected a whole number"),
    ],
)
def test_files_that_are_not_what_they_seem_are_named(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FedbenchError, match=rf"{name.replace('.', '[.]')}: {says}") as caught:
        read(tmp_path / name, SST2)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_folder_called_like_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "sst2" / "train.csv").mkdir(parents=True)
    with pytest.raises(FedbenchError, match=r"train\.csv: cannot be read: Is a directory"):
        load_data(DatasetSettings(name="sst2"), None, tmp_path)


def test_further_columns_may_be_called_alike(tmp_path: Path) -> None:
    path = write(tmp_path / "train.csv", "text,label,,\na,1,x,\nb,0,,\n")
    assert read(path, SST2)[0].texts == ["a", "b"]


def test_labels_that_pandas_wrote_beside_holes_are_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "train.csv", "text,label\na,1.0\nb,0.0\n")
    assert read(path, SST2)[0].labels.tolist() == [1, 0]


@pytest.mark.parametrize("compression", ["snappy", "gzip", "zstd"])
@pytest.mark.parametrize("labels", [[1, 0], [1.0, 0.0], ["positive", "Negative"], ["1", "0"]])
def test_parquet_of_any_types_holds_the_same(
    tmp_path: Path, labels: list[object], compression: Literal["snappy", "gzip", "zstd"]
) -> None:
    path = tmp_path / "train.parquet"
    table = pd.DataFrame({"sentence": pd.Categorical(["x", "y"]), "label": pd.Categorical(labels)})
    table.to_parquet(path, compression=compression)
    plain = tmp_path / "plain.parquet"
    pd.DataFrame({"sentence": ["x", "y"], "label": labels}).to_parquet(plain)
    for file in (path, plain):
        part, _ = read(file, SST2)
        assert (part.texts, part.labels.tolist()) == (["x", "y"], [1, 0])


@pytest.mark.parametrize(
    ("texts", "labels", "says"),
    [
        ([b"x", b"y"], [0, 1], "row 1 has no text, but b'x'; save the column as text"),
        ([["x"], ["y"]], [0, 1], "row 1 has no text, but array.*; fill or remove it"),
        ([{"a": "x" * 999}] * 2, [0, 1], "row 1 has no text, but .*; fill or remove it"),
        (["x", "y"], [True, False], "row 1 has label True, expected a whole number or one of negative, positive"),
        (["x", "y"], [[0], [1]], "row 1 has label array"),
        (["x", "y"], [b"0", b"1"], "row 1 has label b'0', expected a whole number"),
        (["x", "y"], [0.0, float("nan")], "row 2 has label nan, expected a whole number"),
        (["x", "y"], [0.0, float("inf")], "row 2 has label inf, expected a whole number"),
        ([], [], "holds no rows"),
    ],
)
def test_parquet_of_other_types_is_named(tmp_path: Path, texts: list[Any], labels: list[Any], says: str) -> None:
    path = tmp_path / "train.parquet"
    pd.DataFrame({"sentence": texts, "label": labels}).to_parquet(path)
    with pytest.raises(FedbenchError, match=rf"train\.parquet: {says}") as caught:
        read(path, SST2)
    assert len(str(caught.value)) < 300


def test_what_a_folder_holds_instead_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "sst2"
    (folder / "old").mkdir(parents=True)
    write(folder / "train.csv.gz", "")
    with pytest.raises(FedbenchError, match=r"no train file for sst2; .*, but the folder holds old/, train\.csv\.gz$"):
        load_data(DatasetSettings(name="sst2"), None, tmp_path)


@pytest.mark.parametrize(
    ("shards", "says"),
    [
        (["00000-of-00002", "00000-of-00002-0a1b"], "the shards of train are not 0 to 1; fetch them again"),
        (["00000-of-00002", "00001-of-00003"], "the shards of train are of several downloads; keep those of one"),
        (["00000-of-00002", "00001-of-00002", "old"], "the shards of train are of several downloads"),
        (["00001-of-00002"], "1 of 2 shards of train; fetch the rest"),
    ],
)
def test_shards_are_those_of_one_download(tmp_path: Path, shards: list[str], says: str) -> None:
    (tmp_path / "sst2").mkdir()
    for shard in shards:
        pd.DataFrame({"text": ["a"], "label": [0]}).to_parquet(tmp_path / "sst2" / f"train-{shard}.parquet")
    with pytest.raises(FedbenchError, match=says):
        load_data(DatasetSettings(name="sst2"), None, tmp_path)


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

    def load_dataset(name: str, configuration: str | None, revision: str) -> datasets.DatasetDict:
        asked.append(revision)
        rows = datasets.Dataset.from_dict({"text": [*"abcd"], "label": [0, 1, 2, 3]})
        return datasets.DatasetDict(train=rows, test=rows)

    monkeypatch.delenv("FEDBENCH_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("fedbench.data.sources.hub_state", lambda: HubState(True, ""))
    data = load_data(DatasetSettings(name="agnews", validation=1), None, None)
    load_data(DatasetSettings(name="agnews", validation=1, revision="mine"), None, None)
    assert isinstance(AGNEWS.source, TextSource) and AGNEWS.source.hub
    assert asked == [AGNEWS.source.hub[1], "mine"]
    assert len(asked[0]) == 40, "a full commit, no branch"
    assert any(asked[0][:12] in note for note in data.notes)


@pytest.mark.parametrize(
    ("texts", "labels", "says"),
    [
        (["a", None], [0, 1], "row 2 has no text, but None"),
        (["a", "b"], [0, None], "row 2 has label None, expected a whole number"),
        (["a", "b"], [0, -1], "row 2 has label -1, expected 0 to 3"),
    ],
)
def test_holes_on_the_hub_are_named(
    monkeypatch: pytest.MonkeyPatch, texts: list[Any], labels: list[Any], says: str
) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"text": texts, "label": labels})
    splits = datasets.DatasetDict(train=rows, test=rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: splits)
    monkeypatch.setattr("fedbench.data.sources.hub_state", lambda: HubState(True, ""))
    with pytest.raises(FedbenchError, match=f"fancyzhx/ag_news/train: {says}"):
        load_data(DatasetSettings(name="agnews", validation=1), None, None)


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
    with pytest.raises(FedbenchError, match="no data set 'imdb'; known: agnews, .* docs/adding-a-data-set.md says how"):
        load_data(DatasetSettings(name="imdb"), None, None)
    with pytest.raises(FedbenchError, match="no such folder"):
        load_data(DatasetSettings(name="sst2"), None, tmp_path / "absent")
    with pytest.raises(FedbenchError, match="there is no data set 'wiki'"):
        load_data(DatasetSettings(name="digits"), PublicSettings(name="wiki"), None)


# ---------------------------------------------------------------- pairs of sentences

QNLI_FILE = (
    "index\tquestion\tsentence\tlabel\n"
    '0\tWhen did "it start?\tIt began in 1950.\tentailment\n'
    "1\tWho won?\tNobody knows.\tnot_entailment\n"
)
QQP_FILE = (
    "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
    "1\t11\t12\tHow old is he?\tWhat is his age?\t1\n"
    "2\t13\t14\tWhat is the time\n"
    "3\t15\t16\tIs it far?\tIs it near?\t0\n"
)
MNLI_HEAD = "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse "


def mnli(annotators: int, rows: list[tuple[str, str, str]]) -> str:
    """MNLI's TSV as GLUE ships it: eight columns before the sentences, one label an annotator, then the gold label."""
    head = (MNLI_HEAD + "sentence1 sentence2").split() + [f"label{i + 1}" for i in range(annotators)] + ["gold_label"]
    lines = [
        [str(i), "7", "7n", "travel", "( a )", "( b )", "(ROOT a)", "(ROOT b)", a, b, *[gold] * annotators, gold]
        for i, (a, b, gold) in enumerate(rows)
    ]
    return "".join("\t".join(line) + "\n" for line in [head, *lines])


def test_qnli_as_glue_ships_it(tmp_path: Path) -> None:
    part, note = read(write(tmp_path / "train.tsv", QNLI_FILE), QNLI)
    assert part.labels.tolist() == [0, 1]
    assert part.texts == ['When did "it start?', "Who won?"]
    assert part.text_pairs == ["It began in 1950.", "Nobody knows."]
    assert note == "TSV, columns question, sentence and label"


def test_qqp_leaves_out_the_few_broken_rows_of_the_official_file(tmp_path: Path) -> None:
    part, note = read(write(tmp_path / "train.tsv", QQP_FILE), QQP)
    assert part.labels.tolist() == [1, 0]
    assert part.texts == ["How old is he?", "Is it far?"]
    assert "1 broken rows left out" in note
    write(tmp_path / "train.tsv", QQP_FILE + "4\tx\n" * 3)
    with pytest.raises(FedbenchError, match="row 2 has 4 columns, the header has 6"):
        read(tmp_path / "train.tsv", QQP)


def test_a_row_with_columns_missing_is_an_error_elsewhere(tmp_path: Path) -> None:
    path = write(tmp_path / "train.tsv", QNLI_FILE + "2\tWho?\n")
    with pytest.raises(FedbenchError, match="row 3 has 2 columns, the header has 4"):
        read(path, QNLI)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (QNLI_FILE.replace("\tsentence", "\tanswer", 1), "expected a header with label and question and sentence"),
        (
            QNLI_FILE.replace("not_entailment", "-"),
            "row 2 has label .-., expected a whole number or one of entail",
        ),
        (QNLI_FILE.replace("not_entailment", "2"), "row 2 has label '2', expected 0 to 1"),
    ],
)
def test_bad_pairs_are_named(tmp_path: Path, text: str, says: str) -> None:
    path = write(tmp_path / "train.tsv", text)
    with pytest.raises(FedbenchError, match=says):
        read(path, QNLI)


def mnli_folder(root: Path, n: int = 12) -> DatasetSettings:
    golds = ["entailment", "neutral", "contradiction"]
    train = [(f"premise {i}", f"hypothesis {i}", golds[i % 3]) for i in range(n)]
    write(root / "MNLI" / "train.tsv", mnli(1, train))
    write(root / "MNLI" / "dev_matched.tsv", mnli(5, [("m", f"m{i}", golds[i]) for i in range(3)]))
    write(root / "MNLI" / "dev_mismatched.tsv", mnli(5, [("mm", f"mm{i}", golds[2 - i]) for i in range(2)]))
    return DatasetSettings(name="mnli", validation=3)


def test_mnli_has_two_named_test_sets(tmp_path: Path) -> None:
    data = load_data(mnli_folder(tmp_path), None, tmp_path)
    assert (len(data.train), len(data.validation), len(data.test)) == (9, 3, 3)
    assert data.test.text_pairs == ["m0", "m1", "m2"]
    assert (data.test_name, [*data.extra_tests]) == ("matched", ["mismatched"])
    assert data.extra_tests["mismatched"].labels.tolist() == [2, 1]
    said = "\n".join(data.notes)
    assert "matched: " in said and "dev_mismatched.tsv" in said
    assert "validation file is the test set" in said
    assert "3 matched test, 2 mismatched test rows" in said
    capped = load_data(DatasetSettings(name="mnli", validation=3, test_rows=1), None, tmp_path)
    assert [len(capped.test), len(capped.extra_tests["mismatched"])] == [1, 1]
    assert capped.content_hash != data.content_hash
    (tmp_path / "MNLI" / "dev_mismatched.tsv").unlink()
    with pytest.raises(FedbenchError, match="no mismatched file for mnli; expected validation_mismatched or dev_mis"):
        load_data(DatasetSettings(name="mnli", validation=3), None, tmp_path)


def test_every_part_enters_the_hash(tmp_path: Path) -> None:
    settings = mnli_folder(tmp_path)
    before = load_data(settings, None, tmp_path).content_hash
    path = tmp_path / "MNLI" / "dev_mismatched.tsv"
    path.write_text(path.read_text().replace("mm1", "mm9"))
    assert load_data(settings, None, tmp_path).content_hash != before


def test_parquet_of_the_hub_holds_the_same_rows_as_tsv(tmp_path: Path) -> None:
    settings = mnli_folder(tmp_path / "tsv")
    from_tsv = load_data(settings, None, tmp_path / "tsv")
    folder = tmp_path / "hub" / "mnli"
    folder.mkdir(parents=True)
    for stem, split in (("train", "train"), ("dev_matched", "validation_matched")):
        part, _ = read(tmp_path / "tsv" / "MNLI" / f"{stem}.tsv", MNLI)
        table = pd.DataFrame({"premise": part.texts, "hypothesis": part.text_pairs, "label": part.labels})
        shards = [table[:2], table[2:]]
        for i, shard in enumerate(shards):
            shard.to_parquet(folder / f"{split}-0000{i}-of-00002.parquet")
    part, _ = read(tmp_path / "tsv" / "MNLI" / "dev_mismatched.tsv", MNLI)
    table = pd.DataFrame({"premise": part.texts, "hypothesis": part.text_pairs, "label": part.labels})
    table.to_parquet(folder / "validation_mismatched-00000-of-00001.parquet")
    assert load_data(settings, None, tmp_path / "hub").content_hash == from_tsv.content_hash
    (folder / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(FedbenchError, match="1 of 2 shards of train; fetch the rest"):
        load_data(settings, None, tmp_path / "hub")


def test_pairs_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = datasets.Dataset.from_dict(
        {"question1": [*"abcd"], "question2": [*"efgh"], "label": [0, 1, 0, 1], "idx": [0, 1, 2, 3]}
    )
    splits = datasets.DatasetDict(train=rows, validation=rows, test=rows)
    monkeypatch.delenv("FEDBENCH_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: splits)
    monkeypatch.setattr("fedbench.data.sources.hub_state", lambda: HubState(True, ""))
    data = load_data(DatasetSettings(name="qqp", validation=1), None, None)
    assert data.test.text_pairs == [*"efgh"]
    for split in splits.values():
        address = f"hf://datasets/nyu-mll/glue@{'ab' * 20}/qqp/train.parquet"
        split.info.download_checksums = {address: {"num_bytes": 1, "checksum": None}}
    data = load_data(DatasetSettings(name="qqp", validation=1, revision="main"), None, None)
    assert any("at revision abababababab (main)" in note for note in data.notes), "a branch is resolved to its commit"
    splits["validation"] = rows.remove_columns("question2")
    with pytest.raises(FedbenchError, match="no split validation with is_duplicate or label and question1"):
        load_data(DatasetSettings(name="qqp", validation=1), None, None)


def test_another_data_set_can_be_the_public_corpus(tmp_path: Path) -> None:
    settings = agnews(tmp_path)
    mnli_folder(tmp_path)
    data = load_data(settings, PublicSettings(name="mnli", rows=5), tmp_path)
    assert data.public is not None
    assert (len(data.public), data.public.text_pairs is None, data.public.labels.any()) == (5, False, False)
    with pytest.raises(FedbenchError, match="'agnews': is the clients' own data set, which sets no rows aside"):
        load_data(settings, PublicSettings(name="agnews"), tmp_path)


@pytest.mark.parametrize("method", ["fedpft", "head-only"])
def test_both_test_sets_reach_the_record(tmp_path: Path, method: str) -> None:
    mnli_folder(tmp_path, 100)
    asked = smoke_request(tmp_path, method, "mnli-dir5", save_tiny_bert(tmp_path / "bert"))
    prepared = prepare(asked)
    assert prepared.loaded.train.segments is not None, "BERT is told which segment is which"
    accuracy = run(prepared).accuracy
    assert (accuracy.test_name, accuracy.plug_in.rows) == ("matched", 3)
    assert [*accuracy.extra_tests] == ["mismatched"]
    scores = accuracy.extra_tests["mismatched"]
    assert scores.plug_in.rows == 2
    assert scores.plug_in.accuracy in (0, 0.5, 1)
    assert (scores.proxy is None) == (method == "head-only")


def official(root: Path, name: str) -> None:
    """100 training and 8 test rows, as the set's authors or GLUE distribute it."""
    for split, n in (("train", 100), ("test" if name == "agnews" else "dev", 8)):
        words = [f"{WORDS[i % len(WORDS)]} {WORDS[(3 * i) % len(WORDS)]}" for i in range(n)]
        if name == "agnews":
            text = "".join(f'"{i % 4 + 1}","{w}","the {w}"\n' for i, w in enumerate(words))
            write(root / "ag_news_csv" / f"{split}.csv", text)
            continue
        head, row, labels = {
            "sst2": ("sentence\tlabel", "{w}\t{y}", ("0", "1")),
            "qnli": ("index\tquestion\tsentence\tlabel", "{i}\t{w}?\t{w}\t{y}", ("entailment", "not_entailment")),
            "qqp": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "{i}\t1\t2\t{w}?\tis {w}?\t{y}", ("0", "1")),
        }[name]
        lines = [row.format(i=i, w=w, y=labels[i % 2]) for i, w in enumerate(words)]
        write(root / {"sst2": "SST-2", "qnli": "QNLI", "qqp": "QQP"}[name] / f"{split}.tsv", "\n".join([head, *lines]))


@pytest.mark.parametrize(
    ("name", "scenario"),
    [("sst2", "sst2-paper-iid"), ("agnews", "agnews-noniid"), ("qnli", "qnli-dir1"), ("qqp", "qqp-dir10")],
)
def test_a_run_from_official_files(tmp_path: Path, name: str, scenario: str) -> None:
    official(tmp_path, name)
    prepared = prepare(smoke_request(tmp_path, "fedpft", scenario, save_tiny_bert(tmp_path / "bert")))
    assert (prepared.loaded.train.segments is not None) == (name in ("qnli", "qqp"))
    record = run(prepared)
    assert (record.status, record.accuracy.plug_in.rows) == ("complete", 8)
    assert sum(record.partition.sizes) == 60, "40 of the 100 rows are for validation"
    assert record.gradient_error is not None
