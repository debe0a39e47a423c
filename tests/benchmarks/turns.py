"""Two commits run a command in turns, since the speed of a machine drifts: seconds, peak memory, and their ratios.

    python tests/benchmarks/turns.py main HEAD -- fedbench list
    python tests/benchmarks/turns.py v0.1 . --turns 3 --cold -- fedbench run --method fedpft --scenario tweets-noniid

OLD and NEW are commits, each checked out into a folder of its own, or `.` for the checkout as it stands. The command
runs in an empty folder of its own each time, so results start anew; `--cold` gives it an empty cache as well, where it
names none. `fedbench` and `python` stand for this Python with the commit's package, `{tree}` for the commit's folder. A
first run of each is not counted: it compiles bytecode and warms the disk.

Peak memory is that of the command and its children together, memory they share counted once, looked at ten times a
second: what is gone sooner is not seen.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from scipy import stats

ROOT = Path(__file__).parents[2]
FEDBENCH = ("-c", "from fedbench.cli.app import main; main()")


@dataclass(frozen=True)
class Taken:
    """What a run of a command took: seconds by the clock, processor seconds of all its processes, and peak bytes."""

    seconds: float
    processor: float
    peak: float


@dataclass(frozen=True)
class Ratio:
    """Of what was taken in turns: the geometric mean of the ratios, and the interval of 95% where there are several."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, new: Sequence[float], old: Sequence[float]) -> Ratio:
        """new, old: of each turn; Student's t on the logarithms of their ratios."""
        logs = [math.log(a / b) for a, b in zip(new, old, strict=True)]
        middle, n = statistics.fmean(logs), len(logs)
        wide = math.inf if n < 2 else float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(logs) / math.sqrt(n)
        return cls(*(math.exp(min(700.0, x)) for x in (middle, middle - wide, middle + wide)))

    def __str__(self) -> str:
        if math.isinf(self.low) or self.low == 0:
            return f"{self.mean:.3f} (one turn)"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def in_turns(sides: Mapping[str, Callable[[], float]], turns: int) -> dict[str, list[float]]:
    """What each side returns, turn by turn; who comes first changes from one turn to the next."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(turns):
        for name in sides if turn % 2 == 0 else reversed(sides):
            found[name].append(sides[name]())
    return found


def seconds_of(function: Callable[[], object]) -> Callable[[], float]:
    """The same function as one that returns the seconds it took."""

    def timed() -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    return timed


def memory_of(process: psutil.Process) -> int:
    """Bytes of a process and its children; what they share is counted once where the system tells (Linux)."""
    total = 0
    for each in (process, *process.children(recursive=True)):
        try:
            full = each.memory_full_info()
            total += getattr(full, "pss", full.rss)
        except psutil.Error:  # it ended meanwhile
            continue
    return total


def taken(command: Sequence[str], environment: Mapping[str, str], folder: Path) -> Taken:
    """Run a command to its end in `folder`. Exits with what it said where it fails."""
    with tempfile.TemporaryFile() as said:
        before, start = os.times(), time.perf_counter()
        process = psutil.Popen(command, cwd=folder, env=dict(environment), stdout=said, stderr=subprocess.STDOUT)
        peak = 0
        while True:
            try:
                process.wait(0.1)
                break
            except psutil.TimeoutExpired:
                try:
                    peak = max(peak, memory_of(process))
                except psutil.Error:
                    continue
        seconds, after = time.perf_counter() - start, os.times()
        if process.returncode:
            said.seek(0)
            sys.exit(f"turns: {' '.join(command)} failed in {folder}\n{said.read().decode(errors='replace')[-4000:]}")
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    return Taken(seconds, processor, float(peak))


def environment_of(tree: Path, scratch: Path) -> dict[str, str]:
    """What a command is run with so that it finds the package of `tree`, with bytecode as an installed one has it."""
    own = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return own | {"PYTHONPATH": str(tree), "PYTHONPYCACHEPREFIX": str(scratch / "bytecode"), "HF_HUB_OFFLINE": "1"}


def spelled(command: Sequence[str], tree: Path) -> list[str]:
    """The command as it is run for a tree."""
    first, *rest = [part.replace("{tree}", str(tree)) for part in command]
    starts = {"fedbench": [sys.executable, *FEDBENCH], "python": [sys.executable]}
    return [*starts.get(first, [first]), *rest]


@contextmanager
def checked_out(commits: Sequence[str], scratch: Path) -> Iterator[list[Path]]:
    """The trees of some commits, in folders that are gone after the block; `.` is the checkout as it stands."""
    trees, made = [], []
    try:
        for number, commit in enumerate(commits):
            if commit == ".":
                trees.append(ROOT)
                continue
            tree = scratch / f"tree-{number}"
            subprocess.run(["git", "worktree", "add", "--quiet", "--detach", tree, commit], cwd=ROOT, check=True)
            made.append(tree)
            trees.append(tree)
        yield trees
    finally:
        for tree in made:
            subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--turns", type=int, default=5, help="counted runs of each")
    parser.add_argument("--cold", action="store_true", help="an empty cache ($FEDBENCH_CACHE) for each run")
    given = sys.argv[1:]
    if "--" not in given or not given[given.index("--") + 1 :]:
        parser.error("say what to run after --")
    asked, command = parser.parse_args(given[: given.index("--")]), given[given.index("--") + 1 :]
    with tempfile.TemporaryDirectory(prefix="fedbench-turns-") as folder:
        scratch = Path(folder)
        with checked_out([asked.old, asked.new], scratch) as trees:
            found: dict[str, list[Taken]] = {"old": [], "new": []}
            for turn in range(asked.turns + 1):
                for name, tree in sorted(zip(found, trees, strict=True), reverse=turn % 2 == 0):
                    place = scratch / f"{name}-{turn}"
                    place.mkdir()
                    environment = environment_of(tree, scratch)
                    if asked.cold:
                        environment["FEDBENCH_CACHE"] = str(place / "cache")
                    result = taken(spelled(command, tree), environment, place)
                    about = f"{result.seconds:8.2f} s {result.processor:8.2f} s processor {result.peak / 1e6:8.0f} MB"
                    print(f"{name} {about}{'' if turn else '   not counted'}", flush=True)
                    if turn:
                        found[name].append(result)
    for what, unit in (("seconds", 1.0), ("processor", 1.0), ("peak", 1e6)):
        values = {name: [getattr(each, what) / unit for each in results] for name, results in found.items()}
        if not all(map(all, values.values())):
            continue  # too short for its memory to be looked at
        medians = "  ".join(f"{name} {statistics.median(each):.3f}" for name, each in values.items())
        print(f"{what:9} medians {medians}  new/old {Ratio.of(values['new'], values['old'])}")


if __name__ == "__main__":
    main()
