"""How far a grid is, and two processes on one folder of which one is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _records import altered, make_record
from helpers import Invoke, save_tiny_bert
from test_claims import another_process

from fedbench.errors import FedbenchError
from fedbench.grid.cells import Cell
from fedbench.grid.status import expected_seconds, grid_status
from fedbench.records.record import Record
from fedbench.records.store import load_all, save
from fedbench.run.claims import claim, claimed


@dataclass
class Prepared:
    """What a cell's record would be."""

    record: Record
    fm_name: str = "minilm-l6"

    @property
    def key(self) -> str:
        return self.record.key

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"method": {"settings": self.record.method.settings}, "scenario": {"federation": {"rounds": 15}}}


@dataclass
class Readies:
    """Makes cells ready; those of `broken` seeds cannot be."""

    broken: set[int] = field(default_factory=set)

    def prepare(self, cell: Cell) -> Prepared:
        if cell.seed in self.broken:
            raise FedbenchError("no data")
        return Prepared(make_record(cell.method, cell.seed, scenario=cell.scenario))

    def run(self, prepared: Any) -> Record:
        raise AssertionError("a status runs nothing")


def cells(n: int = 5) -> list[Cell]:
    return [Cell("fedpft", "agnews-noniid", seed) for seed in range(n)]


def taking(seconds: float, **record: Any) -> Record:
    return altered(make_record(**record), {"compute.seconds": {"local": seconds}})


def test_cells_are_done_running_failed_or_left(tmp_path: Path) -> None:
    runner = Readies(broken={4})
    save(taking(100, seed=0), tmp_path / "records")
    save(make_record(seed=2, status="failed"), tmp_path / "records")
    with another_process(tmp_path, runner.prepare(cells()[1]).key):
        found = grid_status(cells(), runner, tmp_path)
    assert [each.state for each in found] == ["done", "running", "failed", "left", "left"]
    assert [each.why for each in found] == ["", "", "ValueError: no", "", "no data"]
    assert [each.seconds for each in found] == [0.0, 100.0, 100.0, 100.0, 100.0]
    assert [each.state for each in grid_status(cells(), runner, tmp_path)][1] == "left", "its process has ended"


def test_a_cell_that_failed_before_its_key_was_known_has_failed(tmp_path: Path) -> None:
    cell = cells(1)[0]
    save(altered(make_record(status="failed"), {"identity.key": cell.key}), tmp_path / "records")
    for runner in (Readies(), Readies(broken={0})):
        assert [each.state for each in grid_status([cell], runner, tmp_path)] == ["failed"]


def test_a_folder_that_is_not_there_yet_has_everything_left_and_no_record_to_go_by(tmp_path: Path) -> None:
    found = grid_status(cells(2), Readies(), tmp_path / "none")
    assert [(each.state, each.seconds) for each in found] == [("left", None)] * 2
    assert not (tmp_path / "none").exists(), "a look leaves nothing behind"


def test_the_time_is_that_of_runs_with_these_settings_else_of_runs_like_it() -> None:
    cell, prepared = cells(1)[0], Readies().prepare(cells(1)[0])
    other = taking(10, settings={"lr": 1.0})
    elsewhere = taking(10**6, scenario="sst2-iid"), taking(10**6, fm="bert-base"), taking(10**6, method="fedot")
    assert expected_seconds(cell, prepared, [*elsewhere]) is None
    assert expected_seconds(cell, prepared, [other, *elsewhere]) == 10
    assert expected_seconds(cell, prepared, [other, taking(40, seed=1), taking(60, seed=2), *elsewhere]) == 50


def test_looking_at_a_claim_does_not_take_it(tmp_path: Path) -> None:
    key = "a" * 64
    assert not claimed(tmp_path, key)
    with claim(tmp_path, key):
        assert claimed(tmp_path, key)
    assert not claimed(tmp_path, key)
    with claim(tmp_path, key):
        pass


