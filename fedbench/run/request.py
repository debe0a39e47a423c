"""What a user asks for, and what both sides of a run are told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedbench.machine.device import Execution
from fedbench.rng import Streams
from fedbench.scenario.tables import Scenario


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
    host: str = "here"


@dataclass(frozen=True)
class Brief:
    """What both sides are told: settings and seed, and how to compute. `cache`: where reusable files lie."""

    scenario: Scenario
    seed: int
    execution: Execution
    cache: Path

    @property
    def streams(self) -> Streams:
        """The random streams of the run."""
        return Streams(self.seed, self.scenario.name)
