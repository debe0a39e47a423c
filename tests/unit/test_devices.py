"""Methods on a device that is not the CPU: tensors never meet across devices, and results are the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import save_tiny_bert
from torch.utils import backend_registration

SCRIPT = Path(__file__).parents[1] / "elsewhere.py"
pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch cannot have a device made of Python",
)
METHODS = ("fedpft", "fedot")  # and the adapters of fedavg-lora, on which both are built


def test_methods_run_on_another_device_as_on_the_cpu(tmp_path: Path) -> None:
    save_tiny_bert(tmp_path / "bert")
    # In a process of its own: the device would stay with all other tests.
    done = subprocess.run([sys.executable, SCRIPT, tmp_path, *METHODS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == set(METHODS)
    for method, runs in found.items():
        reference = runs.pop("cpu packed")
        assert len(reference["loss"]) == 3
        assert bool(reference["gradient error"]) == (method in ("fedpft", "fedot"))
        for where, values in runs.items():
            for name, expected in reference.items():
                # One row of forty may fall on the other side of rounding.
                tolerance = {"rel": 1e-3} if name in ("loss", "gradient error") else {"abs": 0.03}
                assert values[name] == pytest.approx(expected, **tolerance), (method, where, name)
