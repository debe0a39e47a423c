"""Compression and distillation shared by the proxy methods.

Neuron saliency for the layer-wise compression of FFNs (FedPFT, Peng et al. 2024, section 3.2), the residuals of a
distillation, and the cache of distilled proxies. The distillation itself is in `methods/_layerwise.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
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
from fedbench.forward.feed import Forward
from fedbench.machine.device import Execution
from fedbench.methods._layerwise import LayerLoss, Schedule, distil, ffn_product, hidden_loss, weight_loss
from fedbench.methods.fedavg_lora import AdapterServer, TuningMethod
from fedbench.models.foundation import FoundationModel
from fedbench.models.parts import Parts
from fedbench.models.weights import checkpoint_name, get_tensors, set_tensors
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

    def due(self, t: int, round: int) -> bool:
        """Whether an alignment follows this round, of one every `t` rounds, 0 for none."""
        # After the last round it could help no client any more.
        return t > 0 and (round + 1) % t == 0 and round + 1 < self.ctx.federation.rounds


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
    loss: LayerLoss,
    public: Examples,
    schedule: Schedule,
    ctx: ServerContext,
    ingredients: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Distil `student` before federated learning, or take what the same distillation gave before from the cache.

    Returns the residuals of each pair of layers, after and before, and their course in between. `ingredients`: what the
    result depends on besides public rows, schedule, stream, device and torch, which are added here.
    """

    names = {checkpoint_name(name): name for name in trainable}

    def make() -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        before = residuals(teacher, student, loss.pairs, public, ctx.execution)
        course = np.zeros((0, len(loss.pairs)))
        if schedule.steps:
            rng = ctx.streams.numpy("distillation")
            course = distil(teacher, student, trainable, loss, public, schedule, rng, ctx.execution)
        after = residuals(teacher, student, loss.pairs, public, ctx.execution)
        values = [
            {**a, "hidden_before": b["hidden"], "weight_before": b["weight"], "curve": curve(course[:, i])}
            for i, (a, b) in enumerate(zip(after, before, strict=True))
        ]
        tensors = get_tensors(student, trainable)
        return {there: tensors[name] for there, name in names.items()}, values

    everything = {
        **ingredients,
        "schedule": asdict(schedule),
        "public": public.content_hash(),
        # The batches come from the stream; where nothing is distilled, none are drawn.
        "stream": ctx.streams.integer("distillation") if schedule.steps else None,
        "device": ctx.device.type,
        "torch": torch.__version__,
        "curve": True,
    }
    tensors, values = cached(ctx.cache, everything, make)
    set_tensors(student, {names[there]: tensor for there, tensor in tensors.items()})
    return list(values)


def curve(course: np.ndarray) -> list[float]:
    """The residuals of all steps, [steps], as the means of at most ten stretches of about equal length, in order."""
    return [float(part.mean()) for part in np.array_split(course, min(10, len(course)) or 1) if len(part)]


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
