"""LoRA-FAIR (Bian et al., ICCV 2025, arXiv 2411.14961): the mean of B is corrected towards the mean of the products.

The server averages A and B and looks for the D that brings (mean(B) + D) mean(A) near M = sum p_k B_k A_k; B with it is
what clients go on from. No more bytes cross than in FedAvg. The paper's objective is -cos(M, (mean(B) + D) mean(A)) +
regularisation · ||D||, by gradient steps from 0. "least-squares" is the closed form beside it, best in the Frobenius
norm: D = (M - mean(B) mean(A)) A⁺.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedbench.api.context import ServerContext
from fedbench.api.messages import ClientId, Message, adapters_of
from fedbench.api.sides import Server
from fedbench.data.examples import Examples
from fedbench.methods._products import pairs, stacked
from fedbench.methods.fedavg_lora import AdapterServer, LoraMethod
from fedbench.models.foundation import FoundationModel


class LoraFair(LoraMethod):
    """solve: how D is found. regularisation, fair_steps, fair_lr: of the gradient steps.

    The gradient of a cosine falls as what it is of grows, so a step is fair_lr · ||mean(B)||² times the gradient.
    """

    name: ClassVar[str] = "lora-fair"
    version: ClassVar[int] = 1
    needs: ClassVar[Literal["sum", "each"]] = "each"

    solve: Literal["gradient", "least-squares"] = "gradient"
    regularisation: float = Field(0.01, ge=0)
    fair_steps: int = Field(100, ge=1)
    fair_lr: float = Field(0.1, gt=0)

    def server(self, fm: FoundationModel, public: Examples | None, ctx: ServerContext) -> Server:
        return FairServer(self, fm, ctx)

    def correction(self, product: Tensor, b: Tensor, a: Tensor) -> Tensor:
        """D [out, r] for the mean of products [out, in] and the means b [out, r] and a [r, in]; all in fp64."""
        if not bool(product.count_nonzero()):
            return torch.zeros_like(b)
        if self.solve == "least-squares":
            return (product - b @ a) @ torch.linalg.pinv(a)
        d = torch.zeros_like(b)
        for _ in range(self.fair_steps):
            d.requires_grad_(True)
            found = (b + d) @ a
            cosine = (product * found).sum() / (product.norm() * found.norm()).clamp(min=1e-12)
            # A norm has no gradient at 0, where D starts: its subgradient there is 0.
            loss = -cosine + self.regularisation * (d.square().sum() + 1e-24).sqrt()
            [gradient] = torch.autograd.grad(loss, [d])
            d = (d - self.fair_lr * b.square().sum() * gradient).detach()
        return d


class FairServer(AdapterServer):
    """Averages the factors, and corrects B."""

    method: LoraFair

    def aggregate(self, round: int, uploads: Mapping[ClientId, Sequence[Message]]) -> None:
        super().aggregate(round, uploads)
        adapters = adapters_of(uploads)
        weights = self.weights(round, adapters)
        shares = [w / sum(weights) for w in weights]
        for name_a, name_b, _ in pairs(self.values):
            each = [(m.tensors[name_b].double(), m.tensors[name_a].double()) for m in adapters]
            b, a = stacked(each, shares)
            mean_b, mean_a = self.values[name_b], self.values[name_a]
            d = self.method.correction(b @ a, mean_b.double(), mean_a.double())
            self.values[name_b] = (mean_b.double() + d).to(mean_b.dtype)
