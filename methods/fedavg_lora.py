"""FedAvg on LoRA adapters of the full FM (FedPETuning, Zhang et al. 2023; FedIT, Zhang et al. 2024).

The reference the proxy methods try to reach: every client is sent the FM itself. Its server and client are also
what the other adapter methods build on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer
from torch import Tensor, nn

from fedbench.api.context import ClientContext, ServerContext
from fedbench.api.local import AdamW, LocalResult, LocalTask, Trainer
from fedbench.api.messages import ClientId, Kind, Message, State, TensorSpec, adapters_of
from fedbench.api.sides import Client, Method, Server
from fedbench.data.examples import Examples
from fedbench.errors import MessageError
from fedbench.models.foundation import FoundationModel
from fedbench.models.spec import FFN, FFN_ROLES, PROJECTIONS, LoraSpec, ModelSpec
from fedbench.models.weights import frozen_state, initial_tunables, set_tensors


def weighted_mean(values: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """Mean of equally named tensors with the given weights, summed in float64 (FedAvg, McMahan et al. 2017)."""
    total = float(sum(weights))
    return {
        name: sum(
            (v[name].double() * (w / total) for v, w in zip(values, weights, strict=True)), start=torch.zeros(())
        ).to(tensor.dtype)
        for name, tensor in values[0].items()
    }


FIXED = "fixed."
"""How the names of fixed tunables begin in a set-up message, and in a client's state."""

MEMORY = "memory."
"""The same of what a subclass keeps in `memory`."""

Memory = dict[str, dict[str, Tensor]]
"""What a side of a subclass's own keeps between rounds: some tensors by name, under a name without dots."""

MOST = {"num_examples": 2**31 - 1, "tokens": 2**53}
"""What no client can have more of. The harness knows better for each client (`fedbench.api.sides.Server.accept`)."""


def count(message: Message, name: str) -> int:
    """A whole number from 1 to `MOST` in a message's meta. Raises MessageError for anything else."""
    value = message.meta.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST[name]:
        raise MessageError(f"{message.kind}: {name} is not a whole number from 1 to {MOST[name]}")
    return value


def flat(memory: Memory) -> dict[str, Tensor]:
    """Memory as tensors of a state."""
    return {f"{MEMORY}{own}.{name}": tensor for own, each in memory.items() for name, tensor in each.items()}


def remembered(state: State) -> tuple[Memory, State]:
    """The memory in a state, in tensors of its own, and the state without it."""
    memory: Memory = {}
    for name, tensor in state.tensors.items():
        if name.startswith(MEMORY):
            own, _, inner = name.removeprefix(MEMORY).partition(".")
            memory.setdefault(own, {})[inner] = tensor.clone()
    rest = {name: tensor for name, tensor in state.tensors.items() if not name.startswith(MEMORY)}
    return memory, State(rest, state.values)


