"""Claims: two processes on one results folder share the work, whatever becomes of one of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from _records import make_record
from helpers import save_tiny_bert, smoke_request

from fedbench.errors import ClaimedError, FedbenchError
from fedbench.grid.cells import Cell, Outcome, run_cells
from fedbench.records.record import Record
from fedbench.records.store import save
from fedbench.run.claims import claim
from fedbench.run.prepare import prepare
from fedbench.run.run import run

KEY = "a" * 64
HOLD = """
import sys, time
from pathlib import Path
from fedbench.run.claims import claim
with claim(Path(sys.argv[1]), sys.argv[2]):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_process(results: Path, key: str = KEY) -> Iterator[subprocess.Popen[str]]:
    """A process that holds a claim until its standard input is closed."""
    command = [sys.executable, "-c", HOLD, str(results), key]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_claim_excludes_other_processes_and_ends_with_kill_9(tmp_path: Path) -> None:
    with another_process(tmp_path) as process:
        with (
            pytest.raises(ClaimedError, match="another process is making the run aaaaaaaaaaaa; wait"),
            claim(tmp_path, KEY),
        ):
            pass
        with claim(tmp_path, "b" * 64):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        with claim(tmp_path, KEY):
            pass


def test_a_claim_may_be_held_twice_by_the_thread_that_has_it_and_by_no_other(tmp_path: Path) -> None:
    found: list[str] = []

    def other() -> None:
        try:
            with claim(tmp_path, KEY):
                found.append("held")
        except ClaimedError:
            found.append("refused")

    with claim(tmp_path, KEY):
        with claim(tmp_path, KEY):
            pass
        thread = Thread(target=other)
        thread.start()
        thread.join()
    assert found == ["refused"]
    other()
    assert found == ["refused", "held"]


def test_two_runs_of_one_key_do_not_mix(tmp_path: Path) -> None:
    request = smoke_request(tmp_path, "head-only", "tweets-noniid", save_tiny_bert(tmp_path / "bert"), rounds="1")
    prepared = prepare(request)
    with another_process(request.results, prepared.key), pytest.raises(ClaimedError, match=prepared.key[:12]):
        run(prepared)
    assert not (request.results / "records").exists()
    assert run(prepared).status == "complete"


@dataclass
class Made:
    """A runner that makes a record at once and counts."""

    root: Path
    made: list[int] = field(default_factory=list)

    def prepare(self, cell: Cell) -> Any:
        record = make_record(cell.method, cell.seed, scenario=cell.scenario)

        @dataclass
        class Prepared:
            key: str = record.key
            identity: Any = field(default_factory=dict)
            made: Record = record

        return Prepared()

    def run(self, prepared: Any) -> Record:
        self.made.append(prepared.made.identity.seed)
        save(prepared.made, self.root)
        return prepared.made  # type: ignore[no-any-return]


def cells() -> list[Cell]:
    return [Cell("fedpft", "agnews-noniid", seed) for seed in range(3)]


def test_a_cell_that_another_process_is_at_is_left_for_later_and_taken_as_it_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "records"
    runner, asked = Made(root), cells()
    monkeypatch.setattr("fedbench.grid.cells.WAIT", 0.05)
    key = runner.prepare(asked[0]).key
    events: list[str] = []
    with another_process(tmp_path, key) as process:

        def finish_elsewhere() -> None:
            while len(runner.made) < 2:
                time.sleep(0.01)
            save(runner.prepare(asked[0]).made, root)
            process.kill()

        thread = Thread(target=finish_elsewhere)
        thread.start()
        outcomes = run_cells(
            asked,
            runner,
            root,
            lambda i, cell: events.append(f"{i} begins"),
            lambda i, outcome: events.append(f"{i} {outcome.status}"),
            lambda i, cell: events.append(f"{i} is claimed"),
        )
        thread.join()
    assert runner.made == [1, 2], "the first cell was not made twice"
    assert [o.status for o in outcomes] == ["skipped", "complete", "complete"]
    assert [o.cell.seed for o in outcomes] == [0, 1, 2]
    assert events == [
        "0 begins", "0 is claimed", "1 begins", "1 complete", "2 begins", "2 complete", "0 begins", "0 skipped"
    ]  # fmt: skip


def test_a_cell_whose_process_was_killed_is_made_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "records"
    runner, asked = Made(root), cells()[:1]
    monkeypatch.setattr("fedbench.grid.cells.WAIT", 0.05)
    with another_process(tmp_path, runner.prepare(asked[0]).key) as process:
        Thread(target=lambda: (time.sleep(0.2), os.kill(process.pid, signal.SIGKILL))).start()
        [outcome] = run_cells(asked, runner, root)
    assert (outcome.status, runner.made) == ("complete", [0])


@pytest.mark.parametrize("place", ["below a file", "not a folder"])
def test_a_results_folder_that_cannot_be_written_is_found_before_anything_is_run(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    results = tmp_path / "file" / "runs" if place == "below a file" else tmp_path / "file"
    runner = Made(results / "records")
    with pytest.raises(FedbenchError, match=r"--results .*file.*: cannot be written to: .*; name a folder that can"):
        run_cells(cells(), runner, results / "records")
    assert runner.made == []
    request = smoke_request(tmp_path, "head-only", "tweets-noniid", tmp_path / "no-such-fm", rounds="1")
    for option in ("results", "cache"):
        with pytest.raises(FedbenchError, match=rf"--{option} .*file.*: cannot be written to"):
            prepare(type(request)(**{**vars(request), option: results}))


def test_outcomes_are_in_the_order_of_cells(tmp_path: Path) -> None:
    outcomes: list[Outcome] = run_cells(cells(), Made(tmp_path / "records"), tmp_path / "records")
    assert [(o.cell.seed, o.status) for o in outcomes] == [(0, "complete"), (1, "complete"), (2, "complete")]
