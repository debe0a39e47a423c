"""Methods written as plugins, by the page on adding one: short, and the same as the built-in ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from helpers import save_tiny_bert, smoke_request

from fedbench.run.prepare import prepare
from fedbench.run.run import run

PLUGINS = Path(__file__).parents[1] / "plugins"


@pytest.fixture(scope="module")
def fm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_bert(tmp_path_factory.mktemp("fm") / "bert")


@pytest.mark.parametrize("name", ["ffa-lora", "fedadam", "scaffold", "bitfit"])
def test_a_plugin_of_at_most_forty_lines_does_what_the_built_in_method_does(
    name: str, fm: Path, tmp_path: Path
) -> None:
    mine = f"my-{name.removesuffix('-lora')}"
    path = PLUGINS / f"{mine.replace('-', '_')}.py"
    assert len([line for line in path.read_text().splitlines() if line.strip()]) <= 40
    request = smoke_request(tmp_path, name, "tweets-noniid", fm, lr="0.02")
    theirs = run(prepare(request))
    ours = run(prepare(replace(request, method=mine, plugins=(str(path),))))
    assert [r.loss for r in ours.rounds] == pytest.approx([r.loss for r in theirs.rounds], rel=1e-5)
    assert ours.communication == theirs.communication
    assert ours.exposure == theirs.exposure
