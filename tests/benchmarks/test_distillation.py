"""How long FedPFT's distillation takes on all cores, against one worker process."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import pytest
from turns import Ratio, in_turns

from fedbench.run.hosts.make import make_server
from fedbench.run.prepare import prepare
from fedbench.run.request import RunRequest

TURNS, STEPS = 3, 20


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_distillation_over_worker_processes(tmp_path: Path, say: Callable[[str], None]) -> None:
    settings = {"distil_steps": str(STEPS)}
    p = prepare(
        RunRequest("fedpft", "tweets-noniid", device="cpu", settings=settings, results=tmp_path, cache=tmp_path)
    )
    cores, number = p.execution.workers, count()

    def distil(workers: int) -> float:
        """Seconds of the server's set-up, with nothing in the cache."""
        execution, cache = replace(p.execution, workers=workers), tmp_path / f"cache-{next(number)}"
        brief = replace(p.brief, execution=execution, cache=cache)
        side = make_server(brief, p.method, p.loaded.fm, p.loaded.public, p.held_out, p.division.label_counts)
        return dict(side.seconds())["setup"]

    distil(cores)
    found = in_turns({"all": partial(distil, cores), "one": partial(distil, 1)}, TURNS)
    ratio = Ratio.of(found["all"], found["one"])
    say(f"{cores} workers over one {ratio}; {min(found['all']):.1f} s against {min(found['one']):.1f}, {STEPS} steps")
    assert ratio.mean < 1
