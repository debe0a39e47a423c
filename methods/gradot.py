"""GradOT (ACL 2025, arXiv 2507.04455): an emulator compressed so that the adapters' gradients change least.

A reconstruction of what the paper says, whose code we have not seen. As in offsite-tuning the outer layers are tuned
and the middle is the emulator; here it keeps all its layers. The projections of their attention become products of two
matrices of a rank, their FFNs lose channels, and nothing is trained. A gradient reaches the front adapter through the
emulator, so what counts of a weight is what it does to that: with random directions v at the emulator's end, in the
place of a loss that a server without labels does not know, and g the gradient of <output, v>, a projection W becomes
the W' of its rank that is nearest in ||E[g g']^1/2 (W - W') E[x x']^1/2||, and of an FFN those channels stay whose
removal changes <output, v> most to first order, by E[(a · g)²].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from fedbench.api.context import ServerContext
from fedbench.api.messages import Source
from fedbench.api.sides import Server
from fedbench.data.examples import Examples
from fedbench.errors import FedbenchError
from fedbench.forward.feed import Forward
from fedbench.machine.workers import one_thread
from fedbench.methods._distillation import ProxyServer, required, residuals
from fedbench.methods._groups import ROWS
from fedbench.methods.fedavg_lora import LoraMethod
from fedbench.models.build import build
from fedbench.models.foundation import FoundationModel
from fedbench.models.parts import Parts
from fedbench.models.weights import frozen_state, load_frozen, tunable_names


class GradOT(LoraMethod):
    """GradOT's settings.

    front, back: layers that are tuned. rank: of the emulator's projections; None takes a quarter of the model's width.
    r: neurons kept in its FFNs; None keeps half. With plain FFNs of four times the width that is, to the parameter of a
    matrix, what fedpft's default of a quarter of the neurons holds.
    """

    name: ClassVar[str] = "gradot"
    version: ClassVar[int] = 1
    needs: ClassVar[Literal["sum", "each"]] = "sum"

    front: int = Field(1, ge=1)
    back: int = Field(1, ge=1)
    rank: int | None = Field(None, ge=1)
    r: int | None = Field(None, ge=1)

    def server(self, fm: FoundationModel, public: Examples | None, ctx: ServerContext) -> Server:
        return GradOTServer(self, fm, required(self, public), ctx)


@dataclass
class Felt:
    """What a linear layer is given and how its output is felt: sums of x x' [in, in] and g g' [out, out] over tokens.

    channels: of each input, the sum of (x · its gradient)², [in].
    """

    inputs: Tensor | float = 0.0
    outputs: Tensor | float = 0.0
    channels: Tensor | float = 0.0


def felt(
    model: nn.Module, paths: Sequence[str], front: int, end: int, public: Examples, rng: np.random.Generator
) -> dict[str, Felt]:
    """Of these linear layers, on the first public rows: v is drawn for each real token at the end of layer `end`."""
    found = {path: Felt() for path in paths}
    parts = Parts(model)
    device = next(model.parameters()).device
    mask: list[Tensor | None] = [None]

    def real(x: Tensor) -> Tensor:
        tokens = x.detach() if mask[0] is None else x.detach()[mask[0].bool()]
        return tokens.reshape(-1, x.shape[-1]).double()

    def watch(path: str, _layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        own, x = found[path], inputs[0]
        own.inputs = own.inputs + real(x).T @ real(x)

        def of_output(grad: Tensor) -> None:
            own.outputs = own.outputs + real(grad).T @ real(grad)

        def of_input(grad: Tensor) -> None:
            own.channels = own.channels + (real(x) * real(grad)).square().sum(0)

        output.register_hook(of_output)
        x.register_hook(of_input)

    def begin(_layer: nn.Module, inputs: tuple[Any, ...], given: Mapping[str, Any]) -> None:
        (inputs[0] if inputs else given["hidden_states"]).requires_grad_()

    hooks = [parts.layer(front).register_forward_pre_hook(begin, with_kwargs=True)]
    hooks += [model.get_submodule(path).register_forward_hook(partial(watch, path)) for path in paths]
    try:
        rows = np.arange(min(ROWS, len(public)))
        for chunk in np.array_split(rows, max(1, len(rows) // 32)):
            batch = public.batch(chunk, device)
            mask[0] = batch.mask
            states, _ = Forward(model, packed=False).layer_outputs(batch, end)
            v = torch.from_numpy(rng.standard_normal(states[end].shape)).to(states[end])
            (states[end] * v * (1 if batch.mask is None else batch.mask[..., None])).sum().backward()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def root(moment: Tensor, inverse: bool = False) -> Tensor:
    """The square root of a second moment, or its inverse, in fp64, with a thousandth of its mean on the diagonal."""
    values, vectors = torch.linalg.eigh(moment.double())
    values = values.clamp(min=0) + 1e-3 * float(moment.diagonal().mean()) + 1e-30
    return (vectors * (values.rsqrt() if inverse else values.sqrt())) @ vectors.T


def factors(weight: Tensor, inputs: Tensor, outputs: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """up [out, rank] and down [rank, in], whose product is nearest to weight [out, in] as the two moments weigh it."""
    u, s, vt = torch.linalg.svd(root(outputs) @ weight.double() @ root(inputs), full_matrices=False)
    up = root(outputs, inverse=True) @ (u[:, :rank] * s[:rank])
    return up.to(weight.dtype), (vt[:rank] @ root(inputs, inverse=True)).to(weight.dtype)


class GradOTServer(ProxyServer):
    """Keeps the FM, and a proxy of it whose middle is compressed."""

    method: GradOT

    def __init__(self, method: GradOT, fm: FoundationModel, public: Examples, ctx: ServerContext) -> None:
        super().__init__(method, fm, public, ctx)
        self.fm_parts = Parts(self.full)
        self.middle = range(method.front, self.fm_parts.count - method.back)
        if not self.middle:
            raise FedbenchError(
                f"gradot: front {method.front} and back {method.back} leave no middle of {self.fm_parts.count} layers; "
                "set them lower"
            )
        paths = {i: self.fm_parts.attention_paths(i) for i in self.middle}
        ends = {i: self.fm_parts.ffn_out_path(i) for i in self.middle}
        every = list(dict.fromkeys([p for own in paths.values() for p in own] + list(ends.values())))
        with one_thread(), torch.enable_grad():
            rng = ctx.streams.numpy("directions-of-compression")
            sums = felt(self.full, every, method.front, self.middle[-1], public, rng)
        widths = {i: self.fm_parts.ffn_out(i).in_features for i in self.middle}
        self.kept = {i: _most(sums[ends[i]].channels, self._narrow(width)) for i, width in widths.items()}
        whole = frozen_state(self.full)
        width = whole[f"{paths[self.middle[0]][0]}.weight"].shape[1]
        self.rank = method.rank or max(1, width // 4)
        narrow = [len(self.kept[i]) if i in self.kept else n for i, n in enumerate(fm.spec.ffn_widths)]
        outer = tuple(i for i in range(self.fm_parts.count) if i not in self.middle)
        ranks = tuple(self.rank if i in self.middle else None for i in range(self.fm_parts.count))
        spec = fm.spec.with_ffn_widths(narrow).with_lora(replace(method.lora, layers=outer))
        self.spec = replace(spec, ranks=ranks)
        self.model = build(self.spec).to(ctx.device)
        self.values = {name: self.initial[name] for name in tunable_names(self.model)}
        made: dict[str, Tensor] = {}
        with one_thread():
            for path in dict.fromkeys(p for own in paths.values() for p in own):
                own, name = sums[path], f"{path}.weight"
                assert isinstance(own.inputs, Tensor) and isinstance(own.outputs, Tensor)
                made[f"{path}.up.weight"], made[f"{path}.down.weight"] = factors(
                    whole[name], own.inputs, own.outputs, self.rank
                )
                if f"{path}.bias" in whole:
                    made[f"{path}.up.bias"] = whole[f"{path}.bias"]
        sources = self.fm_sources()
        for name in frozen_state(self.model):
            if name not in made:
                source = sources.get(name)
                part = whole[name]
                index = None if source is None else source.index
                made[name] = part if source is None or index is None else part.index_select(source.dim, index)
        load_frozen(self.model, made)
        pairs = [(i, i) for i in self.middle]
        self.distilled = residuals(self.full, self.model, pairs, public, ctx.execution)

    def _narrow(self, width: int) -> int:
        keep = self.method.r if self.method.r is not None else max(1, width // 2)
        if keep > width:
            raise FedbenchError(f"gradot: r is {keep}, but an FFN of the FM has {width} neurons; set r lower")
        return keep

    def fm_names(self) -> Mapping[str, str]:
        return {name: name for name in self.values}

    def fm_sources(self) -> Mapping[str, Source]:
        return {
            slices.name: Source(slices.name, slices.dim, slices.index(kept, self.fm_parts.ffn_out(i).in_features))
            for i, kept in self.kept.items()
            for slices in self.fm_parts.neurons(i).values()
        }


def _most(channels: Tensor | float, keep: int) -> Tensor:
    """Indices, in order, of the channels that are felt most; of equals the earlier."""
    assert isinstance(channels, Tensor)
    return torch.sort(channels, descending=True, stable=True).indices[:keep].sort().values.cpu()
