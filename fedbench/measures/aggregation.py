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
class _Squares:
    """Squared Frobenius norms: of mean(B_k A_k), and of its differences from mean(B_k) mean(A_k) and from the model."""

    whole: float
    factors: float
    model: float


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
        _, _, (mean_b, mean_a) = self._around(max(len(a) for _, a in self.factors))
        return sum(self.shares) * mean_b @ mean_a

    def _around(self, rank: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """All B [k, out, rank] and A [k, rank, in] less their means, and the means; each padded with zeros to rank."""
        each = [_padded(b, a, rank) for b, a in self.factors]
        b, a = torch.stack([b for b, _ in each]), torch.stack([a for _, a in each])
        weights = b.new_tensor(self.shares)[:, None, None] / sum(self.shares)
        mean_b, mean_a = (weights * b).sum(0), (weights * a).sum(0)
        return b - mean_b, a - mean_a, (mean_b, mean_a)

    def of_products(self, own: tuple[Tensor, Tensor]) -> _Squares:
        """Against a model whose weight is as before the round, and whose factors are `own`.

        Every difference is a sum of products of low rank r. With b_k and a_k for what client k's factors are off their
        means, and s for the scale, the mean of products is their product plus the mean of b_k a_k, so that sum is the
        difference from the product; from the model's s B A it is that sum less s (B - mean) A and s mean (A - mean).
        The norm of X Y is the sum over XᵀX times YYᵀ, of size [clients r, clients r]. No matrix [out, in] is made, and
        what is small is no difference of what is large.
        """
        rank = max(len(a) for _, a in (*self.factors, own))
        off_b, off_a, (mean_b, mean_a) = self._around(rank)
        b, a = _padded(*own, rank)
        scale, shares = sum(self.shares), off_a.new_tensor(self.shares)[:, None, None]
        left = torch.cat([off_b.transpose(0, 1).flatten(1), mean_b, -mean_b, mean_b - b], 1)
        right = torch.cat([(shares * off_a).flatten(0, 1), scale * mean_a, scale * (a - mean_a), scale * a])
        overlaps = (left.T @ left) * (right @ right.T)
        first = overlaps.shape[0] - 3 * rank
        parts = [slice(0, first), slice(first, first + rank), slice(first + rank, None)]

        def square(*chosen: slice) -> float:
            return max(0.0, float(sum(overlaps[i, j].sum() for i in chosen for j in chosen)))

        return _Squares(square(*parts[:2]), square(parts[0]), square(parts[0], parts[2]))

    def of_whole(self, gained: Tensor) -> _Squares:
        """Against a model that has gained [out, in] in this weight, in whatever way."""
        mean = self.mean_of_products
        differences = mean, mean - self.product_of_means, mean - gained
        return _Squares(*(float(difference.square().sum()) for difference in differences))


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
            found = [
                self._compared(model.get_submodule(names.get(path, path)), weight)
                for path, weight in self._weights.items()
            ]
        self._weights = {}
        whole = sum(each.whole for each in found)
        of_factors, of_model = (
            (part / whole) ** 0.5 if whole > 0 else None
            for part in (sum(each.factors for each in found), sum(each.model for each in found))
        )
        self.points.append({"round": round, "factors": of_factors, "model": of_model})

    @staticmethod
    def _compared(module: Any, weight: _Weight) -> _Squares:
        """What the round left in an adapted weight, what was added to it and its product, against what clients sent."""
        b, a = (_plain(getattr(module, f"lora_{f}")["default"].weight) for f in "BA")
        now, scale = module.base_layer.weight.detach().to("cpu"), module.scaling["default"]
        # Compared by value: a method may write to a weight in ways that leave no trace.
        if torch.equal(now, weight.before):
            return weight.of_products((b * (scale / sum(weight.shares)), a))
        return weight.of_whole(_plain(now) - _plain(weight.before) + scale * (b @ a))

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


def _padded(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors [out, r] and [r, in] of at least this rank, what they lack of it being zeros."""
    if len(a) >= rank:
        return b, a
    return torch.nn.functional.pad(b, (0, rank - len(a))), torch.nn.functional.pad(a, (0, 0, 0, rank - len(a)))


def _plain(tensor: Tensor | nn.Parameter) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)
