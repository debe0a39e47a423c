"""What foundation models are called: by a user, and in records."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedbench.models.zoo.names import fm_folder, fm_label, is_called, recorded_label


def test_a_folder_is_called_by_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "models" / "tiny"
    folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in (
        str(folder),
        f"{folder}/",
        "tiny",
        "./tiny",
        "../models/tiny/",
        "~/models/tiny",
        str(tmp_path / "link"),
    ):
        assert fm_label(given) == "tiny"
        assert is_called("tiny", given)
    monkeypatch.chdir(folder)
    assert fm_label(".") == "tiny"


@pytest.mark.parametrize("given", ["minilm-l6", "bert-base", "google-bert/bert-base-uncased", "nonsense"])
def test_names_and_hub_ids_are_called_as_they_are(given: str) -> None:
    assert fm_label(given) == recorded_label(given) == given


def test_of_a_path_that_is_gone_the_last_part_counts() -> None:
    assert fm_label("/gone/tiny/") == fm_label("~/gone/tiny") == recorded_label("../gone/tiny") == "tiny"
    assert is_called("/old/place/tiny", "/new/place/tiny")
    assert not is_called("/old/place/tiny", "/new/place/other")
    assert not is_called("name", "owner/name"), "a hub id is no path"


@pytest.mark.parametrize("given", ["", "~nobody-of-this-name/x", "x" * 5000, "a\0b"])
def test_what_no_folder_can_be_called_is_none(given: str) -> None:
    assert fm_folder(given) is None
    assert fm_label(given) == given or fm_label(given) == "x"
