"""Runs in turns: the ratio and its interval by hand, who comes first, and a command that is looked at."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from turns import ROOT, Ratio, environment_of, in_turns, spelled, taken


def test_a_ratio_is_a_geometric_mean_with_student_s_interval() -> None:
    found = Ratio.of([2.0, 8.0], [1.0, 1.0])
    assert found.mean == pytest.approx(4.0)
    # Logarithms ln 2 and ln 8: a deviation of ln 4 / sqrt 2, over sqrt 2, times t(0.975, 1) = 12.706.
    assert found.high == pytest.approx(4.0 * 2**12.7062, rel=1e-4)
    assert found.low == pytest.approx(16 / found.high)
    assert str(Ratio.of([3.0], [2.0])) == "1.500 (one turn)"
    assert Ratio.of([3.0, 6.0, 1.5], [2.0, 4.0, 1.0]) == pytest.approx(Ratio(1.5, 1.5, 1.5))


def test_sides_take_turns_in_changing_order() -> None:
    order: list[str] = []
    found = in_turns({"a": lambda: order.append("a") or 1.0, "b": lambda: order.append("b") or 2.0}, 3)
    assert found == {"a": [1.0] * 3, "b": [2.0] * 3}
    assert order == ["a", "b", "b", "a", "a", "b"]


def test_memory_of_a_command_and_its_children_is_seen(tmp_path: Path) -> None:
    child = "import time; held = bytearray(100_000_000); time.sleep(1)"
    program = f"import subprocess, sys; held = bytearray(50_000_000); subprocess.run([sys.executable, '-c', {child!r}])"
    found = taken([sys.executable, "-c", program], environment_of(ROOT, tmp_path), tmp_path)
    assert found.seconds > 1
    assert 150e6 < found.peak < 250e6


def test_a_command_is_spelled_for_its_tree(tmp_path: Path) -> None:
    assert spelled(["python", "{tree}/x.py", "{}"], tmp_path) == [sys.executable, f"{tmp_path}/x.py", "{}"]
    assert spelled(["fedbench", "list"], tmp_path)[-1] == "list"
    assert environment_of(tmp_path, tmp_path)["PYTHONPATH"] == str(tmp_path)
