"""How long the command line takes to answer."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest


@pytest.mark.parametrize("argument", ["--help", "list"])
def test_light_commands_answer_within_half_a_second(argument: str) -> None:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "fedbench.cli", argument], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - start)
    # The least of several: what the machine does besides only ever adds.
    assert min(seconds) < 0.5, seconds
