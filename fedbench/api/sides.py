"""The interface of a federated method: Message, Server, Client, LocalTask, Method.

Only messages cross the boundary between server and clients. A `Server` never sees a client's rows, a
`Client` never sees the foundation model (FM); what one side wants the other to know, it has to send.

A method is a frozen set of validated hyper-parameters that makes the two sides:

    Method.server(fm, public, ctx) -> Server        Method.client(ctx) -> Client

Clients do not loop over their data: they *declare* their local training as a `LocalTask`, and the harness
(`fedbench.training.alone`) executes the tasks of a round.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

if TYPE_CHECKING:
    from fedbench.api.context import ClientContext, ServerContext
    from fedbench.data.examples import Examples
    from fedbench.models.foundation import FoundationModel
    from fedbench.scenario.load import Federation, SplitSettings

ClientId = int
Kind = Literal["fm", "sub_fm", "adapter", "alignment", "statistics"]
KINDS: tuple[str, ...] = ("fm", "sub_fm", "adapter", "alignment", "statistics")


@dataclass(frozen=True, slots=True)
class Message:
    """The only thing that crosses between server and client.

    `tensors` are read-only at the receiver: the transport refuses a round in which one was changed in place.
    `meta` holds plain values; structured values travel as JSON text.
    """

    kind: Kind
    tensors: Mapping[str, Tensor]
    meta: Mapping[str, int | float | str | bool] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a tensor in an upload has to look like."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        return cls(tuple(tensor.shape), tensor.dtype)


@dataclass(frozen=True, slots=True)
class State:
    """A checkpoint of one side: tensors by name, and plain (JSON) values."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a frozen tensor of the proxy was taken from in the FM.

    `index` lists the rows (`dim` 0) or columns (`dim` 1) of the FM's tensor `name` that were kept, in order;
    None means the whole tensor.
    """

    name: str
    dim: int = 0
    index: Tensor | None = None


@dataclass(frozen=True, slots=True)
class AdamW:
    """The local optimiser, made anew by every client in every round (Loshchilov & Hutter 2019)."""

    lr: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


@dataclass(frozen=True, slots=True)
class Frozen:
    """A frozen backbone a client has assembled from what it received.

    `key` is the content hash of specification and weights: tasks with equal keys may share one module, and
    `module` is that shared module. Only the executor runs it; nobody may change its frozen weights.
    """

    key: str
    module: nn.Module


Statistic = Callable[[Tensor], Tensor]
"""Maps activations [N, d] of N real tokens to a sum over them, [d]."""


@dataclass(slots=True)
class LocalTask:
    """One client's local training, declared.

    Attributes:
        frozen: the backbone to train through.
        tunables: start values by parameter name of `frozen.module`; everything else stays frozen.
        data: the client's rows.
        batches: row indices of `data`, one array a step, in order; several epochs are simply more batches.
        optimiser: AdamW settings.
        loss: (logits [B, C], labels [B]) -> loss of each row [B]; the step minimises its mean.
        clip_norm: largest L2 norm of the whole gradient, None for no clipping.
        penalty: (parameters, received) -> scalar added to the loss, both by name (FedProx).
        gradient_offset: added to the gradient of each named tunable before clipping (SCAFFOLD).
        rank_mask: multiplied into gradient and value of each named tunable (adapters of mixed ranks).
        observers: module path -> statistic of that module's output, summed over real tokens while training.
        observe_padding: sum over padding positions too; such a task is trained in padded batches, by itself.
        seed: seeds dropout, which reads torch's global generator, inside `fork_rng`.
    """

    frozen: Frozen
    tunables: Mapping[str, Tensor]
    data: Examples
    batches: Sequence[np.ndarray]
    optimiser: AdamW
    loss: Callable[[Tensor, Tensor], Tensor]
    clip_norm: float | None = None
    penalty: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor] | None = None
    gradient_offset: Mapping[str, Tensor] | None = None
    rank_mask: Mapping[str, Tensor] | None = None
    observers: Mapping[str, Statistic] = field(default_factory=dict)
    observe_padding: bool = False
    seed: int = 0


@dataclass(frozen=True, slots=True)
class LocalResult:
    """What came of a LocalTask: tuned values, steps taken, mean loss, and the observers' sums.

    `observed[path]` is the statistic summed over `observed_tokens` tokens of all training steps: a text's real tokens
    (all positions of its padded batches with `observe_padding`), an image's patches and class token.
    """

    tunables: Mapping[str, Tensor]
    steps: int
    loss: float
    observed: Mapping[str, Tensor] = field(default_factory=dict)
    observed_tokens: int = 0


class Server(ABC):
    """Holds the FM and the global state. Never sees a client's rows."""

    @abstractmethod
    def broadcast(self, round: int, cohort: Sequence[ClientId]) -> Mapping[ClientId, Sequence[Message]]:
        """What each sampled client has to receive before it can train, set-up and missed updates included."""

    @abstractmethod
    def aggregate(self, round: int, uploads: Mapping[ClientId, Sequence[Message]]) -> None:
        """Fold the uploads that arrived and were accepted into the global state; never called with none."""

    def align(self, round: int) -> None:  # noqa: B027 - most methods have no alignment
        """Adapt the proxy to the tuned FM, after `aggregate`; apart, so measures can stand before and after."""

    def aligns(self, round: int) -> bool:
        """Whether `align` will change the proxy in this round."""
        return False

    @abstractmethod
    def plug_in(self) -> nn.Module:
        """The FM with the tuned parameters in their places; the harness evaluates it."""

    def proxy(self) -> nn.Module | None:
        """The model clients train, with the global tunables in it; None where that is the FM itself."""
        return None

    def fm_names(self) -> Mapping[str, str]:
        """Name of each tunable in the proxy -> its name in the FM. Required where there is a proxy."""
        return {}

    def fm_sources(self) -> Mapping[str, Source]:
        """Name of each frozen tensor of the proxy -> where it was taken from; default: the same name, whole."""
        return {}

    def expected(self, round: int) -> Mapping[str, Mapping[str, TensorSpec]]:
        """Kind -> tensors an upload of that kind must hold in this round; kinds left out are refused."""
        return {}

    def accept(self, round: int, messages: Sequence[Message]) -> None:  # noqa: B027 - most need no more than `expected`
        """Raise MessageError to refuse an upload that `expected` lets through: plain values missing or impossible."""

    def residuals(self) -> Sequence[Mapping[str, Any]]:
        """Distillation residuals of the proxy, one entry a layer; empty where nothing is distilled."""
        return ()

    def notes(self) -> Sequence[str]:
        """What the server chose for itself, in lines for the record's provenance."""
        return ()

    @abstractmethod
    def state(self) -> State:
        """Everything `restore` needs on a server newly made with the same arguments."""

    @abstractmethod
    def restore(self, state: State) -> None:
        """Become the server that `state` was taken from."""


