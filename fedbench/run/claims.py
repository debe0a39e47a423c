"""Claims: of several processes that share a results folder, one at a time makes the run of a key."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from fedbench.errors import ClaimedError

LOOK = 0.1
"""Seconds in which a look at a claim is over."""


def _lock(results: Path, key: str) -> Path:
    return results / ".locks" / f"{key[:12]}.lock"


def claimed(results: Path, key: str) -> bool:
    """Whether a process holds the run of `key` in the folder `results`."""
    path = _lock(results, key)
    if not path.exists():
        return False
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


@contextmanager
def claim(results: Path, key: str) -> Iterator[None]:
    """Hold the run of `key` in the folder `results` for the time of the block; a thread may hold it twice.

    The claim is a lock of the operating system on an open file, so it ends with its process, however that ends. Raises
    ClaimedError where another process holds it.
    """
    path = _lock(results, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    # One object for a path: a grid claims a cell, and the cell's run claims it again. Whoever only asks whether a run
    # is claimed holds the lock for a moment, which is waited for.
    lock = FileLock(path, timeout=LOOK, poll_interval=LOOK / 5, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        raise ClaimedError(
            f"{results}: another process is making the run {key[:12]}; wait until it is done, or name another --results"
        ) from None
    try:
        yield
    finally:
        lock.release()
