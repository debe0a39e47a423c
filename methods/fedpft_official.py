"""FedPFT as its released code runs it: where that departs from the paper, each departure can be switched off alone.

docs/paper.md lists the departures, which of them are reproduced here, and why the others are not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fedbench.api.context import ClientContext, ServerContext
from fedbench.api.local import LocalTask
from fedbench.api.messages import ClientId, Message, State, adapters_of
from fedbench.api.sides import Client, Server
from fedbench.data.examples import Examples
from fedbench.methods._distillation import required
from fedbench.methods.fedpft import FedPFT, FedPFTClient, FedPFTServer, ZeroRule, highest
from fedbench.models.foundation import FoundationModel
from fedbench.models.spec import LoraSpec
from fedbench.models.weights import set_tensors


class FedPFTOfficial(FedPFT):
    """FedPFT with the released code's departures from the paper.

    detached_regulariser: the regulariser on W2·W1 has no gradient. zero_rule, count_padding, shuffle_neurons: APoZ
    counts exact zeros, padding included, and neurons are shuffled before they are sorted by it. last_client_student:
    alignment's student has the tunables of the last client that trained, not the aggregated ones. stale_teacher: its
    teacher gets the aggregated tunables on evaluation rounds only. weighting: what uploads count in the mean: all the
    same ("uniform"), by "samples", or "mispaired", by the sample counts of the round's clients in another order.
    lr_off_by_one: the linear decay skips a step after the first round and stays at its last value above 0.
    cut_retained: alignment also treats the retained layers, whose FFNs it cuts to their first r neurons while it runs.
    output_only: in a ViT only the attention output has an adapter.
    """

    name: ClassVar[str] = "fedpft-official"
    version: ClassVar[int] = 1
    needs: ClassVar[Literal["sum", "each"]] = "each"

    detached_regulariser: bool = True
    zero_rule: ZeroRule = "exact-zero"
    count_padding: bool = True
    shuffle_neurons: bool = True
    last_client_student: bool = True
    stale_teacher: bool = True
    weighting: Literal["uniform", "mispaired", "samples"] = "uniform"
    lr_off_by_one: bool = True
    cut_retained: bool = True
    output_only: bool = True

    def learning_rate(self, round: int, rounds: int) -> float:
        if not self.lr_off_by_one or self.lr_decay == "none" or round == 0:
            return super().learning_rate(round, rounds)
        # The step that would reach 0 is not taken.
        return self.lr * (1 - (round + 1) / rounds) if round + 1 < rounds else self.learning_rate(round - 1, rounds)

    def server(self, fm: FoundationModel, public: Examples | None, ctx: ServerContext) -> Server:
        return FedPFTOfficialServer(self, fm, required(self, public), ctx)

    def client(self, ctx: ClientContext) -> Client:
        return FedPFTOfficialClient(self, ctx)


class FedPFTOfficialServer(FedPFTServer):
    """FedPFT's server, each departure in the place it concerns."""

    method: FedPFTOfficial

    def __init__(self, method: FedPFTOfficial, fm: FoundationModel, public: Examples, ctx: ServerContext) -> None:
        super().__init__(method, fm, public, ctx)
        self.teachers: dict[str, Tensor] = dict(self.values)
        self.last: Mapping[str, Tensor] = self.values

    def client_lora(self, fm: FoundationModel) -> LoraSpec:
        if self.method.output_only and fm.family.modality == "image":
            return replace(self.method.lora, projections=("output",))
        return self.method.lora

    @property
    def aligned(self) -> Sequence[int]:
        return range(self.fm_parts.count) if self.method.cut_retained else self.compressed

    def product(self, layer: int) -> Tensor:
        product = super().product(layer)
        return product.detach() if self.method.detached_regulariser else product

    def ingredients(self, fm: FoundationModel) -> dict[str, Any]:
        return super().ingredients(fm) | {"detached_regulariser": self.method.detached_regulariser}

    def weights(self, round: int, adapters: Sequence[Message]) -> Sequence[float]:
        samples = super().weights(round, adapters)
        if self.method.weighting == "uniform":
            return [1.0] * len(samples)
        if self.method.weighting == "mispaired":
            order = self.ctx.streams.numpy("mispaired", round).permutation(len(samples))
            return [samples[i] for i in order]
        return samples

    def aggregate(self, round: int, uploads: Mapping[ClientId, Sequence[Message]]) -> None:
        super().aggregate(round, uploads)
        self.last = adapters_of(uploads)[-1].tensors
        if not self.method.stale_teacher or (round + 1) % self.ctx.evaluate_every == 0:
            self.teachers = dict(self.values)

    def teacher(self) -> nn.Module:
        model, names = super().teacher(), self.fm_names()
        set_tensors(model, {names[name]: value for name, value in self.teachers.items()})
        return model

    def student(self) -> nn.Module:
        model = super().student()
        if self.method.last_client_student:
            set_tensors(model, self.last)
        return model

    def neurons(self, round: int, layer: int) -> Tensor:
        rank = self.rank(round, layer)
        if layer not in self.compressed:
            rank = rank[: self.method.narrow(len(rank))]
        if not self.method.shuffle_neurons:
            return highest(rank, self.method.p)
        order = torch.from_numpy(self.ctx.streams.numpy("shuffle", round, layer).permutation(len(rank)))
        return order[highest(rank[order], self.method.p)].sort().values

    def align(self, round: int) -> None:
        # Without its output weights a neuron is as good as cut off.
        narrow = self.method.narrow
        weights = [self.parts.ffn_out(i).weight.detach() for i in set(self.aligned) - set(self.compressed)]
        beyond = [weight[:, narrow(weight.shape[1]) :] for weight in weights]
        before = [part.clone() for part in beyond]
        for part in beyond:
            part.zero_()
        try:
            super().align(round)
        finally:
            for part, values in zip(beyond, before, strict=True):
                part.copy_(values)

    def state(self) -> State:
        state = super().state()
        return State({**state.tensors, **{f"teacher.{n}": t for n, t in self.teachers.items()}}, state.values)

    def restore(self, state: State) -> None:
        super().restore(state)
        self.teachers = {name: state.tensors[f"teacher.{name}"] for name in self.teachers}


class FedPFTOfficialClient(FedPFTClient):
    """FedPFT's client, which counts padding as well."""

    method: FedPFTOfficial

    def task(self, round: int, inbox: Sequence[Message], data: Examples) -> LocalTask:
        task = super().task(round, inbox, data)
        task.observe_padding = self.method.count_padding and bool(task.observers)
        return task
