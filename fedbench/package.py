"""The package itself: where it lies, and which version it is."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HOME = Path(__file__).resolve().parent
"""The folder of the package."""


def own_version() -> str:
    """The version that was installed; 0.0.0 for a source tree that never was."""
    try:
        return version("fedbench")
    except PackageNotFoundError:
        return "0.0.0"
