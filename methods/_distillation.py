"""Compression and distillation shared by the proxy methods.

Neuron saliency and layer-wise compression of FFNs, the layer-level distillation loss and its training loop
(FedPFT, Peng et al. 2024, sections 3.2 and 3.3), and the cache of distilled proxies.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedbench.api.context import ServerContext
from fedbench.api.sides import Method
from fedbench.data.examples import Examples
from fedbench.errors import FedbenchError
from fedbench.files import cached_tensors
from fedbench.forward.feed import Forward, forward
from fedbench.machine.device import Execution
from fedbench.methods.fedavg_lora import AdapterServer, TuningMethod
from fedbench.models.foundation import FoundationModel
from fedbench.models.parts import Parts
from fedbench.models.weights import checkpoint_name, frozen_state, load_frozen, set_tensors
from fedbench.records.text import canonical_json


def required(method: Method, public: Examples | None) -> Examples:
    """The public rows a method distils on. Raises FedbenchError where the scenario has none."""
    if public is None:
        raise FedbenchError(f"{method.name} distils on public data; give the scenario a [public] table")
    return public


class ProxyServer(AdapterServer):
    """Keeps the FM, and a proxy of it made of FM and public data, which is what clients are sent.

    Subclasses set `model`, the proxy, and `distilled`, the residuals of its distillation.
    """

    setup = "sub_fm"

    def __init__(self, method: TuningMethod, fm: FoundationModel, public: Examples, ctx: ServerContext) -> None:
        super().__init__(method, fm, ctx)
        self.public = public
        self.distilled: list[dict[str, Any]] = []

    def put_in_proxy(self) -> nn.Module:
        set_tensors(self.model, self.values)
        return self.model

    def residuals(self) -> Sequence[Mapping[str, Any]]:
        return self.distilled


def saliency(w_in: Tensor, w_out: Tensor, w_gate: Tensor | None = None) -> Tensor:
    """Saliency of each FFN neuron, [d_ff]: the L2 norm of its input and output weights, biases excluded.

    w_in: [d_ff, d], w_out: [d, d_ff] (FedPFT, section 3.2); w_gate: [d_ff, d] of a gated FFN, which counts as input.
    """
    squares = w_in.double().square().sum(1) + w_out.double().square().sum(0)
    if w_gate is not None:
        squares += w_gate.double().square().sum(1)
    return squares.sqrt()


def most_salient(w_in: Tensor, w_out: Tensor, keep: int, w_gate: Tensor | None = None) -> Tensor:
    """Indices of the `keep` most salient neurons in their original order; of equals, the earlier one stays."""
    order = torch.sort(saliency(w_in, w_out, w_gate), descending=True, stable=True).indices
    return order[:keep].sort().values


def hidden_loss(teacher: Tensor, student: Tensor, mask: Tensor | None) -> Tensor:
    """MSE of two hidden states [B, T, d] over real tokens, relative to the teacher's mean square."""
    if mask is not None:
        teacher, student = teacher[mask.bool()], student[mask.bool()]
    return (student - teacher).square().mean() / teacher.square().mean()


def ffn_product(parts: Parts, layer: int) -> Tensor:
    """W2 · W1 of a layer's FFN, [d, d]: the linear part of what the FFN does; of a gated one, down · up."""
    up, down, _ = parts.ffn_weights(layer)
    return down @ up


def weight_loss(teacher: Tensor, student: Tensor) -> Tensor:
    """MSE of two FFN products [d, d], relative to the teacher's mean square; the gradient reaches the student."""
    return (student - teacher).square().mean() / teacher.square().mean()


@dataclass(frozen=True, slots=True)
class Schedule:
    """A distillation run: AdamW, linear warm-up over `warmup` of the steps, then linear decay to 0."""

    steps: int
    batch_size: int
    lr: float
    warmup: float = 0.048
    weight_decay: float = 0.01
    clip_norm: float = 1.0

    def factor(self, step: int) -> float:
        """Share of `lr` at `step` (from 0)."""
        rise = max(1, math.ceil(self.warmup * self.steps))
        return (step + 1) / rise if step < rise else (self.steps - step) / max(1, self.steps - rise)


LayerLoss = Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | None], Tensor]


