"""Whole commands: the main job with a cold and a warm proxy cache, and RACE against the bare loop.

The main job takes minutes. RACE needs SST-2: RACE_DATA names the folder that `--data-dir` would.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from turns import ROOT, environment_of, spelled, taken


def test_the_main_job_with_a_cold_and_a_warm_cache(tmp_path: Path, say: Callable[[str], None]) -> None:
    command = spelled(["fedbench", "run", "--method", "fedpft", "--scenario", "tweets-noniid"], ROOT)
    environment = environment_of(ROOT, tmp_path) | {"FEDBENCH_CACHE": str(tmp_path / "cache")}
    found = {}
    for cache in ("cold", "warm"):
        place = tmp_path / cache
        place.mkdir()
        found[cache] = taken(command, environment, place)
        say(f"{cache} cache: {found[cache].seconds:.1f} s, peak {found[cache].peak / 1e9:.2f} GB")
    say(f"warm over cold {found['warm'].seconds / found['cold'].seconds:.3f}")
    assert found["warm"].seconds < found["cold"].seconds


@pytest.mark.skipif("RACE_DATA" not in os.environ, reason="needs SST-2 in the folder RACE_DATA")
def test_race_against_the_bare_loop(say: Callable[[str], None]) -> None:
    script = str(Path(__file__).with_name("race.py"))
    asked = ["--runners", "fedbench,bare", "--rounds", "2", "--cycles", "2", "--data-dir", os.environ["RACE_DATA"]]
    done = subprocess.run([sys.executable, script, *asked], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    ratio = re.search(r"RATIO fedbench/bare (\S+)", done.stdout)
    assert ratio is not None
    say(f"fedbench over the bare loop {ratio[1]}, medians of 2 cycles of 2 rounds")
    assert float(ratio[1]) < 0.5
