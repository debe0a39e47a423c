"""Settings of the test suite: no network, few threads, marks by folder, slow tests only when asked for."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

# Before anything imports torch or a Hugging Face library. Folders of the user's own (data, hub cache) would make a
# test pass on one machine and fail on another; FEDBENCH_CACHE may be given to keep pre-trained models between runs.
_scratch = tempfile.TemporaryDirectory(prefix="fedbench-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = str(Path(_scratch.name) / "hub")
os.environ.pop("FEDBENCH_DATA", None)
os.environ.setdefault("FEDBENCH_CACHE", str(Path(_scratch.name) / "cache"))
os.environ.setdefault("OMP_NUM_THREADS", str(min(2, os.cpu_count() or 1)))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

FOLDERS = ("unit", "contract", "golden", "benchmarks", "gpu", "browser")
ON_REQUEST = ("slow", "benchmarks", "fedml", "browser")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run tests marked slow as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent
    for item in items:
        folder = item.path.relative_to(tests).parts[0]
        if folder in FOLDERS:
            item.add_marker(folder)
    asked = str(config.getoption("markexpr"))
    left_out = {mark for mark in ON_REQUEST if mark not in asked}
    if config.getoption("--slow"):
        left_out.discard("slow")
    deselected = [item for item in items if any(mark.name in left_out for mark in item.iter_markers())]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in deselected]


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Calls the command line in this process: arguments -> (exit code, stdout, stderr)."""

    from fedbench.cli.app import main

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedbench", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        code = end.value.code
        return int(code or 0), *capsys.readouterr()

    return call


def pytest_sessionfinish() -> None:
    # Workers that are done are reaped when the next ones start; mutmut, whose process goes on, waits for any child.
    for worker in multiprocessing.active_children():
        worker.join(10)
