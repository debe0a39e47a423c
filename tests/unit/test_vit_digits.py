"""The embedded image model: pre-trained from its recipe, cached, and good enough to be a foundation."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedbench.foundation import load_fm


@pytest.mark.slow
def test_the_recipe_reaches_its_accuracy_and_is_cached(tmp_path: Path) -> None:
    fm = load_fm("vit-digits", 10, tmp_path)
    assert fm.provenance["held_out_accuracy"] >= 0.93
    assert fm.trained_head is not None
    [file] = (tmp_path / "fms").iterdir()
    stamp = file.stat().st_mtime_ns
    again = load_fm("vit-digits", 7, tmp_path)
    assert file.stat().st_mtime_ns == stamp
    assert again.trained_head is None, "the trained head is for ten classes only"
