"""What both sides of a run are told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedbench.machine.device import Execution
from fedbench.rng import Streams
from fedbench.scenario.tables import Scenario


@dataclass(frozen=True)
class Brief:
    """Settings and seed, and how to compute. `cache`: where reusable files lie."""

    scenario: Scenario
    seed: int
    execution: Execution
    cache: Path

    @property
    def streams(self) -> Streams:
        """The random streams of the run."""
        return Streams(self.seed, self.scenario.name)