class TuningMethod(Method):
    """Hyper-parameters of local training shared by the adapter methods.

    lr: learning rate of local AdamW. lr_decay: over the rounds, linearly towards 0 after the last, or not at all.
    clip_norm: largest L2 norm of a local gradient.
    """

    lr: float = Field(2e-3, gt=0)
    lr_decay: Literal["linear", "none"] = "linear"
    weight_decay: float = Field(0.0, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    needs: ClassVar[Literal["sum", "each"]] = "sum"

    def weight(self, rows: int) -> int:
        """What the upload of a client of so many rows counts in a mean (FedAvg)."""
        return rows

    def trainer(self, lr: float) -> Trainer:
        """How clients step at the round's learning rate."""
        return AdamW(lr=lr, weight_decay=self.weight_decay)

    def learning_rate(self, round: int, rounds: int) -> float:
        """The learning rate of `round` (from 0) of `rounds`."""
        return self.lr * (1 - round / rounds) if self.lr_decay == "linear" else self.lr

    @property
    def lora(self) -> LoraSpec | None:
        """Adapters on linear layers of every layer; None for none."""
        return None

    def tuned(self, spec: ModelSpec) -> ModelSpec:
        """The FM's specification with what is tuned beside the head."""
        return spec.with_lora(self.lora)

    def server(self, fm: FoundationModel, public: Examples | None, ctx: ServerContext) -> Server:
        return AdapterServer(self, fm, ctx)

    def client(self, ctx: ClientContext) -> Client:
        return AdapterClient(self, ctx)


LORA_TARGETS: dict[str, tuple[str, ...]] = {"attention": PROJECTIONS, "ffn": (FFN,), "all": (*PROJECTIONS, FFN)}
"""The linear layers that adapters go on, by what a setting calls them together."""


class LoraMethod(TuningMethod):
    """Hyper-parameters of LoRA (Hu et al. 2022).

    lora_targets: the linear layers with an adapter: "attention" (query, key, value and output, as in FedPFT), "ffn"
    (up and down, and the gate of a gated FFN), "all", or names with commas between them, of query, key, value, output,
    gate, up and down. Records hold it where it is not "attention".
    """

    lora_r: int = Field(8, ge=1)
    lora_alpha: float = Field(48, gt=0)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    lora_targets: str = "attention"

    @field_validator("lora_targets")
    @classmethod
    def _known_targets(cls, value: str) -> str:
        """The same in one form: names in the order of a layer, and one word for all of attention."""
        asked = {name.strip().lower() for name in value.split(",")}
        roles = (*PROJECTIONS, *FFN_ROLES)
        if len(asked) == 1 and asked <= LORA_TARGETS.keys():
            return asked.pop()
        if unknown := sorted(asked - {*roles}):
            raise ValueError(f"{unknown[0]!r} is none of {', '.join((*LORA_TARGETS, *roles))}")
        return "attention" if asked == {*PROJECTIONS} else ",".join(role for role in roles if role in asked)

    # pydantic 2.10 looks up what this gives in the module of whatever class inherits it: hence builtins alone.
    @model_serializer(mode="wrap")
    def _settings(self, handler: SerializerFunctionWrapHandler) -> dict[str, object]:
        """Without what says nothing: keys and records are those of before there was such a setting."""
        found: dict[str, object] = handler(self)
        return {n: v for n, v in found.items() if (n, v) != ("lora_targets", "attention")}

    @property
    def dropout(self) -> float:
        return self.lora_dropout

    @property
    def lora(self) -> LoraSpec:
        targets = LORA_TARGETS.get(self.lora_targets) or tuple(self.lora_targets.split(","))
        return LoraSpec(self.lora_r, self.lora_alpha, self.lora_dropout, projections=targets)


class WeightedMethod(LoraMethod):
    """weighting: of the mean over clients, by sample count or all alike."""

    weighting: Literal["samples", "uniform"] = "samples"

    def weight(self, rows: int) -> int:
        return rows if self.weighting == "samples" else 1


class FedAvgLora(LoraMethod):
    """FedAvg of LoRA adapters and head, trained on the full FM at every client."""

    name: ClassVar[str] = "fedavg-lora"
    version: ClassVar[int] = 1
    needs: ClassVar[Literal["sum", "each"]] = "sum"


class AdapterServer(Server):
    """Ships a model once per client and tunables every round; aggregates by sample count.

    Subclasses replace `model`, what clients train, and say where its tunables belong in the FM. `values` are the
    tunables that cross in every round, `fixed` those that are sent along with the model, once. Tensors that a subclass
    puts into `memory` are part of its state.
    """

    setup: Kind = "fm"

    def __init__(self, method: TuningMethod, fm: FoundationModel, ctx: ServerContext) -> None:
        self.method, self.ctx = method, ctx
        self.spec: ModelSpec = method.tuned(fm.spec)
        self.full = fm.tuned(self.spec, ctx.device)
        # Untuned places of the FM hold the initial adapter (B = 0), which changes nothing.
        self.initial = initial_tunables(self.full, ctx.streams)
        set_tensors(self.full, self.initial)
        self.model: nn.Module = self.full
        self.values: dict[str, Tensor] = dict(self.initial)
        self.fixed: dict[str, Tensor] = {}
        self.memory: Memory = {}
        self.held: dict[ClientId, int] = {}
        self.version = 0

    def adapter_meta(self, round: int) -> dict[str, int | float | str | bool]:
        """Plain values sent along with the adapter."""
        return {"lr": self.method.learning_rate(round, self.ctx.federation.rounds)}

    def update_since(self, version: int) -> Message:
        """What a client that holds `version` of the model lacks; only methods that change the model answer."""
        raise NotImplementedError(f"{self.method.name} changed its model but cannot say how")

    def whole(self) -> tuple[Message, int]:
        """What a client is sent that holds nothing yet, and which version of the model that is."""
        tensors = frozen_state(self.model) | {f"{FIXED}{name}": value for name, value in self.fixed.items()}
        return Message(self.setup, tensors, {"spec": self.spec.to_json()}), self.version

    def adapters(self, round: int, cohort: Sequence[ClientId]) -> Mapping[ClientId, Message]:
        """The adapter each of these clients is sent; those who are sent the same share one message."""
        return dict.fromkeys(cohort, Message("adapter", self.values, self.adapter_meta(round)))

    def broadcast(self, round: int, cohort: Sequence[ClientId]) -> Mapping[ClientId, Sequence[Message]]:
        adapters = self.adapters(round, cohort)
        whole: tuple[Message, int] | None = None
        updates: dict[int, Message] = {}
        outbox: dict[ClientId, list[Message]] = {}
        for client in cohort:
            outbox[client] = []
            held = self.held.get(client)
            if held is None:
                whole = whole or self.whole()
                outbox[client].append(whole[0])
                held = whole[1]
            if held < self.version:
                if held not in updates:
                    updates[held] = self.update_since(held)
                outbox[client].append(updates[held])
            outbox[client].append(adapters[client])
            self.held[client] = self.version
        return outbox

    def expected(self, round: int, client: ClientId) -> Mapping[str, Mapping[str, TensorSpec]]:
        return {"adapter": {name: TensorSpec.of(tensor) for name, tensor in self.values.items()}}

    def accept(self, round: int, messages: Sequence[Message]) -> None:
        for message in messages:
            if message.kind == "adapter":
                count(message, "num_examples")

    def aggregate(self, round: int, uploads: Mapping[ClientId, Sequence[Message]]) -> None:
        adapters = adapters_of(uploads)
        self.values = weighted_mean([m.tensors for m in adapters], self.weights(round, adapters))

    def weights(self, round: int, adapters: Sequence[Message]) -> Sequence[float]:
        """What each upload counts in the mean: its client's sample count (FedAvg)."""
        return [float(count(m, "num_examples")) for m in adapters]

    def put_in_fm(self) -> nn.Module:
        names = self.fm_names()
        set_tensors(self.full, {names.get(name, name): value for name, value in self.values.items()})
        return self.full

    def state(self) -> State:
        held = {str(client): version for client, version in self.held.items()}
        return State({**self.values, **flat(self.memory)}, {"held": held, "version": self.version})

    def restore(self, state: State) -> None:
        self.memory, _ = remembered(state)
        self.values = {name: state.tensors[name] for name in self.values}
        self.held = {int(client): version for client, version in state.values["held"].items()}
        self.version = state.values["version"]


class AdapterClient(Client):
    """Keeps the model it was sent, trains the tunables it is sent each round, and sends them back.

    Tensors that a subclass puts into `memory` are part of its state.
    """

    def __init__(self, method: TuningMethod, ctx: ClientContext) -> None:
        self.method, self.ctx = method, ctx
        self.spec: ModelSpec | None = None
        self.frozen: dict[str, Tensor] = {}
        self.fixed: dict[str, Tensor] = {}
        self.memory: Memory = {}
        self.rows = 0

    def receive(self, message: Message) -> None:
        """Take in a message that is not the adapter: the model itself, or a change to it."""
        if message.kind not in ("fm", "sub_fm"):
            raise ValueError(f"a client of {self.method.name} cannot read a message of kind {message.kind!r}")
        self.spec = ModelSpec.from_json(str(message.meta["spec"]))
        self._hold(message.tensors)

    def _hold(self, tensors: Mapping[str, Tensor]) -> None:
        kept = self.ctx.modules.intern(tensors)
        self.fixed = {n.removeprefix(FIXED): t for n, t in kept.items() if n.startswith(FIXED)}
        self.frozen = {n: t for n, t in kept.items() if not n.startswith(FIXED)}

    def task(self, round: int, inbox: Sequence[Message], data: Examples) -> LocalTask:
        adapter: Message | None = None
        for message in inbox:
            if message.kind == "adapter":
                adapter = message
            else:
                self.receive(message)
        if adapter is None or self.spec is None:
            raise ValueError(f"client {self.ctx.client} was asked to train before it was sent a model and an adapter")
        self.rows = len(data)
        return LocalTask(
            frozen=self.ctx.model(self.spec, self.frozen),
            tunables=adapter.tensors,
            data=data,
            batches=self.ctx.batches(round, len(data)),
            optimiser=self.method.trainer(float(adapter.meta["lr"])),
            clip_norm=self.method.clip_norm,
            fixed=self.fixed,
            seed=self.ctx.seed(round),
        )

    def upload(self, round: int, result: LocalResult) -> Sequence[Message]:
        return [Message("adapter", result.tunables, {"num_examples": self.method.weight(self.rows)})]

    def state(self) -> State:
        fixed = {f"{FIXED}{name}": value for name, value in self.fixed.items()}
        return State(self.frozen | fixed | flat(self.memory), {"spec": self.spec.to_json() if self.spec else None})

    def restore(self, state: State) -> None:
        self.memory, state = remembered(state)
        if state.values["spec"]:
            self.spec = ModelSpec.from_json(state.values["spec"])
            self._hold(state.tensors)
