"""Ten thousand clients against a hundred, on the same 200,000 rows: start, memory, checkpoints, record and table."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from populations import COHORT, ROUNDS, ROWS, population_request, save_population
from turns import ROOT, environment_of, spelled, taken

from fedbench.records.store import load, save
from fedbench.run.loop import Run
from fedbench.run.prepare import prepare
from fedbench.run.progress import Silent
from fedbench.run.record import finish

FEW, MANY = 100, 10_000


@dataclass(frozen=True)
class Course:
    """Of a run: seconds to its first round's end and of the rest; bytes it grew by; of checkpoints by round; record."""

    start: float
    rest: float
    grown: int
    checkpoints: list[int]
    record: Path
    loading: float


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("population")
    save_population(folder, ROWS)
    prepare(population_request(folder, FEW))  # reads and encodes the rows, which all runs of this process share
    return folder


def course(folder: Path, clients: int) -> Course:
    gc.collect()
    process, place = psutil.Process(), folder / f"checkpoint-{clients}"
    before, started = process.memory_info().rss, time.perf_counter()
    run, sizes = Run(prepare(population_request(folder, clients)), Silent()), []
    run.loop(place, until=1)
    start, again = time.perf_counter() - started, time.perf_counter()
    for round in range(2, ROUNDS + 1):
        run.loop(place, until=round)
        sizes.append(sum(path.stat().st_size for path in place.iterdir()))
    record = finish(run)
    rest, grown = time.perf_counter() - again, process.memory_info().rss - before
    assert len(run.host.clients.states()) <= COHORT * ROUNDS, "only clients that were sampled are made"
    path = save(record, folder / f"runs-{clients}" / "records")
    again = time.perf_counter()
    load(path)
    return Course(start, rest, grown, sizes, path, time.perf_counter() - again)


def test_ten_thousand_clients_run_like_a_hundred(folder: Path, say: Callable[[str], None]) -> None:
    few, many = course(folder, FEW), course(folder, MANY)
    # The last checkpoint is of the last round but one: after the last round there is the record.
    sizes = many.checkpoints[: ROUNDS - 2]
    first, last = sizes[10] - sizes[0], sizes[-1] - sizes[-11]
    say(f"start {many.start:.2f} s against {few.start:.2f}; {ROUNDS} rounds {many.rest:.1f} s against {few.rest:.1f}")
    say(f"memory grew by {many.grown / 1e6:.0f} MB against {few.grown / 1e6:.0f}")
    say(f"checkpoint {sizes[-1] / 1e3:.0f} kB; ten rounds add {first / 1e3:.0f} at first, {last / 1e3:.0f} last")
    say(f"record {many.record.stat().st_size / 1e6:.2f} MB, loaded in {many.loading:.2f} s")
    assert many.start < few.start + 10
    assert many.grown < few.grown + 100e6
    assert last < 1.5 * first
    assert many.record.stat().st_size < 5e6
    assert many.loading < 1


def test_a_table_of_ten_thousand_clients_opens_like_one_of_a_hundred(
    folder: Path, tmp_path: Path, say: Callable[[str], None]
) -> None:
    seconds = {}
    for clients in (FEW, MANY):
        results = folder / f"runs-{clients}"
        if not (results / "records").exists():
            course(folder, clients)
        command = spelled(["fedbench", "table", "--results", str(results)], ROOT)
        runs = [taken(command, environment_of(ROOT, tmp_path), tmp_path) for _ in range(4)][1:]
        seconds[clients] = min(run.processor for run in runs)
    say(f"{seconds[MANY]:.2f} s processor against {seconds[FEW]:.2f}")
    assert seconds[MANY] < seconds[FEW] + 1


@pytest.mark.parametrize("clients", [FEW, MANY])
def test_the_peak_of_a_whole_run(clients: int, folder: Path, tmp_path: Path, say: Callable[[str], None]) -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from populations import *\n"
        "from fedbench.run.prepare import prepare; from fedbench.run.run import run\n"
        "run(prepare(population_request(Path(sys.argv[2]), int(sys.argv[3]), 3)))"
    )
    here = str(Path(__file__).parent)
    command = spelled(["python", "-c", program, here, str(folder), str(clients)], ROOT)
    found = taken(command, environment_of(ROOT, tmp_path), tmp_path)
    say(f"{clients} clients, 3 rounds: {found.seconds:.1f} s, peak {found.peak / 1e6:.0f} MB")
