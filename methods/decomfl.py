"""DeComFL on LoRA (Li et al., ICLR 2025, arXiv 2405.15861): zeroth-order federation in which only scalars cross.

In every round all clients step along the same random directions, and send no more than the slopes they measured, one
number a direction. The server averages them and steps along the same directions itself. Who missed rounds is sent their
slopes and seeds, and makes up for them. No client needs a backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedbench.api.context import ClientContext, ServerContext
from fedbench.api.directions import direction
from fedbench.api.local import SGD, LocalResult, LocalTask, Trainer, ZerothOrder
from fedbench.api.messages import ClientId, Message, State, TensorSpec
from fedbench.api.sides import Client, Server
from fedbench.data.examples import Examples
from fedbench.methods.fedavg_lora import AdapterClient, AdapterServer, LoraMethod, weighted_mean
from fedbench.models.foundation import FoundationModel
from fedbench.scenario.tables import Federation


class DeComFL(LoraMethod):
    """DeComFL's settings.

    lr: of plain SGD along measured slopes, far below that of gradients. perturbations: directions a step, each of which
    takes two forward passes; with one a step takes about as long as one with a backward pass, the paper has five.
    scale: how far along a direction a loss is taken, to both sides. steps: local steps, the same for all clients; None
    takes the scenario's max_steps, or 5 where it has none.
    """

    name: ClassVar[str] = "decomfl"
    version: ClassVar[int] = 1
    needs: ClassVar[Literal["sum", "each"]] = "sum"

    lr: float = Field(1e-3, gt=0)
    perturbations: int = Field(1, ge=1)
    scale: float = Field(1e-3, gt=0)
    steps: int | None = Field(None, ge=1)

    def trainer(self, lr: float) -> Trainer:
        return SGD(lr)

    def steps_in(self, federation: Federation) -> int:
        """Local steps of each client in a round."""
        return self.steps or federation.max_steps or 5

    def seeds(self, first: int, steps: int) -> list[list[int]]:
        """Seeds of the directions of each step of a round whose first seed is this."""
        return [[first + step * self.perturbations + p for p in range(self.perturbations)] for step in range(steps)]

    def stepped(self, values: Mapping[str, Tensor], first: int, slopes: Tensor, lr: float) -> dict[str, Tensor]:
        """Values after a round's steps along its directions, by these slopes [steps, perturbations]."""
        out = {name: value.clone() for name, value in values.items()}
        shapes = {name: value.shape for name, value in values.items()}
        for seeds, along in zip(self.seeds(first, len(slopes)), slopes.tolist(), strict=True):
            for seed, slope in zip(seeds, along, strict=True):
                for name, z in direction(shapes, seed).items():
                    out[name].sub_(z, alpha=lr * slope / self.perturbations)
        return out

    def server(self, fm: FoundationModel, public: Examples | None, ctx: ServerContext) -> Server:
        return DeComServer(self, fm, ctx)

    def client(self, ctx: ClientContext) -> Client:
        return DeComClient(self, ctx)


class DeComServer(AdapterServer):
    """Keeps the tunables, and what made each version of them of the one before."""

    method: DeComFL

    def __init__(self, method: DeComFL, fm: FoundationModel, ctx: ServerContext) -> None:
        super().__init__(method, fm, ctx)
        self.fixed = dict(self.initial)  # sent once; rounds change them at both sides alike
        self.history: list[tuple[int, float, Tensor]] = []  # first seed, learning rate and slopes of each version

    def seed(self, round: int) -> int:
        """The first seed of a round."""
        return self.ctx.streams.integer("directions", round) % 2**48

    def whole(self) -> tuple[Message, int]:
        return super().whole()[0], 0

    def adapter_meta(self, round: int) -> dict[str, int | float | str | bool]:
        return super().adapter_meta(round) | {"seed": self.seed(round)}

    def adapters(self, round: int, cohort: Sequence[ClientId]) -> Mapping[ClientId, Message]:
        return dict.fromkeys(cohort, Message("adapter", {}, self.adapter_meta(round)))

    def update_since(self, version: int) -> Message:
        missed = self.history[version:]
        slopes = torch.stack([slopes for _, _, slopes in missed])
        seeds = torch.tensor([seed for seed, _, _ in missed])
        rates = torch.tensor([lr for _, lr, _ in missed], dtype=torch.float64)
        return Message("alignment", {"slopes": slopes, "seeds": seeds, "lr": rates})

    def expected(self, round: int, client: ClientId) -> Mapping[str, Mapping[str, TensorSpec]]:
        shape = self.method.steps_in(self.ctx.federation), self.method.perturbations
        return {"adapter": {"slopes": TensorSpec(shape, torch.float32)}}

    def trainable(self, client: ClientId) -> int:
        return sum(value.numel() for value in self.values.values())

    def aggregate(self, round: int, uploads: Mapping[ClientId, Sequence[Message]]) -> None:
        adapters = [m for messages in uploads.values() for m in messages]
        slopes = weighted_mean([m.tensors for m in adapters], self.weights(round, adapters))["slopes"]
        lr = self.method.learning_rate(round, self.ctx.federation.rounds)
        self.history.append((self.seed(round), lr, slopes))
        self.values = self.method.stepped(self.values, self.seed(round), slopes, lr)
        self.version += 1

    def state(self) -> State:
        state = super().state()
        past = {f"history.{i}": slopes for i, (_, _, slopes) in enumerate(self.history)}
        return State({**state.tensors, **past}, {**state.values, "history": [[s, lr] for s, lr, _ in self.history]})

    def restore(self, state: State) -> None:
        super().restore(state)
        past = enumerate(state.values["history"])
        self.history = [(seed, lr, state.tensors[f"history.{i}"]) for i, (seed, lr) in past]


class DeComClient(AdapterClient):
    """Holds the tunables, and steps them through the rounds it missed."""

    method: DeComFL

    def receive(self, message: Message) -> None:
        if message.kind != "alignment":
            super().receive(message)
            return
        rounds = zip(*(message.tensors[name] for name in ("seeds", "lr", "slopes")), strict=True)
        for seed, lr, slopes in rounds:
            self.fixed = self.method.stepped(self.fixed, int(seed), slopes, float(lr))
        self.fixed = self.ctx.modules.intern(self.fixed)

    def task(self, round: int, inbox: Sequence[Message], data: Examples) -> LocalTask:
        task = super().task(round, inbox, data)
        [seed] = [int(m.meta["seed"]) for m in inbox if m.kind == "adapter"]
        steps = self.method.steps_in(self.ctx.federation)
        task.batches = (list(task.batches) * steps)[:steps]  # who has fewer goes through them again
        task.tunables, task.fixed, task.clip_norm = self.fixed, {}, None
        task.zeroth_order = ZerothOrder(self.method.seeds(seed, steps), self.method.scale)
        return task

    def upload(self, round: int, result: LocalResult) -> Sequence[Message]:
        assert result.slopes is not None
        return [Message("adapter", {"slopes": result.slopes}, {"num_examples": self.method.weight(self.rows)})]