WORK = """
import sys, time
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from _records import make_record
from fedbench.grid import cells
from fedbench.records.store import save
root, name = Path(sys.argv[1]) / "records", sys.argv[1]
cells.WAIT = 0.05
log = open(Path(sys.argv[1]) / "log", "a", buffering=1)

class Prepared:
    identity, fm_name = {}, "minilm-l6"
    def __init__(self, cell):
        self.record = make_record(cell.method, cell.seed, scenario=cell.scenario)
        self.key = self.record.key

class Runner:
    def prepare(self, cell):
        return Prepared(cell)
    def run(self, prepared):
        import os
        seed = prepared.record.identity.seed
        log.write(f"{os.getpid()} begins {seed}\\n")
        time.sleep(0.3)
        save(prepared.record, root)
        log.write(f"{os.getpid()} ends {seed}\\n")
        return prepared.record

asked = [cells.Cell("fedpft", "agnews-noniid", seed) for seed in range(6)]
print([outcome.status for outcome in cells.run_cells(asked, Runner(), root)])
"""


def begin(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORK, str(folder), str(Path(__file__).parents[1])]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def lines(folder: Path) -> list[tuple[int, str, int]]:
    path = folder / "log"
    text = path.read_text() if path.exists() else ""
    return [(int(pid), what, int(seed)) for pid, what, seed in map(str.split, text.splitlines())]


def wait_for(condition: Any, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert process.poll() is None or condition()
        assert time.monotonic() < until
        time.sleep(0.01)


def test_two_processes_make_each_cell_once(tmp_path: Path) -> None:
    both = [begin(tmp_path), begin(tmp_path)]
    said = [process.communicate(timeout=60)[0] for process in both]
    log = lines(tmp_path)
    assert sorted(seed for _, what, seed in log if what == "begins") == list(range(6))
    assert sorted(seed for _, what, seed in log if what == "ends") == list(range(6))
    assert sum(text.count("'complete'") for text in said) == 6
    assert sum(text.count("'skipped'") for text in said) == 6
    assert len(load_all(tmp_path / "records")) == 6


def test_a_cell_whose_process_is_killed_is_made_by_the_other_and_no_other_cell_twice(tmp_path: Path) -> None:
    first = begin(tmp_path)
    wait_for(lambda: lines(tmp_path), first)
    second = begin(tmp_path)
    wait_for(lambda: any(pid == second.pid for pid, *_ in lines(tmp_path)), second)

    def stopped_in_a_cell() -> bool:
        os.kill(first.pid, signal.SIGSTOP)
        (_, what, seed) = [line for line in lines(tmp_path) if line[0] == first.pid][-1]
        if what == "begins" and not list(tmp_path.glob(f"records/*/*/s{seed}-*.json")):
            return True
        os.kill(first.pid, signal.SIGCONT)
        return False

    wait_for(stopped_in_a_cell, first)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    said = second.communicate(timeout=60)[0]
    assert said.count("complete") + said.count("skipped") == 6
    log = lines(tmp_path)
    unfinished = {seed for pid, what, seed in log if pid == first.pid and what == "begins"} - {
        seed for pid, what, seed in log if pid == first.pid and what == "ends"
    }
    begun = [seed for _, what, seed in log if what == "begins"]
    assert sorted(begun) == sorted([*range(6), *unfinished])
    assert sorted({seed for _, what, seed in log if what == "ends"}) == list(range(6))
    assert len(load_all(tmp_path / "records")) == 6


def test_the_command_line_says_how_far_a_grid_is(tmp_path: Path, invoke: Invoke) -> None:
    def grid(*more: str) -> str:
        options = [
            "--methods", "fedavg-lora", "--fm", save_tiny_bert(tmp_path / "bert", layers=2), "--profile", "smoke",
            "--results", tmp_path / "runs", "--cache", tmp_path / "cache", "--device", "cpu",
        ]  # fmt: skip
        code, out, _ = invoke("grid", "quickstart", *options, *more)
        assert not code
        return out

    out = grid("--seeds", "2", "--status")
    assert "0 done, 0 running, 0 failed, 2 left of 2 cells; of 2 there is no record to go by" in out
    grid("--seeds", "1")
    out = grid("--seeds", "2", "--status")
    assert "1 done, 0 running, 0 failed, 1 left of 2 cells; what is not done takes about" in out
    assert len(load_all(tmp_path / "runs" / "records")) == 1
