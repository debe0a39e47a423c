"""What a user asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class RunRequest:
    """What a user asks for; every field as on the command line."""

    method: str
    scenario: str
    seed: int = 0
    fm: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    profile: str | None = None
    device: str = "auto"
    precision: str = "auto"
    data_dir: Path | None = None
    results: Path = Path("runs")
    cache: Path | None = None
    plugins: tuple[str, ...] = ()
    executor: str = "auto"
    workers: int | None = None
