"""Where and how to compute: device, precision, executor."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch

from fedbench.errors import FedbenchError
from fedbench.machine.workers import choose_workers

CPU = torch.device("cpu")
EXECUTORS = ("packed", "fused", "reference")


@dataclass(frozen=True)
class Execution:
    """How to compute; handed down from the run to every forward pass.

    device: where. precision: "fp32", or "bf16" under autocast. executor: of local training, "packed", client by client;
    "fused", a round's clients together; or "reference", client by client through stock modules in padded batches.
    workers: processes that local training, evaluation and gradients are spread over.
    """

    device: torch.device = CPU
    precision: str = "fp32"
    executor: str = "packed"
    workers: int = 1

    @property
    def packed(self) -> bool:
        """Whether texts are packed and frozen layers reordered; the reference does neither."""
        return self.executor != "reference"

    @property
    def fused(self) -> bool:
        """Whether a round's clients are trained together."""
        return self.executor == "fused"

    @property
    def exact(self) -> Execution:
        """The same in fp32, as measures of gradients need it."""
        return replace(self, precision="fp32")

    def autocast(self) -> AbstractContextManager[None]:
        """The context of a forward pass: bf16 autocast for precision "bf16", nothing for "fp32"."""
        if self.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" takes CUDA where there is one. Raises FedbenchError for one that is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise FedbenchError(f"--device {name}: no such device; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise FedbenchError(f"--device {name}: only cpu and cuda are supported")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise FedbenchError(
            f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; use --device cpu"
        )
    return device


def choose_precision(name: str, device: torch.device) -> str:
    """The precision called `name`; "auto" is bf16 on CUDA devices that have it, else fp32.

    On a CPU bf16 has to be asked for: it has other rounding, and not every CPU is faster in it. Raises FedbenchError
    for bf16 on a CUDA device without it, and for a name that is none of auto, fp32 and bf16.
    """
    if name not in ("auto", "fp32", "bf16"):
        raise FedbenchError(f"--precision {name}: no such precision; use auto, fp32 or bf16")
    lacking = device.type == "cuda" and not torch.cuda.is_bf16_supported()
    if name == "bf16" and lacking:
        raise FedbenchError(f"--precision bf16: {torch.cuda.get_device_name(device)} has no bf16; use fp32")
    if name == "auto":
        return "bf16" if device.type == "cuda" and not lacking else "fp32"
    return name


def choose_executor(name: str, device: torch.device) -> str:
    """The executor called `name`; "auto" is fused on CUDA, else packed. Raises FedbenchError for another name."""
    if name == "auto":
        return "fused" if device.type == "cuda" else "packed"
    if name not in EXECUTORS:
        raise FedbenchError(f"--executor {name}: no such executor; use auto, {', '.join(EXECUTORS)}")
    return name


def choose_execution(device: str, precision: str, executor: str, workers: int | None) -> Execution:
    """How to compute, from what was asked on the command line. Raises FedbenchError for what is not to be had here."""
    where = choose_device(device)
    chosen = choose_precision(precision, where), choose_executor(executor, where), choose_workers(workers, where)
    return Execution(where, *chosen)
