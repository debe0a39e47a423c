"""FedBiOT (Wu et al., KDD 2024, arXiv 2406.17706): an emulator and an adapter, trained in turns at the two sides.

The adapter is the FM's last layers, the emulator every so-many-th of the layers before them. Clients tune LoRA of the
adapter and the head, held near what they were sent: mu times the squared distance of the products B A. After rounds the
server tunes LoRA of the emulator on public data, towards the FM with the aggregated adapter: the relative error of the
emulator's output, and the divergence of the two models' answers. Clients are then sent the emulator's LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fedbench.api.context import ClientContext, ServerContext
from fedbench.api.local import LocalTask
from fedbench.api.messages import Message, State
from fedbench.api.sides import Client, Server
from fedbench.data.examples import Examples
from fedbench.files import state_digest
from fedbench.methods._distillation import required
from fedbench.methods._layers import LayersMethod, LayersServer
from fedbench.methods._layerwise import LayerLoss, Schedule
from fedbench.methods._products import pairs
from fedbench.methods.fedavg_lora import AdapterClient
from fedbench.models.foundation import FoundationModel
from fedbench.models.spec import ModelSpec
from fedbench.models.weights import get_tensors, set_tensors

EMULATOR = "emulator."
"""How the names of the emulator's LoRA begin in a state."""


class FedBiOT(LayersMethod):
    """FedBiOT's settings.

    front: untouched by the paper, whose adapter is the last `back` layers. mu: weight of the pull. answers: weight of
    the divergence. layerwise: compare the output of every layer of the emulator, not of the last alone. t: rounds
    between alignments, 0 for none.
    """

    name: ClassVar[str] = "fedbiot"
    version: ClassVar[int] = 1
    needs: ClassVar[Literal["sum", "each"]] = "sum"

    front: int = Field(0, ge=0)
    back: int = Field(2, ge=1)
    mu: float = Field(0.1, ge=0)
    answers: float = Field(0.9, ge=0)
    layerwise: bool = False
    distil_steps: int = Field(200, ge=0)
    distil_batch: int = Field(32, ge=1)
    distil_lr: float = Field(6e-4, gt=0)
    t: int = Field(1, ge=0)
    align_steps: int = Field(20, ge=1)
    align_lr: float = Field(6e-4, gt=0)

    def unavailable(self, fm: FoundationModel) -> str | None:
        if self.answers and fm.spec.head == "vocabulary":
            return f"{self.name} compares answers by class, which a language objective has none of; set answers=0"
        return None

    def pull(self, parameters: Mapping[str, Tensor], received: Mapping[str, Tensor]) -> Tensor:
        """mu times the squared distance of what the adapters add to their weights from what was received."""
        scale = self.lora.alpha / self.lora.r
        moved = [
            (parameters[b] @ parameters[a] - received[b] @ received[a]).square().sum() for a, b, _ in pairs(parameters)
        ]
        return self.mu * scale**2 * torch.stack(moved).sum()

    def server(self, fm: FoundationModel, public: Examples | None, ctx: ServerContext) -> Server:
        return FedBiOTServer(self, fm, required(self, public), ctx)

    def client(self, ctx: ClientContext) -> Client:
        return FedBiOTClient(self, ctx)


def extracted(middle: Sequence[int], keep: int) -> list[int]:
    """`keep` layers at the stride of the released code, int(i (n - 1) / (keep - 1)) of n; the first where one stays."""
    return [middle[int(i * (len(middle) - 1) / max(1, keep - 1))] for i in range(keep)]


class FedBiOTServer(LayersServer):
    """Tunes the emulator's LoRA, which is `fixed` at the clients, before and during federated learning."""

    method: FedBiOT

    def chosen(self, middle: range, keep: int) -> list[int]:
        return extracted(middle, keep)

    def shape(self, spec: ModelSpec) -> ModelSpec:
        return spec.with_lora(self.method.lora)

    def is_tuned(self, name: str) -> bool:
        return self.parts.layer_of(name) not in self.emulated

    def trained(self) -> list[str]:
        return [n for n in super().trained() if ".lora_" in n]

    def pairs(self) -> list[tuple[int, int]]:
        layers = self.emulated if self.method.layerwise else self.emulated[-1:]
        return [(self.stands_for(i), i) for i in layers]

    def begin(self) -> None:
        self.fixed = {name: self.initial[self.in_fm(name)] for name in self.trained()}
        set_tensors(self.model, {**self.fixed, **self.values})
        set_tensors(self.full, {self.in_fm(name): value for name, value in self.values.items()})

    def loss(self) -> LayerLoss:
        """What the server holds down: the emulator's error, and the divergence of answers."""
        return LayerLoss(self.pairs(), answers=self.method.answers)

    def ingredients(self, fm: FoundationModel) -> dict[str, Any]:
        m = self.method
        start = state_digest({**self.values, **self.fixed})
        return super().ingredients(fm) | {"answers": m.answers, "lora": [m.lora_r, float(m.lora_alpha)], "start": start}

    def schedule(self) -> Schedule:
        m = self.method
        return Schedule(m.distil_steps, m.distil_batch, m.distil_lr)

    def distil(self, fm: FoundationModel) -> list[dict[str, Any]]:
        residuals = super().distil(fm)
        self.fixed = get_tensors(self.model, self.trained())
        return residuals

    def aligns(self, round: int) -> bool:
        return self.due(self.method.t, round)

    def align(self, round: int) -> None:
        """Tune the emulator's LoRA towards the FM with the aggregated adapter."""
        m = self.method
        self.distil_again(round, Schedule(m.align_steps, m.distil_batch, m.align_lr))
        self.fixed = get_tensors(self.model, self.trained())

    def put_in_proxy(self) -> nn.Module:
        set_tensors(self.model, self.fixed)
        return super().put_in_proxy()

    def update_since(self, version: int) -> Message:
        return Message("alignment", self.fixed)

    def state(self) -> State:
        state = super().state()
        return State({**state.tensors, **{f"{EMULATOR}{n}": t for n, t in self.fixed.items()}}, state.values)

    def restore(self, state: State) -> None:
        super().restore(state)
        self.fixed = {name: state.tensors[f"{EMULATOR}{name}"] for name in self.fixed}


class FedBiOTClient(AdapterClient):
    """Trains the adapter near what it was sent, through the emulator with its latest LoRA."""

    method: FedBiOT

    def receive(self, message: Message) -> None:
        if message.kind == "alignment":
            self.fixed = self.ctx.modules.intern(message.tensors)
        else:
            super().receive(message)

    def task(self, round: int, inbox: Sequence[Message], data: Examples) -> LocalTask:
        task = super().task(round, inbox, data)
        return replace(task, penalty=self.method.pull) if self.method.mu else task
