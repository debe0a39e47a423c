"""FedBiOT as its released code runs it: where that departs from the paper, the departure can be switched off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from torch import Tensor

from fedbench.methods.fedbiot import FedBiOT


class FedBiOTOfficial(FedBiOT):
    """FedBiOT with the released code's departure from the paper.

    inert_pull: the clients' pull is taken of detached weights: it has a value, and no gradient.
    """

    name: ClassVar[str] = "fedbiot-official"
    version: ClassVar[int] = 1
    needs: ClassVar[Literal["sum", "each"]] = "sum"

    inert_pull: bool = True

    def pull(self, parameters: Mapping[str, Tensor], received: Mapping[str, Tensor]) -> Tensor:
        value = super().pull(parameters, received)
        return value.detach() if self.inert_pull else value
