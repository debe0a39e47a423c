"""`fedbench new scenario`: what is recognised in a user's files, and that what it writes is a scenario that runs."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers import save_tiny_bert

from fedbench.cli.app import main
from fedbench.errors import FedbenchError
from fedbench.registry import Registry
from fedbench.scenario.load import load_scenario
from fedbench.scenario.tables import Scenario
from fedbench.scenario.toml import split_names


def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["fedbench", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out + err


def proposed(source: Path, target: Path | None = None) -> Scenario:
    """The scenario that is proposed for a file or folder, its first split."""
    from fedbench.data.own.propose import propose

    path = target or source.parent / "proposed.toml"
    path.write_text(propose(source, path).text)
    return load_scenario(path, split_names(path)[0])


def reviews(count: int = 60) -> list[dict[str, Any]]:
    return [
        {
            "id": i,
            "stars": i % 3 + 1,
            "review": f"the film number {i} was {('bad', 'fine', 'good')[i % 3]} and rather long for me",
            "city": ("Bonn", "Ulm", "Kiel", "Jena")[i % 4],
            "user": f"u{i % 6}",
        }
        for i in range(count)
    ]


def test_a_file_becomes_a_scenario_that_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pd.DataFrame(reviews()).to_csv("reviews.csv", index=False)
    code, said = call(capsys, monkeypatch, "new", "scenario", "reviews.csv")
    assert code == 0
    assert 'text = "review"' in said
    assert "3 classes: 1 20, 2 20, 3 20" in said
    assert "6 clients; could also be city" in said
    assert "written: reviews.toml, with the splits natural, noniid" in said
    code, said = call(capsys, monkeypatch, "new", "scenario", "reviews.csv")
    assert (code, "is there already" in said) == (2, True)
    fm = save_tiny_bert(tmp_path / "fm")
    asked = ["run", "--method", "fedavg-lora", "--scenario", "reviews.toml", "--fm", fm, "--profile", "smoke"]
    code, said = call(capsys, monkeypatch, *asked, "--set", "public=none", "--workers", "1")
    assert code == 2, "public is a table"
    (tmp_path / "reviews.toml").write_text(re.sub(r"\[public\]\n.*\n.*\n", "", (tmp_path / "reviews.toml").read_text()))
    code, said = call(capsys, monkeypatch, *asked, "--workers", "1")
    assert code == 0, said
    assert "fedavg-lora on reviews-natural" in said
    assert "6 clients on 2 to 2 test rows of their own" in said
    code, said = call(capsys, monkeypatch, "show", "reviews.toml:natural")
    assert code == 0
    assert "Jensen-Shannon of words" in said
    assert "clients: 6 by user, of 8 to 8 training rows" in said


def test_a_scenarios_file_names_its_first_split_or_another(tmp_path: Path) -> None:
    pd.DataFrame(reviews()).to_csv(tmp_path / "reviews.csv", index=False)
    proposed(tmp_path / "reviews.csv", tmp_path / "mine.toml")
    registry, file = Registry(), str(tmp_path / "mine.toml")
    assert registry.find_scenario(file) == (tmp_path / "mine.toml", "natural")
    assert registry.find_scenario(f"{file}:noniid") == (tmp_path / "mine.toml", "noniid")
    with pytest.raises(FedbenchError, match="no split 'iid'; it has natural, noniid"):
        registry.find_scenario(f"{file}:iid")
    with pytest.raises(FedbenchError, match="no such file"):
        registry.find_scenario(str(tmp_path / "other.toml"))


def test_a_folder_with_train_and_test_is_taken_for_what_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "my"
    folder.mkdir()
    for name, part in (("train-0", reviews(30)), ("train-1", reviews(60)[30:]), ("test", reviews(80)[60:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    dataset = proposed(folder).dataset
    assert (dataset.train, dataset.test) == ("my/train-*.jsonl", "my/test.jsonl")
    (folder / "test.jsonl").write_text('{"text": "other", "label": 1}\n')
    assert proposed(folder).dataset.test == (), "its columns are others"


def test_a_table_without_header_and_bad_rows_is_proposed_as_such(tmp_path: Path) -> None:
    rows = [f'"the film number {i} was long, and then some",{i % 3}' for i in range(30)]
    (tmp_path / "films.csv").write_text("\n".join([*rows, '"no label",', '"a film, at last",2']))
    dataset = proposed(tmp_path / "films.csv").dataset
    assert (dataset.header, dataset.text, dataset.label, dataset.bad_rows) == (False, "1", "2", "drop")
    assert "1 row that has no label: films.csv: line 31" in (tmp_path / "proposed.toml").read_text().replace(
        f"{tmp_path}/", ""
    )


def test_pairs_and_images_are_recognised(tmp_path: Path) -> None:
    from PIL import Image

    rows = [{"premise": f"a man eats {i} apples", "hypothesis": f"he eats {i}", "label": i % 2} for i in range(30)]
    pd.DataFrame(rows).to_parquet(tmp_path / "pairs.parquet")
    dataset = proposed(tmp_path / "pairs.parquet").dataset
    assert (dataset.kind, dataset.segments) == ("pairs", ("premise", "hypothesis"))
    for i in range(12):
        place = tmp_path / "photos" / ("train", "test")[i % 2] / ("cat", "dog")[i // 2 % 2] / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place)
    scenario = proposed(tmp_path / "photos")
    assert (scenario.dataset.kind, scenario.dataset.train, scenario.dataset.test) == (
        "images",
        "photos/train",
        "photos/test",
    )
    assert scenario.fm == "vit-digits"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("text,label\n", "no usable rows"),
        ("a,b\n1,2\n3,4\n", "no column of texts or images was recognised"),
        ("text,label\nsome words,x\nother words,x\n", "no column of labels was recognised"),
    ],
)
def test_what_cannot_be_recognised_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, content: str, complaint: str
) -> None:
    (tmp_path / "x.csv").write_text(content)
    code, said = call(capsys, monkeypatch, "new", "scenario", tmp_path / "x.csv", "-o", tmp_path / "x.toml")
    assert code == 2
    assert complaint in said or "no column" in said
    assert not (tmp_path / "x.toml").exists()
    (tmp_path / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "hello"}]}\n')
    code, said = call(capsys, monkeypatch, "new", "scenario", tmp_path / "chat.jsonl", "-o", tmp_path / "x.toml")
    assert (code, "line 1 has no answer at its end" in said) == (2, True)
    code, said = call(capsys, monkeypatch, "new", "scenario", tmp_path / "y.csv")
    assert (code, "no such file or folder" in said) == (2, True)
