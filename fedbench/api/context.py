"""What the harness tells each side: settings and streams, never the other side's property."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedbench.api.messages import ClientId
from fedbench.machine.device import Execution
from fedbench.models.cache import Frozen, ModuleCache
from fedbench.models.spec import ModelSpec
from fedbench.rng import Streams
from fedbench.scenario.tables import Federation


@dataclass(frozen=True)
class ServerContext:
    """The server's view: streams, federation settings, how to compute, and a folder for what may be reused.

    evaluate_every: rounds between evaluations, as the scenario sets them. clients: how many there are in all.
    """

    streams: Streams
    federation: Federation
    execution: Execution
    cache: Path
    evaluate_every: int
    clients: int

    @property
    def device(self) -> torch.device:
        """Where the server computes."""
        return self.execution.device


@dataclass(frozen=True)
class ClientContext:
    """One client's view: who it is, its streams, federation settings, and how to assemble a model."""

    client: ClientId
    streams: Streams
    federation: Federation
    modules: ModuleCache = field(repr=False)

    def model(self, spec: ModelSpec, frozen: Mapping[str, Tensor]) -> Frozen:
        """The model of `spec` with the frozen weights a client was sent; equal contents share one module."""
        return self.modules.get(spec, frozen)

    def batches(self, round: int, rows: int) -> Sequence[np.ndarray]:
        """Row indices of every local step of this round, in the order of the client's own stream.

        Each epoch visits a fresh permutation of the `rows`; the last batch of an epoch may be short.
        """
        rng = self.streams.numpy("client", round, self.client)
        size = self.federation.batch_size
        out: list[np.ndarray] = []
        for _ in range(self.federation.local_epochs):
            order = rng.permutation(rows)
            out += [order[start : start + size] for start in range(0, rows, size)]
        return out[: self.federation.max_steps]

    def seed(self, round: int) -> int:
        """Seed of dropout in this client's local training of `round`."""
        return self.streams.integer("dropout", round, self.client)
