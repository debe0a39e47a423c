"""Centralised LoRA: `fedavg-lora` with one client who holds all rows, and the optimiser steps of the federation."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from fedbench.methods.fedavg_lora import LoraMethod
from fedbench.scenario.tables import Federation, SplitSettings


class CentralisedLora(LoraMethod):
    """What the same budget of steps reaches when all rows lie in one place.

    A round of the one client takes the optimiser steps of the whole cohort it stands for.
    """

    name: ClassVar[str] = "centralised-lora"
    version: ClassVar[int] = 1
    needs: ClassVar[Literal["sum", "each"]] = "sum"

    def plan(self, split: SplitSettings, federation: Federation, rows: int) -> tuple[SplitSettings, Federation]:
        clients = split.clients
        each = math.ceil(rows / clients / federation.batch_size) * federation.local_epochs
        steps = federation.cohort_size(clients) * min(each, federation.max_steps or each)
        epochs = math.ceil(steps / math.ceil(rows / federation.batch_size))
        return (
            split.model_copy(update={"kind": "iid", "clients": 1}),
            federation.model_copy(
                update={"fraction": 1.0, "local_epochs": max(1, epochs), "max_steps": steps, "dropout": 0.0}
            ),
        )
