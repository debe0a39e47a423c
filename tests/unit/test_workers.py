"""Worker processes: the same results as in one process, errors that arrive, nothing left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny_fm, train_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbench.api.local import AdamW, LocalTask
from fedbench.errors import FedbenchError
from fedbench.machine.device import Execution
from fedbench.machine.memory import own_peak, peak_memory, reset_peak
from fedbench.machine.workers import can_fork, choose_workers, fork_map, team
from fedbench.measures.accuracy import evaluate
from fedbench.measures.gradient import gradients
from fedbench.methods.fedpft import zeros
from fedbench.models.cache import Frozen
from fedbench.models.parts import Parts
from fedbench.models.spec import LoraSpec
from fedbench.models.weights import get_tensors, initial_tunables, set_tensors, tunable_names
from fedbench.objectives.classification import cross_entropy
from fedbench.rng import Streams
from fedbench.training.cohort import execute_all

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not can_fork(), reason="processes cannot be forked here")


@given(st.lists(st.floats(0, 9), max_size=9), st.integers(1, 4))
@settings(deadline=None, max_examples=12)
def test_every_item_once_whatever_the_number_of_workers(costs: list[float], workers: int) -> None:
    found = dict(fork_map(lambda x: (x, x * x), costs, workers, costs))
    assert found == {i: (x, x * x) for i, x in enumerate(costs)}


def in_worker() -> bool:
    time.sleep(0.01)  # so that each process gets items
    return multiprocessing.parent_process() is not None


def test_work_is_spread_over_processes_of_one_thread_of_which_this_is_one() -> None:
    threads = torch.get_num_threads()
    found = dict(fork_map(lambda _: (in_worker(), os.getpid(), torch.get_num_threads()), range(40), 3))
    assert len({pid for _, pid, _ in found.values()}) == 3
    assert {pid for worker, pid, _ in found.values() if not worker} == {os.getpid()}
    assert {threads for *_, threads in found.values()} == {1}
    assert torch.get_num_threads() == threads
    for process in multiprocessing.active_children():
        process.join(10)
        assert process.exitcode == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_every_item_is_computed_with_one_thread_whatever_torch_would_take(workers: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert set(dict(fork_map(lambda _: torch.get_num_threads(), range(6), workers)).values()) == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("where", [True, False])
def test_an_error_arrives_wherever_it_happened(where: bool) -> None:
    def fail(item: int) -> int:
        if in_worker() is where:
            raise FedbenchError("a row is bad")
        return item

    with pytest.raises(FedbenchError, match="a row is bad") as caught:
        list(fork_map(fail, range(9), 2))
    if where:
        assert "in fail" in caught.value.__notes__[0]
    assert not multiprocessing.active_children()


def test_a_worker_that_dies_is_one_clear_line() -> None:
    def die(_: int) -> None:
        if in_worker():
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.2)  # or this process may be done before the other has begun

    with pytest.raises(FedbenchError, match="worker process died .killed, most likely for want of memory.; try"):
        list(fork_map(die, range(9), 2))


@pytest.mark.parametrize("where", [True, False])
def test_a_want_of_memory_is_one_clear_line(where: bool) -> None:
    def take(_: int) -> None:
        if in_worker() is where:
            torch.empty(1 << 50)

    with pytest.raises(FedbenchError, match="there is not enough memory; take fewer --workers"):
        list(fork_map(take, range(9), 2))


ORPHANS = """
import os, signal, time
import numpy as np
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it, and children inherit that
from fedbench.machine.workers import fork_map
def answer(i):
    os.write(1, b"%d\\n" % os.getpid())
    time.sleep(0.3)
    return np.zeros(200_000)  # longer than a pipe holds
