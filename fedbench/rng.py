"""Named random streams: every draw has a name, and its seed is a hash of that name.

No global generator is ever seeded, so a run does not depend on what ran before it, and nothing about
randomness has to be checkpointed: the stream of round 7 is made anew from its name.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class Streams:
    """Independent streams under one (seed, scenario).

    The method is deliberately not part of the name: every method faces the same partition, cohorts and
    initial adapters, which is what makes comparisons between methods paired.
    """

    seed: int
    scenario: str

    def integer(self, *path: str | int) -> int:
        """A 63-bit integer: SHA-256 of the canonical JSON of (seed, scenario, path)."""
        name = json.dumps([self.seed, self.scenario, *path], separators=(",", ":"))
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1

    def numpy(self, *path: str | int) -> np.random.Generator:
        """A fresh NumPy generator for the stream called `path`."""
        return np.random.default_rng(self.integer(*path))

    def torch(self, *path: str | int) -> torch.Generator:
        """A fresh CPU torch generator for the stream called `path`; draw on the CPU, then move."""
        return torch.Generator().manual_seed(self.integer(*path))
