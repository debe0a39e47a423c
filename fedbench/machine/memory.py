"""Peak memory of a run: on a CPU of this process and its workers, on CUDA of the device."""

from __future__ import annotations

import ctypes
import gc
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_workers = [0]
"""The largest peak of a worker since the last reset, in bytes."""


def reset_peak(device: torch.device) -> None:
    """Count from now on. Only Linux lets a process forget its own peak; elsewhere that stays since it began."""
    import torch

    _workers[0] = 0
    gc.collect()
    give_back()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):  # not Linux, or a container that does not allow it
        _RESET.write_text("5")


def give_back() -> None:
    """Give memory that is free and still this process's back to the system, where the C library can."""
    with suppress(OSError, AttributeError):  # another C library than GNU's
        ctypes.CDLL(None).malloc_trim(0)


def note_worker(peak: int) -> None:
    """Take a worker's peak into account, in bytes."""
    _workers[0] = max(_workers[0], peak)


def own_peak() -> int:
    """The largest resident set of this process in bytes, 0 where the system does not tell."""
    try:
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_memory(device: torch.device) -> int | None:
    """Peak in bytes since `reset_peak`: on CUDA allocated by torch, on a CPU the largest resident set of a process.

    That is this one or a worker, whose resident set counts the pages it shares with this one. None where the system
    does not tell.
    """
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    return max(own_peak(), _workers[0]) or None
