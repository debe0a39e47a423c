"""Where and how to compute: device, precision, executor."""

from __future__ import annotations

import torch

from fedbench.errors import FedbenchError


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


EXECUTORS = ("packed", "fused", "reference")


def choose_executor(name: str, device: torch.device) -> str:
    """The executor called `name`; "auto" is fused on CUDA, else packed. Raises FedbenchError for another name."""
    if name == "auto":
        return "fused" if device.type == "cuda" else "packed"
    if name not in EXECUTORS:
        raise FedbenchError(f"--executor {name}: no such executor; use auto, {', '.join(EXECUTORS)}")
    return name