def distil(
    teacher: nn.Module,
    student: nn.Module,
    trainable: Sequence[str],
    loss: LayerLoss,
    public: Examples,
    schedule: Schedule,
    rng: np.random.Generator,
    execution: Execution,
    rows: Mapping[str, tuple[int, Tensor]] | None = None,
) -> None:
    """Train the named parameters of `student` in place against `teacher` on unlabelled public rows.

    `loss` maps (teacher's layer outputs, student's, mask) to a scalar. `rows` limits a parameter to an index along a
    dimension: (dim, index); everything else of it keeps its exact value, free of weight decay too.
    """
    parameters, device = dict(student.named_parameters()), execution.device
    chosen = {name: parameters[name] for name in trainable}
    limits = {}
    for name, (dim, index) in (rows or {}).items():
        free = torch.zeros(chosen[name].shape[dim], dtype=torch.bool, device=device)
        free[index.to(device)] = True
        limits[name] = (
            free.unsqueeze(1) if dim == 0 and chosen[name].dim() == 2 else free,
            chosen[name].detach().clone(),
        )
    optimiser = torch.optim.AdamW(chosen.values(), lr=schedule.lr, weight_decay=schedule.weight_decay)
    teacher.eval()
    student.eval()
    try:
        for p in chosen.values():
            p.requires_grad_(True)
        with forward(teacher, execution.exact) as theirs, forward(student, execution.exact, gradients=True) as ours:
            for step, indices in enumerate(public_batches(len(public), schedule, rng)):
                batch = public.batch(indices, device)
                with torch.no_grad():
                    target, _ = theirs.layer_outputs(batch)
                value = loss(target, *ours.layer_outputs(batch))
                optimiser.zero_grad()
                value.backward()
                for name, (free, _) in limits.items():
                    if (grad := chosen[name].grad) is not None:
                        grad.mul_(free)
                nn.utils.clip_grad_norm_(chosen.values(), schedule.clip_norm)
                for group in optimiser.param_groups:
                    group["lr"] = schedule.lr * schedule.factor(step)
                optimiser.step()
                with torch.no_grad():
                    for name, (free, start) in limits.items():
                        chosen[name].copy_(torch.where(free, chosen[name], start))
    finally:
        for p in chosen.values():
            p.requires_grad_(False)
            p.grad = None


def public_batches(rows: int, schedule: Schedule, rng: np.random.Generator) -> list[np.ndarray]:
    """Row indices of each step: passes over fresh permutations of the public rows."""
    size = min(schedule.batch_size, rows)
    per_pass = rows // size
    out: list[np.ndarray] = []
    while len(out) < schedule.steps:
        order = rng.permutation(rows)
        out += [order[i * size : (i + 1) * size] for i in range(per_pass)]
    return out[: schedule.steps]


@torch.no_grad()
def residuals(
    teacher: nn.Module,
    student: nn.Module,
    pairs: Sequence[tuple[int, int]],
    public: Examples,
    execution: Execution,
) -> list[dict[str, Any]]:
    """Both terms of the loss for each pair (teacher layer, student layer), on the first 128 public rows."""
    rows = np.arange(min(128, len(public)))
    hidden = np.zeros(len(pairs))
    for chunk in np.array_split(rows, max(1, len(rows) // 32)):
        batch = public.batch(chunk, execution.device)
        (theirs, _), (ours, mask) = (Forward(m, execution.packed).layer_outputs(batch) for m in (teacher, student))
        for i, (t, s) in enumerate(pairs):
            hidden[i] += hidden_loss(theirs[t], ours[s], mask).item() * len(chunk) / len(rows)
    a, b = Parts(teacher), Parts(student)
    return [
        {
            "layer": t,
            "hidden": float(hidden[i]),
            "weight": weight_loss(ffn_product(a, t), ffn_product(b, s)).item(),
        }
        for i, (t, s) in enumerate(pairs)
    ]


def distil_once(
    teacher: nn.Module,
    student: nn.Module,
    trainable: Sequence[str],
    pairs: Sequence[tuple[int, int]],
    loss: LayerLoss,
    public: Examples,
    schedule: Schedule,
    ctx: ServerContext,
    ingredients: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Distil `student` before federated learning, or take what the same distillation gave before from the cache.

    Returns the residuals of each pair of layers, after and before. `ingredients`: what the result depends on besides
    public rows, schedule, stream, device and torch, which are added here.
    """

    def make() -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        before = residuals(teacher, student, pairs, public, ctx.execution)
        if schedule.steps:
            rng = ctx.streams.numpy("distillation")
            distil(teacher, student, trainable, loss, public, schedule, rng, ctx.execution)
        after = residuals(teacher, student, pairs, public, ctx.execution)
        values = [
            {**a, "hidden_before": b["hidden"], "weight_before": b["weight"]}
            for a, b in zip(after, before, strict=True)
        ]
        state = frozen_state(student)
        return {name: state[name] for name in map(checkpoint_name, trainable)}, values

    everything = {
        **ingredients,
        "schedule": asdict(schedule),
        "public": public.content_hash(),
        # The batches come from the stream; where nothing is distilled, none are drawn.
        "stream": ctx.streams.integer("distillation") if schedule.steps else None,
        "device": ctx.device.type,
        "torch": torch.__version__,
    }
    tensors, values = cached(ctx.cache, everything, make)
    load_frozen(student, frozen_state(student) | tensors)
    return list(values)


def cached(
    cache: Path, ingredients: Mapping[str, Any], make: Callable[[], tuple[dict[str, Tensor], Any]]
) -> tuple[dict[str, Tensor], Any]:
    """The tensors and JSON values of `make`, from the cache if something with these ingredients was made before.

    `ingredients` has to name everything the result depends on; its hash is the file's name. What is returned has been
    through the file either way, so a first run and a later one go on from the same bytes. A damaged file is made anew.
    """
    name = hashlib.sha256(canonical_json(ingredients).encode()).hexdigest()

    def computed() -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors, values = make()
        return tensors, {"values": json.dumps(values)}

    tensors, metadata = cached_tensors(cache / "proxies" / f"{name}.safetensors", computed)
    return tensors, json.loads(metadata["values"])
