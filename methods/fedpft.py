"""FedPFT: Federated Proxy Fine-Tuning (Peng et al., IJCAI 2024, arXiv 2404.11536).

The server narrows the FM's FFNs to their most salient neurons (sub-FM), distils the sub-FM layer by layer on public
data, and sends it to the clients, who tune LoRA and head on it. Every few rounds the least active neurons are
distilled again towards the tuned FM, and what changed is sent. Finally LoRA and head are plugged into the FM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fedbench.api.context import ClientContext, ServerContext
from fedbench.api.local import LocalResult, LocalTask, Statistic
from fedbench.api.messages import ClientId, Message, Source, State, TensorSpec
from fedbench.api.sides import Client, Server
from fedbench.data.examples import Examples
from fedbench.errors import FedbenchError, MessageError
from fedbench.methods._distillation import ProxyServer, distil_once, most_salient, required
from fedbench.methods._layerwise import LayerLoss, Schedule, distil, ffn_product, weight_loss
from fedbench.methods.fedavg_lora import AdapterClient, LoraMethod, count
from fedbench.models.build import build
from fedbench.models.foundation import FoundationModel
from fedbench.models.parts import NeuronSlices, Parts
from fedbench.models.spec import LoraSpec
from fedbench.models.weights import frozen_state, load_frozen, set_tensors, tunable_names

ZeroRule = Literal["non-positive", "exact-zero", "abs-below-eps"]
Choice = Literal["highest", "lowest", "random"]


class FedPFT(LoraMethod):
    """FedPFT's hyper-parameters; symbols are the paper's.

    r: neurons kept in a compressed FFN; None keeps a quarter. layers_retained: layers that keep their whole FFN.
    mu: weight of the regulariser on W2·W1. t: rounds between alignments, 0 for none. p: share of a layer's neurons
    each alignment may change. choice: which ones, those of highest APoZ (least active), of lowest, or any. zero_rule:
    which activations count as zero; for GELU, whose exact zeros are rare, "non-positive" is "pre-activation at most 0";
    "abs-below-eps" counts |activation| < zero_eps.
    """

    name: ClassVar[str] = "fedpft"
    version: ClassVar[int] = 1
    needs: ClassVar[Literal["sum", "each"]] = "sum"

    r: int | None = Field(None, ge=1)
    layers_retained: tuple[int, ...] | None = None
    mu: float = Field(0.01, ge=0)
    distil_steps: int = Field(200, ge=0)
    distil_batch: int = Field(32, ge=1)
    distil_lr: float = Field(6e-4, gt=0)
    t: int = Field(10, ge=0)
    p: float = Field(0.5, gt=0, le=1)
    choice: Choice = "highest"
    align_steps: int = Field(20, ge=1)
    align_lr: float = Field(6e-4, gt=0)
    zero_rule: ZeroRule = "non-positive"
    zero_eps: float = Field(1e-3, gt=0)

    def retained(self, layers: int) -> tuple[int, ...]:
        """Layers that keep their whole FFN: as set (negative counts from the end), else the first and the last."""
        chosen = (0, layers - 1) if self.layers_retained is None else self.layers_retained
        if bad := [i for i in chosen if not -layers <= i < layers]:
            raise FedbenchError(
                f"fedpft: layers_retained names layer {bad[0]}, but the FM has layers 0 to {layers - 1}"
            )
        return tuple(sorted({i % layers for i in chosen}))

    def narrow(self, width: int) -> int:
        """Neurons a compressed FFN of `width` neurons keeps."""
        keep = self.r if self.r is not None else width // 4
        if keep > width:
            raise FedbenchError(f"fedpft: r is {keep}, but an FFN of the FM has {width} neurons; set r lower")
        return keep

    def widths(self, full: Sequence[int]) -> tuple[int, ...]:
        """FFN widths of the sub-FM of an FM with these."""
        retained = self.retained(len(full))
        return tuple(width if i in retained else self.narrow(width) for i, width in enumerate(full))

    def server(self, fm: FoundationModel, public: Examples | None, ctx: ServerContext) -> Server:
        return FedPFTServer(self, fm, required(self, public), ctx)

    def client(self, ctx: ClientContext) -> Client:
        return FedPFTClient(self, ctx)


def zeros(rule: ZeroRule, eps: float) -> Statistic:
    """The statistic that counts zeros of each neuron: activations [N, d_ff] -> counts [d_ff], int64.

    Of a gated FFN the activations are activation(gate) · |up|: "non-positive" counts shut gates, the other rules go by
    the size of what the neuron gives.
    """
    tests = {
        "non-positive": lambda a: a <= 0,
        "exact-zero": lambda a: a == 0,
        "abs-below-eps": lambda a: a.abs() < eps,
    }
    return lambda activation: tests[rule](activation).sum(0, dtype=torch.int64)


def highest(apoz: Tensor, share: float) -> Tensor:
    """Indices, in order, of the `share` of neurons with the highest APoZ; of equals, the earlier ones."""
    order = torch.sort(apoz, descending=True, stable=True).indices
    return order[: max(1, round(share * len(apoz)))].sort().values


class FedPFTServer(ProxyServer):
    """Keeps FM and sub-FM, distils before and aligns during federated learning."""

    method: FedPFT

    def __init__(self, method: FedPFT, fm: FoundationModel, public: Examples, ctx: ServerContext) -> None:
        super().__init__(method, fm, public, ctx)
        self.fm_parts = Parts(self.full)
        widths, retained = method.widths(fm.spec.ffn_widths), method.retained(self.fm_parts.count)
        self.compressed = [i for i in range(self.fm_parts.count) if i not in retained]
        self.kept = {}
        for i in self.compressed:
            up, down, gate = self.fm_parts.ffn_weights(i)
            self.kept[i] = most_salient(up, down, widths[i], gate)
        lora = self.client_lora(fm)
        if lora.on_ffns and (changed := [*self.aligned]):
            raise FedbenchError(
                f"{method.name}: lora_targets is {method.lora_targets!r}, but the sub-FM's FFN of layer {changed[0]} "
                "is not the FM's, which has no place for its adapters; set lora_targets to attention, or keep all "
                "layers whole by layers_retained"
            )
        self.spec = self.spec.with_ffn_widths(widths).with_lora(lora)
        self.model = build(self.spec).to(ctx.device)
        self.parts = Parts(self.model)
        self.values = {name: self.initial[name] for name in tunable_names(self.model)}
        whole = frozen_state(self.full)
        sources = self.fm_sources()
        load_frozen(
            self.model,
            {
                name: whole[name] if name not in sources else _take(whole[name], sources[name])
                for name in frozen_state(self.model)
            },
        )
        set_tensors(self.model, self.values)
        self.distilled = self._distil(fm)
        # Version at which each neuron of an aligned layer last changed; 0 is the sub-FM as first sent.
        self.changed = {i: torch.zeros(widths[i], dtype=torch.int64) for i in self.aligned}
        self.apoz: dict[int, Tensor] = {}

    def client_lora(self, fm: FoundationModel) -> LoraSpec:
        """The adapters clients train."""
        return self.method.lora

    @property
    def aligned(self) -> Sequence[int]:
        """Layers that are distilled again during federated learning."""
        return self.compressed

    def _shared_names(self, layer: int) -> list[str]:
        """The output bias and, in post-norm models, the norm behind the FFN, where there are any; updated whole."""
        modules = [self.parts.ffn_out_path(layer), self.parts.ffn_norm_path(layer)]
        found = [f"{path}.{name}" for path in modules if path for name in ("weight", "bias")]
        known = dict(self.model.named_parameters())
        return [name for name in found if name in known and name != f"{modules[0]}.weight"]

    def _trainable(self, layers: Sequence[int]) -> list[str]:
        return [
            name
            for i in layers
            for name in [slices.name for slices in self.parts.neurons(i).values()] + self._shared_names(i)
        ]

    def product(self, layer: int) -> Tensor:
        """W2 · W1 of the sub-FM, [d, d], as the regulariser sees it."""
        return ffn_product(self.parts, layer)

    def loss(self, layers: Sequence[int], mu: float) -> LayerLoss:
        """The layer-level loss over `layers` (section 3.3)."""
        pairs = [(i, i) for i in layers]
        if not mu:
            return LayerLoss(pairs)
        products = {i: ffn_product(self.fm_parts, i).detach() for i in layers}

        def regulariser() -> Tensor:
            return mu * torch.stack([weight_loss(products[i], self.product(i)) for i in layers]).mean()

        return LayerLoss(pairs, regulariser)

    def ingredients(self, fm: FoundationModel) -> dict[str, Any]:
        """What distillation before federated learning depends on, besides data and schedule."""
        m = self.method
        return {"method": ["fedpft", m.version], "mu": m.mu, "widths": self.spec.ffn_widths, "fm": fm.content_hash}

    def _distil(self, fm: FoundationModel) -> list[dict[str, Any]]:
        """Layer-level distillation before federated learning; returns the residuals before and after."""
        if not self.compressed:
            return []
        m = self.method
        return distil_once(
            self.full,
            self.model,
            self._trainable(self.compressed),
            self.loss(self.compressed, m.mu),
            self.public,
            Schedule(m.distil_steps, m.distil_batch, m.distil_lr),
            self.ctx,
            self.ingredients(fm),
        )

    def aligns(self, round: int) -> bool:
        return bool(self.aligned) and self.due(self.method.t, round)

    def adapter_meta(self, round: int) -> dict[str, int | float | str | bool]:
        layers = ",".join(map(str, self.aligned)) if self.aligns(round) else ""
        return super().adapter_meta(round) | {"count_zeros": layers}

    def expected(self, round: int, client: ClientId) -> Mapping[str, Mapping[str, TensorSpec]]:
        expected = dict(super().expected(round, client))
        if self.aligns(round):
            expected["statistics"] = {
                f"zeros.{i}": TensorSpec((self.spec.ffn_widths[i],), torch.int64) for i in self.aligned
            }
        return expected

    def accept(self, round: int, messages: Sequence[Message]) -> None:
        super().accept(round, messages)
        for message in messages:
            if message.kind == "statistics":
                tokens = count(message, "tokens")
                if any(bool((zeros < 0).any() or (zeros > tokens).any()) for zeros in message.tensors.values()):
                    raise MessageError(f"statistics: a neuron was zero less than 0 or more than {tokens} times")

    def aggregate(self, round: int, uploads: Mapping[ClientId, Sequence[Message]]) -> None:
        super().aggregate(round, uploads)
        if self.aligns(round):
            counts = [m for messages in uploads.values() for m in messages if m.kind == "statistics"]
            tokens = sum(count(m, "tokens") for m in counts)
            self.apoz = {
                i: torch.stack([m.tensors[f"zeros.{i}"] for m in counts]).sum(0).double() / tokens for i in self.aligned
            }

    def rank(self, round: int, layer: int) -> Tensor:
        """What neurons are chosen by, [d_ff]; the highest are the ones an alignment changes."""
        apoz = self.apoz[layer]
        if self.method.choice == "random":
            return torch.from_numpy(self.ctx.streams.numpy("alignment-choice", round, layer).random(len(apoz)))
        return -apoz if self.method.choice == "lowest" else apoz

    def neurons(self, round: int, layer: int) -> Tensor:
        """Indices, in order, of the neurons of a layer that an alignment changes."""
        return highest(self.rank(round, layer), self.method.p)

    def teacher(self) -> nn.Module:
        """Whose layer outputs an alignment distils towards: the FM with the aggregated tunables."""
        return self.put_in_fm()

    def student(self) -> nn.Module:
        """What an alignment changes: the sub-FM with the aggregated tunables."""
        return self.put_in_proxy()

    def align(self, round: int) -> None:
        """Neuron-level distillation (section 3.4): the chosen neurons move, the rest keep their values."""
        if not self.aligns(round) or not self.apoz:
            return
        self.version += 1
        m = self.method
        rows: dict[str, tuple[int, Tensor]] = {}
        for i in self.aligned:
            chosen = self.neurons(round, i)
            self.changed[i][chosen] = self.version
            rows |= {s.name: (s.dim, s.index(chosen, self.spec.ffn_widths[i])) for s in self.parts.neurons(i).values()}
        distil(
            self.teacher(),
            self.student(),
            self._trainable(self.aligned),
            self.loss(self.aligned, 0.0),
            self.public,
            Schedule(m.align_steps, m.distil_batch, m.align_lr),
            self.ctx.streams.numpy("alignment", round),
            self.ctx.execution,
            rows,
        )
        self.apoz = {}

    def update_since(self, version: int) -> Message:
        """W_fro: every neuron that changed after `version`, with its index, and the tensors updated as a whole."""
        state = frozen_state(self.model)
        tensors: dict[str, Tensor] = {}
        for i in self.aligned:
            index = (self.changed[i] > version).nonzero().squeeze(1)
            tensors[f"{i}.index"] = index.to(torch.int32)
            for role, slices in self.parts.neurons(i).items():
                places = slices.index(index, self.spec.ffn_widths[i])
                tensors[f"{i}.{role}"] = state[slices.name].cpu().index_select(slices.dim, places)
            tensors |= {f"{i}.whole.{name}": state[name] for name in self._shared_names(i)}
        names = {f"{i}.{role}": slices.name for i in self.aligned for role, slices in self.parts.neurons(i).items()}
        return Message("alignment", tensors, names)

    def fm_names(self) -> Mapping[str, str]:
        return {name: name for name in self.values}

    def fm_sources(self) -> Mapping[str, Source]:
        return {
            slices.name: Source(slices.name, slices.dim, slices.index(self.kept[i], fm_width))
            for i, fm_width in ((i, self.fm_parts.ffn_out(i).in_features) for i in self.compressed)
            for slices in self.fm_parts.neurons(i).values()
        }

    def state(self) -> State:
        state = super().state()
        frozen = frozen_state(self.model)
        tensors = dict(state.tensors) | {f"model.{name}": frozen[name] for name in self._trainable(self.aligned)}
        tensors |= {f"changed.{i}": versions for i, versions in self.changed.items()}
        return State(tensors, state.values)

    def restore(self, state: State) -> None:
        super().restore(state)
        tensors = {name: state.tensors[f"model.{name}"] for name in self._trainable(self.aligned)}
        load_frozen(self.model, frozen_state(self.model) | tensors)
        self.changed = {i: state.tensors[f"changed.{i}"].clone() for i in self.changed}


def _take(tensor: Tensor, source: Source) -> Tensor:
    return tensor if source.index is None else tensor.index_select(source.dim, source.index.to(tensor.device))


class FedPFTClient(AdapterClient):
    """Also counts zeros of FFN activations when asked to, and patches its sub-FM with what an alignment changed."""

    method: FedPFT

    def __init__(self, method: FedPFT, ctx: ClientContext) -> None:
        super().__init__(method, ctx)
        self.paths: dict[str, str] = {}

    def receive(self, message: Message) -> None:
        if message.kind != "alignment":
            super().receive(message)
            return
        patched = dict(self.frozen)
        for name, value in message.tensors.items():
            layer, _, role = name.partition(".")
            if role.startswith("whole."):
                patched[role.removeprefix("whole.")] = value
            elif role != "index":
                target, dim = str(message.meta[name]), 1 if role == "w_out" else 0
                before, index = patched[target], message.tensors[f"{layer}.index"].long()
                if len(index):
                    # One layer may hold gate and up: then each neuron has two slices.
                    slices = NeuronSlices(target, dim, value.shape[dim] // len(index))
                    before = before.index_copy(dim, slices.index(index, before.shape[dim] // slices.times), value)
                patched[target] = before
        self.frozen = self.ctx.modules.intern(patched)

    def task(self, round: int, inbox: Sequence[Message], data: Examples) -> LocalTask:
        task = super().task(round, inbox, data)
        layers = next(str(m.meta["count_zeros"]) for m in inbox if m.kind == "adapter")
        parts = Parts(task.frozen.module)
        self.paths = {parts.ffn_activation_path(int(i)): i for i in layers.split(",") if i}
        statistic = zeros(self.method.zero_rule, self.method.zero_eps)
        task.observers = dict.fromkeys(self.paths, statistic)
        return task

    def upload(self, round: int, result: LocalResult) -> Sequence[Message]:
        messages = list(super().upload(round, result))
        if self.paths:
            counts = {f"zeros.{layer}": result.observed[path] for path, layer in self.paths.items()}
            messages.append(Message("statistics", counts, {"tokens": result.observed_tokens}))
        return messages
