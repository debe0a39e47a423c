"""FedSODA (ECAI 2025, arXiv 2508.12727): layers pruned by groups of similarity, and aligned with the FM in between.

A reconstruction of what the paper says, whose code we have not seen. Neighbouring middle layers that are alike form a
group, of which one stays; clients tune LoRA in all layers that stay, and these adapters go back to where the layers
were. The server keeps a layer that stands for several near to what its group makes of its input: before federated
learning, and every t rounds with the aggregated adapters, it distils that layer's FFN and the norm behind it on public
data, and clients are sent what changed. The paper's quantised weights (QLoRA) are not part of it.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from fedbench.api.context import ClientContext, ServerContext
from fedbench.api.messages import Message, State
from fedbench.api.sides import Client, Server
from fedbench.data.examples import Examples
from fedbench.methods._distillation import required
from fedbench.methods._layers import LayersMethod
from fedbench.methods._layerwise import Schedule
from fedbench.methods.crash import GroupsServer
from fedbench.methods.fedavg_lora import AdapterClient
from fedbench.models.foundation import FoundationModel
from fedbench.models.spec import ModelSpec
from fedbench.models.weights import checkpoint_name, frozen_state, load_frozen

MODEL = "model."
"""How the names of aligned tensors begin in a state."""


class FedSODA(LayersMethod):
    """FedSODA's settings. t: rounds between alignments, 0 for none."""

    name: ClassVar[str] = "fedsoda"
    version: ClassVar[int] = 1
    needs: ClassVar[Literal["sum", "each"]] = "sum"

    distil_steps: int = Field(200, ge=0)
    distil_batch: int = Field(32, ge=1)
    distil_lr: float = Field(6e-4, gt=0)
    t: int = Field(10, ge=0)
    align_steps: int = Field(20, ge=1)
    align_lr: float = Field(6e-4, gt=0)

    def server(self, fm: FoundationModel, public: Examples | None, ctx: ServerContext) -> Server:
        return FedSODAServer(self, fm, required(self, public), ctx)

    def client(self, ctx: ClientContext) -> Client:
        return FedSODAClient(self, ctx)


class FedSODAServer(GroupsServer):
    """Distils the layers that stand for several, before and during federated learning."""

    method: FedSODA

    def shape(self, spec: ModelSpec) -> ModelSpec:
        return spec.with_lora(self.method.lora)

    @property
    def several(self) -> list[int]:
        """The proxy's layers that stand for more than themselves."""
        return [i for i, group in zip(self.emulated, self.groups, strict=True) if len(group) > 1]

    def pairs(self) -> list[tuple[int, int]]:
        return [(self.stands_for(i), i) for i in self.several or self.emulated[-1:]]

    def trained(self) -> list[str]:
        inside = [slices.name for i in self.several for slices in self.parts.neurons(i).values()]
        norms = [path for i in self.several if (path := self.parts.ffn_norm_path(i))]
        ends = tuple(f"{path}." for path in [*norms, *(self.parts.ffn_out_path(i) for i in self.several)])
        known = {n: checkpoint_name(n) for n, _ in self.model.named_parameters() if ".lora_" not in n}
        return [n for n, there in known.items() if there in inside or there.startswith(ends)]

    def schedule(self) -> Schedule:
        m = self.method
        return Schedule(m.distil_steps if self.several else 0, m.distil_batch, m.distil_lr)

    def aligns(self, round: int) -> bool:
        return bool(self.several) and self.due(self.method.t, round)

    def align(self, round: int) -> None:
        """Distil again, towards the FM with the aggregated adapters."""
        m = self.method
        self.distil_again(round, Schedule(m.align_steps, m.distil_batch, m.align_lr))

    def aligned(self) -> dict[str, Any]:
        """What alignments change, by the names of the proxy's checkpoint."""
        state = frozen_state(self.model)
        return {name: state[name] for name in map(checkpoint_name, self.trained())}

    def update_since(self, version: int) -> Message:
        return Message("alignment", self.aligned())

    def state(self) -> State:
        state = super().state()
        return State({**state.tensors, **{f"{MODEL}{n}": t for n, t in self.aligned().items()}}, state.values)

    def restore(self, state: State) -> None:
        super().restore(state)
        tensors = {name: state.tensors[f"{MODEL}{name}"] for name in self.aligned()}
        load_frozen(self.model, frozen_state(self.model) | tensors)


class FedSODAClient(AdapterClient):
    """Puts what an alignment changed into its proxy."""

    def receive(self, message: Message) -> None:
        if message.kind == "alignment":
            self.frozen = self.ctx.modules.intern({**self.frozen, **message.tensors})
        else:
            super().receive(message)
