"""Runs on a CUDA device: the same mathematics as on the CPU, in the precision of the device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import save_tiny_bert

from fedbench.run.prepare import prepare
from fedbench.run.request import RunRequest
from fedbench.run.run import run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("method", ["fedpft", "fedot", "fedavg-lora"])
def test_a_run_on_cuda_follows_the_run_on_the_cpu(method: str, tmp_path: Path) -> None:
    fm = str(save_tiny_bert(tmp_path / "bert"))
    settings = {"fedpft": {"t": "1", "r": "6"}, "fedot": {"emulator": "1"}}.get(method, {})
    records = []
    for device, executor in (("cpu", "packed"), ("cuda", "packed"), ("cuda", "fused")):
        asked = RunRequest(
            method=method,
            scenario="tweets-noniid",
            fm=fm,
            profile="smoke",
            settings=settings,
            device=device,
            executor=executor,
            results=tmp_path / executor / device,
            cache=tmp_path / device,
        )
        records.append(run(prepare(asked)))
    cpu = records[0]
    for cuda in records[1:]:
        assert cpu.partition == cuda.partition
        assert cpu.communication.up == cuda.communication.up
        # bf16 keeps 8 bits of mantissa: losses agree to about a percent over these few steps.
        for a, b in zip(cpu.rounds, cuda.rounds, strict=True):
            assert a.loss == pytest.approx(b.loss, rel=0.03)
