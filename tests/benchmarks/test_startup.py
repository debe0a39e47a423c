"""How long the command line takes to answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from turns import ROOT, environment_of, spelled, taken

LIMITS = {"--version": 0.15, "--help": 0.25, "list": 0.25}


@pytest.mark.parametrize("argument", LIMITS)
def test_light_commands_answer_at_once(argument: str, tmp_path: Path, say: Callable[[str], None]) -> None:
    command, environment = spelled(["fedbench", argument], ROOT), environment_of(ROOT, tmp_path)
    runs = [taken(command, environment, tmp_path) for _ in range(8)][1:]  # the first compiles bytecode
    # Time on the processor, which on an idle machine is the time that passes: other work does not count.
    least = min(run.processor for run in runs)
    say(f"{least:.3f} s processor, {min(run.seconds for run in runs):.3f} s by the clock, least of {len(runs)}")
    assert least < LIMITS[argument]
