"""Worker processes on a CPU: one per core, one thread each.

Two processes with one thread each train twice as many clients as one process; two threads share the small matrix
products of one client far less well. This process is one of the workers. The others are forked for one piece of work (a
round, an evaluation) and end with it, so they see the frozen weights, the data and the tasks as they are, in shared
pages: nothing is copied or sent to them, and only results come back. They inherit the kernels compiled for this process
too. Every item is computed with one thread whatever the number of workers, so that number changes no result. However
this process ends, the workers end with it.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

import torch

from fedbench.errors import FedbenchError
from fedbench.machine.memory import note_worker, own_peak

NO_MEMORY = (
    "there is not enough memory; take fewer --workers, smaller batches (--set federation.batch_size=N, "
    "evaluation.batch_size=N) or a smaller FM"
)

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
    """Yield (index, function(items[index])) as they are done, over `workers` processes, costliest item first.

    This process is one of them, the others are forked. Results are pickled on their way back. An exception of
    `function` is raised here, with the worker's traceback as a note. In order where there is one worker or one item.
    What `function` changes in memory stays in its worker, so it must not matter to the next item.
    """

    if workers <= 1 or len(items) <= 1:
        for index, item in enumerate(items):
            with one_thread():
                result = _in_memory(function, item)
            yield index, result
        return
    weights = list(costs) if costs is not None else [1.0] * len(items)
    order = sorted(range(len(items)), key=lambda i: -weights[i])
    context = multiprocessing.get_context("fork")
    taken = context.Value("q", 0)

    def mine() -> Iterator[int]:
        """The items that fall to the process that asks."""
        while True:
            with taken.get_lock():
                place, taken.value = taken.value, taken.value + 1
            if place >= len(order):
                return
            yield order[place]

    parent = os.getpid()

    def work(connection: Connection, others: Sequence[Connection]) -> None:
        _begin(parent, others)
        for index in mine():
            try:
                answer: tuple[int, R | None, BaseException | None] = (index, _in_memory(function, items[index]), None)
            except Exception as error:
                answer = (index, None, _portable(error))
            connection.send_bytes(pickle.dumps(answer, protocol=5))
        connection.send_bytes(pickle.dumps((None, own_peak(), None)))
        connection.close()

    answers: SimpleQueue[tuple[BaseProcess, Any]] = SimpleQueue()

    def listen(process: BaseProcess, connection: Connection) -> None:
        # A worker waits until its answer is read, so somebody has to be at it while this process computes.
        answer: Any = ()
        while answer is not None and answer[:1] != (None,):
            try:
                answer = pickle.loads(connection.recv_bytes())
            except (EOFError, OSError):
                answer = None
            answers.put((process, answer))

    processes: list[BaseProcess] = []
    readers: list[Connection] = []
    listeners: list[Thread] = []
    left, running = len(items), 0
    try:
        for _ in range(min(workers, len(items)) - 1):
            receiving, sending = context.Pipe(duplex=False)
            readers.append(receiving)
            process = context.Process(target=work, args=(sending, readers), daemon=True)
            process.start()
            sending.close()
            processes.append(process)
            running += 1
            listeners.append(Thread(target=listen, args=(process, receiving), daemon=True))
        for listener in listeners:  # now that nothing is forked any more
            listener.start()
        own = mine()
        answer: Any
        while left or running:
            place = next(own, None) if answers.empty() else None
            if place is not None:
                with one_thread():
                    answer = (place, _in_memory(function, items[place]), None)
            else:
                worker, answer = answers.get()
                if answer is None:
                    worker.join()
                    raise FedbenchError(_died(worker))
            index, result, error = answer
            if error is not None:
                raise error
            if index is None:
                note_worker(result)
                running -= 1
            else:
                left -= 1
                yield index, result
    finally:
        # A worker that is done takes a while to give its memory back; multiprocessing reaps it at the next start.
        for worker in processes if left or running else ():
            worker.kill()
            worker.join()
        for listener in listeners:
            if listener.ident is not None:
                listener.join()


@contextmanager
def team(work: Callable[[int, int], None], workers: int) -> Iterator[Callable[[int], None]]:
    """Let `workers` processes work together, time after time: ask(x) has each member do work(member, x), and waits.

    This process is member 0, the others are forked on the way in and end with the block. What they are to see of each
    other has to lie in shared memory; whatever else a member changes is its own, and stays until the end. Each computes
    with one thread. An exception of `work` is raised by `ask`, with the worker's traceback as a note.
    """
    parent, context = os.getpid(), multiprocessing.get_context("fork")
    members: list[tuple[BaseProcess, Connection]] = []

    def serve(member: int, connection: Connection, others: Sequence[Connection]) -> None:
        _begin(parent, others)
        while (x := connection.recv()) is not None:
            error: BaseException | None = None
            try:
                _in_memory(work, member, x)
            except Exception as failure:
                error = _portable(failure)
            connection.send((error, own_peak()))
        connection.close()

    def ask(x: int) -> None:
        for _, connection in members:
            connection.send(x)
        with one_thread():
            _in_memory(work, 0, x)
        for worker, connection in members:
            try:
                error, peak = connection.recv()
            except (EOFError, OSError):
                worker.join()
                raise FedbenchError(_died(worker)) from None
            note_worker(peak)
            if error is not None:
                raise error

    done = False
    try:
        for member in range(1, workers):
            here, there = context.Pipe()
            held = [here, *(connection for _, connection in members)]
            process = context.Process(target=serve, args=(member, there, held), daemon=True)
            process.start()
            there.close()
            members.append((process, here))
        yield ask
        done = True
    finally:
        for worker, connection in members:
            if done:
                connection.send(None)
            else:
                worker.kill()
            worker.join()
            connection.close()


def _begin(parent: int, others: Sequence[Connection]) -> None:
    """What a worker does first; `others` are the ends of connections that it has inherited and that are not its own."""
    end_with(parent)
    # While a worker holds the end that its answers are read from, it would wait for a reader for ever.
    for other in others:
        other.close()
    # Ctrl-C reaches the whole process group; it is the parent that answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def _in_memory(function: Callable[..., R], *values: Any) -> R:
    """function(*values), with one line for an end of memory."""
    try:
        return function(*values)
    except Exception as error:
        # torch has no exception of its own for this on a CPU.
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            raise FedbenchError(NO_MEMORY) from error
        raise


_PR_SET_PDEATHSIG = 1  # of prctl(2)


def end_with(parent: int) -> None:
    """Let the system kill this process when its parent, the process `parent`, has ended; only Linux can."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before this could be asked for
        os._exit(1)


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


def _died(worker: BaseProcess) -> str:
    return f"a worker process died ({_cause(worker.exitcode)}); try --workers 1"


def _cause(exitcode: int | None) -> str:
    if exitcode == -signal.SIGKILL:
        return "killed, most likely for want of memory"
    return f"signal {-exitcode}" if exitcode is not None and exitcode < 0 else f"exit code {exitcode}"
