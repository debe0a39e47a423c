"""Scenarios of published conversations and texts, on small files in the formats these are really distributed in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers import save_tiny

from fedbench.data.load import load_data
from fedbench.data.own.table import Table
from fedbench.data.own.tables import read_table
from fedbench.data.own.windows import pieces_of, put_together
from fedbench.data.rows import RawData
from fedbench.errors import FedbenchError
from fedbench.registry import Registry
from fedbench.run.prepare import prepare, sets_of
from fedbench.run.request import RunRequest
from fedbench.run.run import run
from fedbench.scenario.load import load_scenario

DOLLY = [
    {
        "instruction": f"What is number {i}?",
        "context": f"It is a number, {i}." * (i % 2),
        "response": f"Number {i}.",
        "category": ("closed_qa", "open_qa", "brainstorming")[i % 3],
    }
    for i in range(60)
]
ALPACA = [{"instruction": f"Add 1 to {i}", "input": "now" * (i % 2), "output": str(i + 1)} for i in range(80)]
GSM8K = [
    {"question": f"Ann has {i} apples and eats one.", "answer": f"She has {i}-1.\n#### {i - 1}"} for i in range(60)
]
SPEECH = (
    "To be, or not to be: that is the question: whether it is nobler in the mind to suffer the slings and arrows " * 3
)


def lines(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def aya(count: int) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "inputs": [f"¿Qué es {i}?" for i in range(count)],
            "targets": [f"Es {i}." for i in range(count)],
            "language": [("Spanish", "Telugu")[i % 2] for i in range(count)],
            "language_code": ["spa"] * count,
            "annotation_type": ["original-annotations"] * count,
            "user_id": [f"user{i % 7}" for i in range(count)],
        }
    )


def leaf(text: str, users: tuple[str, ...]) -> dict[str, Any]:
    """Users of LEAF's Shakespeare: windows of 80 characters, and the one after each."""
    own = {
        user: {"x": [x[i : i + 80] for i in range(len(x) - 80)], "y": [x[i + 80] for i in range(len(x) - 80)]}
        for user, x in ((user, f"{user} says {text}") for user in users)
    }
    return {
        "users": [*own],
        "num_samples": [len(data["x"]) for data in own.values()],
        "user_data": {user: {**data, "raw": ""} for user, data in own.items()},
    }


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder of data sets, as --data-dir names it."""
    lines(tmp_path / "dolly" / "databricks-dolly-15k.jsonl", DOLLY)
    (tmp_path / "alpaca").mkdir()
    (tmp_path / "alpaca" / "alpaca_data.json").write_text(json.dumps(ALPACA, indent=4))
    lines(tmp_path / "gsm8k" / "train.jsonl", GSM8K)
    lines(tmp_path / "gsm8k" / "test.jsonl", [{**row, "question": f"Now {row['question']}"} for row in GSM8K[:9]])
    (tmp_path / "aya_dataset").mkdir()
    aya(700).to_parquet(tmp_path / "aya_dataset" / "train-00000-of-00001.parquet")
    for role, text in (("train", SPEECH), ("test", "Alas, poor Yorick! " * 10)):
        (tmp_path / "shakespeare" / role).mkdir(parents=True)
        content = leaf(text, ("HAMLET", "OPHELIA"))
        (tmp_path / "shakespeare" / role / "all_data_niid_0.json").write_text(json.dumps(content))
    return tmp_path


def loaded(name: str, root: Path, validation: int = 4, **split: str) -> RawData:
    """What a run reads for a scenario that comes with the package."""
    registry = Registry()
    overrides = {"dataset.validation": str(validation), **split}
    path, wanted = registry.find_scenario(name)
    scenario = load_scenario(path, wanted, None, overrides)
    data_set, _, natural = sets_of(registry, scenario, root)
    return load_data(data_set, None, scenario.dataset, None, root, natural)


def test_dolly_has_a_client_for_each_category(files: Path) -> None:
    data = loaded("dolly-category", files)
    assert data.clients is not None and data.clients.names == ("brainstorming", "closed_qa", "open_qa")
    assert data.class_names == data.clients.names
    chats = {chat[-1][1]: chat[0][1] for chat in data.train.chats or ()}
    assert any(prompt.endswith("?\n\nIt is a number, " + answer[7:]) for answer, prompt in chats.items())
    assert len(data.train) + len(data.validation) + len(data.test) == 60
    assert loaded("dolly-noniid", files).class_names == data.class_names


def test_alpaca_has_instructions_with_and_without_input(files: Path) -> None:
    prompts = {chat[0][1] for chat in loaded("alpaca-iid", files).train.chats or ()}
    assert {"Add 1 to 2", "Add 1 to 3\n\nnow"} <= prompts


def test_gsm8k_keeps_its_test(files: Path) -> None:
    data = loaded("gsm8k-iid", files)
    assert (len(data.test), data.test.chats is not None) == (9, True)
    assert data.test.chats[0] == (("user", f"Now {GSM8K[0]['question']}"), ("assistant", GSM8K[0]["answer"]))


def test_aya_has_annotators_or_languages_for_clients(files: Path) -> None:
    data = loaded(
        "aya-annotator", files, **{"split.min_size": "50", "split.max_clients": "5", "split.unseen_clients": "2"}
    )
    assert data.clients is not None and len(data.clients.names) == 5
    assert [*data.extra_tests] == ["unseen_clients"]
    languages = loaded("aya-language", files).clients
    assert languages is not None and languages.names == ("Spanish", "Telugu")


def test_windows_of_leaf_are_put_together_by_role(files: Path) -> None:
    data = loaded("shakespeare-role", files, 1, **{"split.min_size": "1"})
    assert data.clients is not None and data.clients.names == ("HAMLET", "OPHELIA")
    assert data.train.texts is not None
    said = "".join(sorted((t for p in (data.train, data.validation) for t in p.texts or () if "HAMLET" in t), key=len))
    assert said.startswith("HAMLET says To be, or not to be") and len(said) == 320
    assert "windows put together" in "\n".join(data.notes)


def test_windows_by_hand() -> None:
    rows = [("abc", "d"), ("bcd", " "), ("cd ", "e"), ("xyz", "z"), ("xyz", "q"), ("yzq", "r")]
    x, y = ([row[i] for row in rows] for i in (0, 1))
    who = ["a", "a", "a", "a", "b", "b"]
    table = Table("f", {"x": x, "y": y, "user": who}, [f"row {i}" for i in range(6)], "LEAF")
    found = put_together(table, 100, ("user",))
    assert found.columns == {"text": ["abcd e", "xyzz", "xyzqr"], "user": ["a", "a", "b"]}
    assert found.places == ["row 0 to row 2", "row 3 to row 3", "row 4 to row 5"]
    assert [*pieces_of("ab cd efghij", 5)] == ["ab", " cd", " efgh", "ij"]
    broken = put_together(Table("f", {"x": ["abc"], "y": ["de"], "user": ["a"]}, ["row 1"], "LEAF"), 9, ("user",))
    assert broken.broken == (("row 1", "has no character that follows", ""),)


def test_lists_by_client_are_read_with_its_name(tmp_path: Path) -> None:
    rows = {"en_1": [{"instruction": "a", "response": "b"}], "fr_2": [{"instruction": "c", "response": "d"}] * 2}
    (tmp_path / "aya_38c_25k.json").write_text(json.dumps(rows))
    table = read_table(tmp_path / "aya_38c_25k.json")
    assert table.columns["user"] == ["en_1", "fr_2", "fr_2"]
    assert (table.places[2], table.about) == ("row 2 of fr_2", "JSON, 2 clients")


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("dolly-iid", r"dataset.hub databricks/databricks-dolly-15k: cannot be had .*connect to the hub, fill its "
         r"cache, or give --data-dir DIR \(or FEDBENCH_DATA\) with DIR/dolly or databricks-dolly-15k holding "
         r"databricks-dolly-15k.jsonl \(from https"),
        ("gsm8k-iid", r"with DIR/gsm8k or grade-school-math holding train.jsonl, test.jsonl \(from https"),
        ("shakespeare-role", r"data set shakespeare: not found; give --data-dir DIR .*holding train/\*.json, test"),
    ],
)  # fmt: skip
def test_missing_files_are_said_with_where_to_get_them(
    name: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FedbenchError, match=complaint) as error:
        loaded(name, tmp_path)
    assert "\n" not in str(error.value)


def test_the_hub_has_a_sets_splits_where_no_folder_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(name: str, configuration: str | None, revision: str) -> datasets.DatasetDict:
        asked.append((name, configuration, revision))
        test = datasets.Dataset.from_list([{**row, "question": f"Now {row['question']}"} for row in GSM8K[:9]])
        return datasets.DatasetDict(train=datasets.Dataset.from_list(GSM8K), test=test)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(loaded("gsm8k-iid", tmp_path).test) == 9
    assert asked == [("openai/gsm8k", "main", "main")]


def test_gsm8k_runs_and_is_scored_by_the_number(files: Path) -> None:
    settings = {
        "dataset.max_length": "56",
        "objective.new_tokens": "4",
        "dataset.validation": "4",
        "split.clients": "2",
    }
    text = (Path(prepare.__code__.co_filename).parents[2] / "scenarios" / "gsm8k.toml").read_text()
    mine = files / "gsm8k-small.toml"
    mine.write_text(
        text.replace('[public]\nname = "tweets"\nrows = 6000\n', "").replace("public = { rows = 64 }\n", "")
    )
    request = RunRequest("fedavg-lora", f"{mine}:iid", fm=str(save_tiny("llama", files / "fm")), settings=settings,
                         profile="smoke", data_dir=files, results=files / "runs", cache=files / "cache", device="cpu",
                         workers=1)  # fmt: skip
    record = run(prepare(request))
    assert record.accuracy.plug_in is not None
    assert record.accuracy.plug_in.exact_match == 0.0, "a random model knows no number"
