"""What a user asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedbench.errors import FedbenchError

LARGEST_SEED = 2**63 - 1
"""Tables hold seeds as 64-bit integers."""


@dataclass(frozen=True)
class RunRequest:
    """What a user asks for; every field as on the command line. Raises FedbenchError for a seed that no table holds.

    silos: processes that hold the clients, where the host has silos. silo_timeout: seconds that one is given for an
    answer.
    """

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
    host: str = "here"
    silos: int | None = None
    silo_timeout: float = 600.0

    def __post_init__(self) -> None:
        if self.seed > LARGEST_SEED:
            raise FedbenchError(f"--seed {self.seed}: too large; use at most {LARGEST_SEED}")
        if self.seed < 0:
            raise FedbenchError(f"--seed {self.seed}: below zero; use 0 or larger")
