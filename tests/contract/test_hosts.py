"""The one loop gives one record, wherever the two sides of a run live."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from helpers import save_tiny_bert, smoke_request

from fedbench.errors import FedbenchError
from fedbench.records.differences import comparable, differences
from fedbench.records.record import Record
from fedbench.run.hosts.apart import Apart
from fedbench.run.hosts.here import Here
from fedbench.run.loop import Run
from fedbench.run.prepare import Prepared, prepare
from fedbench.run.progress import Silent
from fedbench.run.record import finish
from fedbench.run.run import run

BROKEN = """
from typing import ClassVar
from fedbench.methods.fedavg_lora import AdapterClient, LoraMethod

class Broken(LoraMethod):
    name: ClassVar[str] = "broken"

    def client(self, ctx):
        return BrokenClient(self, ctx)

class BrokenClient(AdapterClient):
    def task(self, round, inbox, data):
        raise ZeroDivisionError("a client's own fault")
"""


def prepared(folder: Path, method: str = "fedpft", plugins: tuple[str, ...] = (), **settings: str) -> Prepared:
    bert = save_tiny_bert(folder / "bert")
    chosen = {"lr": "1e-2", "rounds": "3", "evaluation.every": "2", **settings}
    request = smoke_request(folder, method, "tweets-noniid", bert, **chosen)
    return prepare(replace(request, plugins=plugins))


def same(a: Record, b: Record) -> None:
    assert comparable(a) == comparable(b), differences(a, b)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("fedpft", {"t": "1", "r": "6", "distil_steps": "2", "align_steps": "2", "federation.dropout": "0.3"}),
        ("fedavg-lora", {"evaluation.selection": "best", "federation.max_update_norm": "0.05"}),
    ],
)
def test_the_record_is_the_same_with_the_sides_apart(tmp_path: Path, method: str, settings: dict[str, str]) -> None:
    asked = prepared(tmp_path, method, **settings)
    here, apart = run(asked), run(replace(asked, host=Apart))
    same(here, apart)
    assert here.compute.peak_memory_bytes and apart.compute.peak_memory_bytes is None
    if method == "fedavg-lora":
        assert here.communication.refused, "bounds hold on both hosts"


def test_a_run_stopped_on_one_host_goes_on_on_another(tmp_path: Path) -> None:
    asked = prepared(tmp_path, t="1", r="6", distil_steps="2", align_steps="2")
    whole = run(asked)
    for first, second in ((Here, Apart), (Apart, Here)):
        stopped = Run(asked, Silent(), first)
        with stopped.host:
            stopped.loop(tmp_path / first.name, until=2)
        resumed = Run(asked, Silent(), second)
        with resumed.host:
            assert resumed.resume(tmp_path / first.name)
            resumed.loop(None)
            same(finish(resumed), whole)


def test_the_host_of_the_page_carries_payloads_through_files(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "adding-a-host.md").read_text()
    plugin = tmp_path / "spool.py"
    plugin.write_text(page.partition("```python\n")[2].partition("```")[0])
    asked = prepared(tmp_path, "fedavg-lora")
    spooled = prepare(replace(asked.request, host="spool", plugins=(str(plugin),)))
    found = run(spooled)
    assert found.provenance.host == "spool"
    same(found, run(asked))


def test_an_unknown_host_is_said(tmp_path: Path) -> None:
    with pytest.raises(FedbenchError, match="there is no host 'nowhere'; did you mean here"):
        prepare(replace(prepared(tmp_path).request, host="nowhere"))


def test_what_goes_wrong_in_a_side_s_process_is_said_here(tmp_path: Path) -> None:
    plugin = tmp_path / "broken.py"
    plugin.write_text(BROKEN)
    asked = prepared(tmp_path, "broken", (str(plugin),))
    with pytest.raises(RuntimeError, match="ZeroDivisionError: a client's own fault"):
        run(replace(asked, host=Apart))


def test_a_side_whose_process_ends_is_said(tmp_path: Path) -> None:
    this = Run(prepared(tmp_path, "fedavg-lora"), Silent(), Apart)
    assert isinstance(this.host, Apart)
    with this.host:
        this.loop(None, until=1)
        this.host._clients.process.kill()
        with pytest.raises(FedbenchError, match="the process of the clients ended at 'train_all'"):
            this.loop(None)
