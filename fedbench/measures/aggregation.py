"""Aggregation error: how far a round's model is from the mean of what its clients trained.

Clients train products B A, servers mostly average B and A, and the product of means is not the mean of products.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedbench.api.messages import ClientId, Message, State, adapters_of
from fedbench.api.sides import Server
from fedbench.machine.stopwatch import Stopwatch
from fedbench.measures.observer import Observer


@dataclass(frozen=True)
class _Weight:
    """An adapted weight of the FM in a round: itself before it, and its clients' factors, B [out, r] and A [r, in].

    shares: of the clients in their mean; they add up to the scale of the products.
    """

    before: Tensor
    factors: Sequence[tuple[Tensor, Tensor]]
    shares: Sequence[float]

    @property
    def mean_of_products(self) -> Tensor:
        """[out, in]."""
        b = torch.cat([b for b, _ in self.factors], 1)
        return b @ torch.cat([a * share for (_, a), share in zip(self.factors, self.shares, strict=True)])

    @property
    def product_of_means(self) -> Tensor:
        """[out, in]; factors of lower rank count as padded with zeros."""
        (first_b, first_a), rank = self.factors[0], max(len(a) for _, a in self.factors)
        mean_b, mean_a = first_b.new_zeros(len(first_b), rank), first_a.new_zeros(rank, first_a.shape[1])
        scale = sum(self.shares)
        for (b, a), share in zip(self.factors, self.shares, strict=True):
            mean_b[:, : b.shape[1]] += b * (share / scale)
            mean_a[: len(a)] += a * (share / scale)
        return scale * mean_b @ mean_a


class AggregationErrors(Observer):
    """After each round the relative distance, in the Frobenius norm over all adapted weights, to mean(B_k A_k).

    Of two things: `factors`, mean(B_k) mean(A_k), is what plain averaging would lose; `model` is what the FM with the
    tuned parameters has gained in its adapted weights, whatever the server did. The mean is by sample count. A factor
    that clients do not send is the FM's own before the round. Nothing where no adapter of LoRA is sent, or the clients'
    products are zero.
    """

    name = "aggregation_error"

    def __init__(self, time: Stopwatch) -> None:
        self.time = time
        self.points: list[dict[str, Any]] = []
        self._noted = 0
        self._weights: dict[str, _Weight] = {}

    def aggregating(self, round: int, server: Server, uploads: Mapping[ClientId, Sequence[Message]]) -> None:
        adapters = adapters_of(uploads)
        names = server.fm_names()
        sent = {adapted(name): name for name in (adapters[0].tensors if adapters else ()) if ".lora_" in name}
        self._weights = {}
        if not sent:
            return
        if (model := server.put_in_fm()) is None:
            return
        with self.time("aggregation_error"):
            counts = [float(m.meta.get("num_examples", 1)) for m in adapters]
            for path, one in sent.items():
                mine = [one.replace(".lora_A.", f".lora_{f}.").replace(".lora_B.", f".lora_{f}.") for f in "BA"]
                module: Any = model.get_submodule(adapted(names.get(one, one)))
                own = [getattr(module, f"lora_{f}")["default"].weight for f in "BA"]
                factors = [tuple(_plain(m.tensors.get(n, o)) for n, o in zip(mine, own, strict=True)) for m in adapters]
                shares = [module.scaling["default"] * n / sum(counts) for n in counts]
                weight = module.base_layer.weight.detach().to("cpu", copy=True)
                self._weights[path] = _Weight(weight, [(b, a) for b, a in factors], shares)

    def aggregated(self, round: int, server: Server) -> None:
        if not self._weights or (model := server.put_in_fm()) is None:
            return
        with self.time("aggregation_error"):
            names = {adapted(mine): adapted(fm) for mine, fm in server.fm_names().items()}
            whole = factors = lost = 0.0
            for path, weight in self._weights.items():
                mean = weight.mean_of_products
                whole += float(mean.square().sum())
                factors += float((mean - weight.product_of_means).square().sum())
                lost += float((mean - self._gained(model.get_submodule(names.get(path, path)), weight)).square().sum())
        self._weights = {}
        of_factors, of_model = ((part / whole) ** 0.5 if whole > 0 else None for part in (factors, lost))
        self.points.append({"round": round, "factors": of_factors, "model": of_model})

    @staticmethod
    def _gained(module: Any, weight: _Weight) -> Tensor:
        """What the round left in an adapted weight: what was added to it, and its product."""
        b, a = (_plain(getattr(module, f"lora_{f}")["default"].weight) for f in "BA")
        return _plain(module.base_layer.weight) - _plain(weight.before) + module.scaling["default"] * (b @ a)

    def block(self, server: Server) -> dict[str, Any] | None:
        errors = [point["model"] for point in self.points if point["model"] is not None]
        if not errors:
            return None
        return {"points": self.points, "mean": float(np.mean(errors)), "final": errors[-1]}

    def notes(self) -> list[Any]:
        new, self._noted = self.points[self._noted :], len(self.points)
        return new

    def restore(self, state: State | None, notes: Sequence[Any]) -> None:
        self.points, self._noted = list(notes), len(notes)


def adapted(name: str) -> str:
    """The path of the module that a tunable of LoRA belongs to; another name as it is."""
    return name.partition(".lora_")[0]


def _plain(tensor: Tensor | nn.Parameter) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)
