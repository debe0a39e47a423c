"""FedEx-LoRA (Singhal et al., ACL 2025, arXiv 2410.09432): what averaging factors loses is added to the frozen weights.

Clients train as in FedAvg. The server averages A and B, and adds the residual s · (mean(B_k A_k) - mean(B) mean(A)) to
W0, at itself and at every client, so that the model is the exact mean. The residual travels as factors, of rank at most
that of all clients and one more together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field

from fedbench.api.context import ClientContext, ServerContext
from fedbench.api.messages import ClientId, Message, adapters_of
from fedbench.api.sides import Client, Server
from fedbench.data.examples import Examples
from fedbench.errors import FedbenchError
from fedbench.methods._products import (
    Factors,
    FoldingClient,
    FoldingServer,
    decomposed,
    pairs,
    stacked,
)
from fedbench.methods.fedavg_lora import WeightedMethod
from fedbench.models.foundation import FoundationModel


class FedExLora(WeightedMethod):
    """FedEx-LoRA (Singhal et al., ACL 2025, arXiv 2410.09432): what averaging factors loses is added to W0.

    weighting: of the mean over clients, by sample count or all alike. residual_rank: fold in the best approximation of
    the residual of this rank, for fewer bytes; None for all of it.
    """

    name: ClassVar[str] = "fedex-lora"
    version: ClassVar[int] = 1
    needs: ClassVar[Literal["sum", "each"]] = "each"

    residual_rank: int | None = Field(None, ge=1)

    @property
    def turned(self) -> bool:
        """Whether the residual is added transposed."""
        return False

    def server(self, fm: FoundationModel, public: Examples | None, ctx: ServerContext) -> Server:
        return FedExServer(self, fm, ctx)

    def client(self, ctx: ClientContext) -> Client:
        return FoldingClient(self, ctx)


class FedExServer(FoldingServer):
    """Averages the factors, and folds in what that loses."""

    method: FedExLora

    def aggregate(self, round: int, uploads: Mapping[ClientId, Sequence[Message]]) -> None:
        super().aggregate(round, uploads)
        adapters = adapters_of(uploads)
        weights = self.weights(round, adapters)
        shares = [w / sum(weights) for w in weights]
        residuals = {}
        for a, b, weight in pairs(self.values):
            each = [(m.tensors[b], m.tensors[a]) for m in adapters]
            mean = self.values[b], self.values[a]
            residuals[weight] = self.placed(stacked([*each, mean], [*(self.scale * s for s in shares), -self.scale]))
        self.add(residuals)

    def placed(self, residual: Factors) -> Factors:
        """The residual as it is added to the weight. Raises FedbenchError for one that is turned and does not fit."""
        if (rank := self.method.residual_rank) is not None:
            u, s, vt = decomposed(residual, rank)
            residual = (u * s).to(residual[0].dtype), vt.to(residual[1].dtype)
        b, a = residual
        if not self.method.turned:
            return residual
        if b.shape[0] != a.shape[1]:
            raise FedbenchError(
                f"{self.method.name}: a residual of {b.shape[0]} x {a.shape[1]} cannot be added transposed; "
                "set transposed = false"
            )
        return torch.t(a).contiguous(), torch.t(b).contiguous()
