"""Gradient error: how far the gradient a client computes on the proxy is from the FM's own.

FedPFT's theorem bounds what proxy tuning loses by this error; it is measured here, at the same tunable values and
on the same probe batch, dropout off, in fp32.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedbench.api.messages import State
from fedbench.api.sides import Server
from fedbench.data.examples import Examples
from fedbench.forward.feed import forward
from fedbench.machine.device import Execution
from fedbench.machine.stopwatch import Stopwatch
from fedbench.machine.workers import fork_map
from fedbench.measures.observer import Observer
from fedbench.models.parts import Parts
from fedbench.models.weights import tunable_names
from fedbench.objectives.named import objective_of


def gradients(
    model: nn.Module, names: list[str], probe: Examples, execution: Execution, size: int = 16
) -> dict[str, Tensor]:
    """Gradient of the mean loss over all that `probe` asks for, by parameter name, as float64 on the CPU.

    Computed in fp32 whatever the precision of `execution`.
    """
    parameters = dict(model.named_parameters())
    values = [parameters[n] for n in names]
    before = [p.requires_grad for p in values]
    batches = probe.length_sorted_batches(size)
    objective = objective_of(probe.objective)
    count = objective.count(probe.labels)

    def gradient(indices: np.ndarray) -> list[np.ndarray]:
        batch = probe.batch(indices, execution.device)
        loss = objective.total(passing.logits(batch, objective.padded), batch.labels) / count
        return [grad.double().cpu().numpy() for grad in torch.autograd.grad(loss, values)]

    model.eval()
    try:
        for p in values:
            p.requires_grad_(True)
        costs = [float(probe.lengths[b].sum()) for b in batches]
        with forward(model, execution.exact, gradients=True) as passing:
            parts = dict(fork_map(gradient, batches, execution.workers, costs))
    finally:
        for p, required in zip(values, before, strict=True):
            p.requires_grad_(required)
    # Summed in the order of the batches, whichever was done first.
    sums = [sum(arrays) for arrays in zip(*(parts[i] for i in range(len(batches))), strict=True)]
    return {n: torch.from_numpy(np.asarray(g)) for n, g in zip(names, sums, strict=True)}


def compare(proxy: Mapping[str, Tensor], fm: Mapping[str, Tensor]) -> dict[str, float | None]:
    """|| g_proxy - g_FM || / || g_FM || and the cosine, over the tensors of `fm`; those `proxy` lacks count as zero.

    None where the FM's gradient is zero, and for the cosine also where the proxy's is: not a number, not a zero.
    """
    difference = reference = product = own = 0.0
    for name, g in fm.items():
        p = proxy.get(name)
        difference += float(((p if p is not None else 0.0) - g).square().sum())
        reference += float(g.square().sum())
        if p is not None:
            product += float((p * g).sum())
            own += float(p.square().sum())
    if reference == 0.0:
        return {"error": None, "cosine": None}
    return {
        "error": (difference / reference) ** 0.5,
        "cosine": product / (reference * own) ** 0.5 if own > 0.0 else None,
    }


def aggregation_error(tunables: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> float | None:
    """|| mean(B_i A_i) - mean(B_i) mean(A_i) ||_F / || mean(B_i A_i) ||_F over all LoRA pairs of some clients.

    What averaging the factors of LoRA loses against averaging their products, with these weights. None where there is
    no LoRA, or nothing to lose: B is zero.
    """
    shares = [w / sum(weights) for w in weights]
    lost = whole = 0.0
    for name in (n for n in tunables[0] if ".lora_A." in n):
        a = [t[name].double() for t in tunables]
        b = [t[name.replace(".lora_A.", ".lora_B.")].double() for t in tunables]
        products = torch.stack([s * (y @ x) for s, x, y in zip(shares, a, b, strict=True)]).sum(0)
        means = [torch.stack([s * x for s, x in zip(shares, each, strict=True)]).sum(0) for each in (b, a)]
        lost += float((products - means[0] @ means[1]).square().sum())
        whole += float(products.square().sum())
    return (lost / whole) ** 0.5 if whole > 0.0 else None


def gradient_error(
    proxy: Mapping[str, Tensor],
    fm: Mapping[str, Tensor],
    layer_of: Callable[[str], int | None],
    is_head: Callable[[str], bool],
) -> dict[str, Any]:
    """The record's block for one point: restricted to the proxy's tensors, zero-filled, LoRA, head, and per FM layer.

    Both mappings are by FM name; `layer_of` and `is_head` read FM names.
    """
    shared = {n: g for n, g in fm.items() if n in proxy}
    layers: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for name, g in fm.items():
        if (layer := layer_of(name)) is not None:
            layers[layer][name] = g
    return {
        "restricted": compare(proxy, shared),
        "zero_filled": compare(proxy, fm),
        "lora": compare(proxy, {n: g for n, g in shared.items() if not is_head(n)}),
        "head": compare(proxy, {n: g for n, g in shared.items() if is_head(n)}),
        "layers": [{"layer": layer, **compare(proxy, layers[layer])} for layer in sorted(layers)],
    }


class GradientErrors(Observer):
    """Gradient error along the method's own trajectory, on the probe rows; nothing where there is no proxy.

    Points: before the first round, before and after each alignment, and after rounds of evaluation without one.
    """

    name = "gradient_error"

    def __init__(self, probe: Examples, execution: Execution, time: Stopwatch) -> None:
        self.probe, self.execution, self.time = probe, execution, time
        self.points: list[dict[str, Any]] = []
        self._noted = 0
        self._reference: dict[str, Tensor] | None = None
        self._aligned = -1

    def started(self, server: Server) -> None:
        self.measure(server, -1, "start")

    def aligning(self, round: int, server: Server) -> None:
        self._reference = self.measure(server, round, "before_alignment")

    def aligned(self, round: int, server: Server) -> None:
        self.measure(server, round, "after_alignment", self._reference)
        self._reference, self._aligned = None, round

    def ended(self, round: int, server: Server, due: bool) -> Mapping[str, Any]:
        if due and self._aligned != round:
            self.measure(server, round, "round")
        return {}

    def measure(
        self, server: Server, round: int, phase: str, reference: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor] | None:
        """Append one point; nothing where there is no proxy.

        Returns the FM's gradient, which is the `reference` of another point at the same tunable values.
        """
        proxy = server.put_in_proxy()
        if proxy is None or len(self.probe) == 0 or (fm := server.put_in_fm()) is None:
            return None
        with self.time("gradient"):
            names = server.fm_names()
            if reference is None:
                reference = gradients(fm, tunable_names(fm), self.probe, self.execution)
            mine = gradients(proxy, list(names), self.probe, self.execution)
            parts = Parts(fm)
            block = gradient_error({names[n]: g for n, g in mine.items()}, reference, parts.layer_of, parts.is_head)
        self.points.append({"round": round, "phase": phase, **block})
        return reference

    def block(self, server: Server) -> dict[str, Any] | None:
        # The headline is over all of the FM's tunables: the one set that is the same for every method.
        errors = [e for point in self.points if (e := point["zero_filled"]["error"]) is not None]
        if not errors:
            return None
        return {"points": self.points, "start": errors[0], "mean": float(np.mean(errors)), "final": errors[-1]}

    def notes(self) -> list[Any]:
        new, self._noted = self.points[self._noted :], len(self.points)
        return new

    def restore(self, state: State | None, notes: Sequence[Any]) -> None:
        self.points, self._noted = list(notes), len(notes)