class Client(ABC):
    """Holds what one client was sent. Never sees the FM, unless the method ships it."""

    @abstractmethod
    def task(self, round: int, inbox: Sequence[Message], data: Examples) -> LocalTask:
        """Take in the round's messages and declare the local training on the client's own rows."""

    @abstractmethod
    def upload(self, round: int, result: LocalResult) -> Sequence[Message]:
        """What to send back; adapter and statistics as messages of their own, so the ledger can tell them apart."""

    def fit(self, task: LocalTask, execute: Callable[[LocalTask], LocalResult]) -> LocalResult:
        """Run the task; only a method whose local work is not gradient descent overrides this."""
        return execute(task)

    def state(self) -> State:
        """Everything `restore` needs on a client newly made; empty for a client without memory."""
        return State()

    def restore(self, state: State) -> None:  # noqa: B027 - a client without memory has nothing to do
        """Become the client that `state` was taken from."""


class Method(BaseModel, ABC):
    """A federated method: its name, its version and its validated hyper-parameters.

    A subclass declares hyper-parameters as pydantic fields. Raise `version` whenever a change alters results:
    records of another version are never taken for the method's own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: ClassVar[str]
    version: ClassVar[int] = 1

    @property
    def dropout(self) -> float:
        """The largest probability with which anything is dropped in local training; 0 where nothing is.

        Executors draw dropout in different orders, so a method that has any has to say so: its records' keys then hold
        the executor. A run whose clients train with dropout under a method that says 0 ends in a FedbenchError.
        """
        return 0.0

    @abstractmethod
    def server(self, fm: FoundationModel, public: Examples | None, ctx: ServerContext) -> Server:
        """The server's side. `public` is unlabelled public data, None where the scenario has none."""

    @abstractmethod
    def client(self, ctx: ClientContext) -> Client:
        """One client's side; `ctx.client` says which."""

    def unavailable(self, fm: FoundationModel) -> str | None:
        """Why the method cannot run with this FM, in one line; None if it can (zero-shot without a head cannot)."""
        return None

    def plan(self, split: SplitSettings, federation: Federation, rows: int) -> tuple[SplitSettings, Federation]:
        """The split and federation this method runs in, of `rows` training rows; only references change them."""
        return split, federation