for _ in fork_map(answer, list(range(1000)), 3): pass
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_workers_end_with_their_parent_however_that_ends(how: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", ORPHANS], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        seen: set[int] = set()
        while len(seen) < 3:
            seen.add(int(parent.stdout.readline()))
        parent.send_signal(how)
        parent.wait(10)
        deadline = time.monotonic() + 5
        while any(map(alive, seen)) and time.monotonic() < deadline:
            time.sleep(0.05)
        left = [pid for pid in seen if alive(pid)]
        for pid in left:
            os.kill(pid, signal.SIGKILL)
    assert not left


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_answers_larger_than_a_pipe_do_not_wait_for_this_process() -> None:
    """A worker goes on to the next item while this process is busy with one of its own."""

    def answer(_: int) -> tuple[bool, float, bytes]:
        if not (worker := in_worker()):
            time.sleep(0.5)
        return worker, time.monotonic(), bytes(1 << 20)

    found = dict(fork_map(answer, range(20), 2))
    first = min(at for worker, at, _ in found.values() if not worker)
    assert sum(worker and at < first for worker, at, _ in found.values()) > 1


def test_an_interrupted_round_leaves_no_process() -> None:
    work = fork_map(lambda x: x, range(100), 2)
    next(work)
    work.close()
    assert not multiprocessing.active_children()


def test_workers_cannot_be_had_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_workers(3, CPU) == 3
    assert choose_workers(None, torch.device("cuda")) == 1
    monkeypatch.setattr("fedbench.machine.workers.can_fork", lambda: False)
    assert choose_workers(None, CPU) == 1
    with pytest.raises(FedbenchError, match="--workers 3: worker processes need --device cpu on Linux"):
        choose_workers(3, CPU)


def test_training_evaluation_and_gradients_are_equal_to_the_bit(tmp_path: Path) -> None:
    model = tiny_fm().build(LoraSpec(2, 4), CPU)
    set_tensors(model, initial_tunables(model, Streams(0, "unit")))
    names = tunable_names(model)
    start, rows = get_tensors(model, names), train_rows(24)
    observers = {Parts(model).ffn_activation_path(1): zeros("non-positive", 0.0)}

    def task(k: int) -> LocalTask:
        batches = [np.arange(24)[k : k + 5], np.arange(24)[k + 5 : k + 9]][: 1 + k % 2]
        return LocalTask(Frozen("k", model), start, rows, batches, AdamW(1e-2), cross_entropy, 1.0, observers=observers)

    tasks = [task(k) for k in range(5)]
    alone, spread = (dict(execute_all(tasks, Execution(workers=n))) for n in (1, 3))
    for k in range(5):
        assert (alone[k].steps, alone[k].loss, alone[k].observed_tokens) == (
            spread[k].steps, spread[k].loss, spread[k].observed_tokens,
        )  # fmt: skip
        for mine, theirs in ((alone[k].tunables, spread[k].tunables), (alone[k].observed, spread[k].observed)):
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[n], theirs[n]) for n in mine)
    one, two = (evaluate(model, rows, 5, Execution(workers=n)) for n in (1, 2))
    assert one.loss == two.loss
    assert np.array_equal(one.predicted, two.predicted)
    one_g, two_g = (gradients(model, names, rows, Execution(workers=n), 5) for n in (1, 2))
    assert all(torch.equal(one_g[n], two_g[n]) for n in names)


def test_peak_memory_is_that_of_the_run_and_of_its_workers() -> None:
    def use(megabytes: int) -> int:
        return len(np.ones(megabytes << 17))  # each a float64

    use(400)
    before = peak_memory(CPU)
    reset_peak(CPU)
    after = peak_memory(CPU)
    assert before is not None
    assert after is not None
    assert after < before - (300 << 20), "what an earlier run took is forgotten"
    more = (after >> 20) + 100
    list(fork_map(lambda _: use(more if in_worker() else 1), range(9), 2))
    used = peak_memory(CPU)
    assert used is not None
    assert own_peak() < more << 20 < used, "it was a worker that took it"


def test_a_team_works_together_time_after_time() -> None:
    shared = torch.zeros(3, dtype=torch.float64).share_memory_()
    own: list[int] = []

    def work(member: int, x: int) -> None:
        own.append(x)
        shared[member] = sum(own) + member

    with team(work, 3) as ask:
        ask(1)
        assert shared.tolist() == [1, 2, 3]
        ask(5)
        assert shared.tolist() == [6, 7, 8], "what a member keeps stays its own"
    assert own == [1, 5]
    assert not multiprocessing.active_children()


def test_an_error_of_a_member_of_a_team_arrives_with_its_traceback() -> None:
    def work(member: int, x: int) -> None:
        if member == 1:
            raise ValueError(f"no {x}")

    with pytest.raises(ValueError, match="no 7") as caught, team(work, 2) as ask:
        ask(7)
    assert "in a worker process" in caught.value.__notes__[0]
    assert not multiprocessing.active_children()


def test_a_member_of_a_team_that_is_killed_is_one_line() -> None:
    def work(member: int, x: int) -> None:
        if member == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(FedbenchError, match="a worker process died .*--workers 1"), team(work, 2) as ask:
        ask(0)
    assert not multiprocessing.active_children()
