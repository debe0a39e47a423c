"""Worker processes on a CPU: one per core, one thread each.

Two processes with one thread each train twice as many clients as one process; two threads share the small matrix
products of one client far less well. Workers are forked for one piece of work (a round, an evaluation) and end with
it, so they see the frozen weights, the data and the tasks as they are, in shared pages: nothing is copied or sent to
them, and only results come back. Every item is computed with one thread whatever the number of workers, so that
number changes no result.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import TypeVar

import torch

from fedbench.errors import FedbenchError
from fedbench.memory import note_worker, own_peak

T = TypeVar("T")
R = TypeVar("R")


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def can_fork() -> bool:
    """Whether workers can be forked here.

    Only Linux promises that a forked process may go on computing; and where torch sees a GPU its autograd engine
    starts threads, which no fork survives.
    """
    return sys.platform == "linux" and torch.cuda.device_count() == 0


def choose_workers(asked: int | None, device: torch.device) -> int:
    """The number of workers: as asked, else one per core on a CPU that can fork, else 1 (this process itself)."""
    possible = device.type == "cpu" and can_fork()
    if asked is not None and asked > 1 and not possible:
        raise FedbenchError(
            f"--workers {asked}: worker processes need --device cpu on Linux without a visible GPU "
            "(CUDA_VISIBLE_DEVICES= hides it); leave --workers out"
        )
    return asked or (cores() if possible else 1)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute with one thread inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fork_map(
    function: Callable[[T], R], items: Sequence[T], workers: int, costs: Sequence[float] | None = None
) -> Iterator[tuple[int, R]]:
    """Yield (index, function(items[index])) as they are done, over `workers` forked processes, costliest item first.

    Results are pickled on their way back. An exception of `function` is raised here, with the worker's traceback as a
    note. In this process, in order, where there is one worker or one item. What `function` changes in memory stays in
    its worker.
    """
    if workers <= 1 or len(items) <= 1:
        for index, item in enumerate(items):
            with one_thread():
                result = function(item)
            yield index, result
        return
    weights = list(costs) if costs is not None else [1.0] * len(items)
    order = sorted(range(len(items)), key=lambda i: -weights[i])
    context = multiprocessing.get_context("fork")
    taken = context.Value("q", 0)

    def work(connection: Connection) -> None:
        # Ctrl-C reaches the whole process group; it is the parent that answers it.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        torch.set_num_threads(1)
        while True:
            with taken.get_lock():
                place, taken.value = taken.value, taken.value + 1
            if place >= len(order):
                break
            index = order[place]
            try:
                answer: tuple[int, R | None, BaseException | None] = (index, function(items[index]), None)
            except Exception as error:
                answer = (index, None, _portable(error))
            connection.send_bytes(pickle.dumps(answer, protocol=5))
        connection.send_bytes(pickle.dumps((None, own_peak(), None)))
        connection.close()

    running = {}
    processes = []
    finished = False
    try:
        for _ in range(min(workers, len(items))):
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=work, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            running[mine] = process
            processes.append(process)
        left = len(items)
        while running:
            for ready in wait(list(running)):
                assert isinstance(ready, Connection)
                try:
                    index, result, error = pickle.loads(ready.recv_bytes())
                except EOFError:
                    process = running.pop(ready)
                    if not left:
                        continue
                    process.join()
                    if process.exitcode:
                        raise FedbenchError(
                            f"a worker process died ({_cause(process.exitcode)}); try --workers 1"
                        ) from None
                    continue
                if error is not None:
                    raise error
                if index is None:
                    note_worker(result)
                    continue
                left -= 1
                yield index, result
        assert left == 0
        finished = True
    finally:
        # A worker that is done takes a while to give its memory back; multiprocessing reaps it at the next start.
        for process in () if finished else processes:
            process.kill()
            process.join()


def _portable(error: Exception) -> Exception:
    """The exception if it survives pickling, with its traceback as a note; else its text."""
    import traceback

    note = "in a worker process:\n" + "".join(traceback.format_exception(error)).rstrip()
    try:
        portable: Exception = pickle.loads(pickle.dumps(error))
    except Exception:
        portable = RuntimeError(f"{type(error).__name__}: {error}")
    portable.add_note(note)
    return portable


def _cause(exitcode: int) -> str:
    if exitcode == -signal.SIGKILL:
        return "killed, most likely for want of memory"
    return f"signal {-exitcode}" if exitcode < 0 else f"exit code {exitcode}"
