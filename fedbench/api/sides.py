"""The interface of a federated method: Server, Client, Method.

Only messages cross the boundary between server and clients. A `Server` never sees a client's rows, a
`Client` never sees the foundation model (FM); what one side wants the other to know, it has to send.

A method is a frozen set of validated hyper-parameters that makes the two sides:

    Method.server(fm, public, ctx) -> Server        Method.client(ctx) -> Client

Clients do not loop over their data: they *declare* their local training as a `LocalTask`, and the harness
(`fedbench.training.alone`) executes the tasks of a round.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict
from torch import nn

from fedbench.api.context import ClientContext, ServerContext
from fedbench.api.local import LocalResult, LocalTask, PersonalModel
from fedbench.api.messages import ClientId, Message, Source, State, TensorSpec
from fedbench.data.examples import Examples
from fedbench.models.foundation import FoundationModel
from fedbench.scenario.tables import Federation, SplitSettings


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
    def put_in_fm(self) -> nn.Module | None:
        """Write the tuned parameters into the FM and return it, to be evaluated.

        Frozen weights are part of it: a method that changes them at its clients changes them here as well, and whatever
        is measured on the FM then is measured on the changed one. None where there is no one model for all clients,
        which only a method that is `personal` may say.
        """

    def farewell(self, clients: Sequence[ClientId]) -> Mapping[ClientId, Sequence[Message]]:
        """What these clients need for models of their own after the last round; asked of a method that is `personal`.

        Like any method's final model it is charged to nobody.
        """
        return {}

    def put_in_proxy(self) -> nn.Module | None:
        """Write the global tunables into the model that clients train and return it; None where it is the FM."""
        return None

    def fm_names(self) -> Mapping[str, str]:
        """Name of each tunable in the proxy -> its name in the FM. Required where there is a proxy."""
        return {}

    def fm_sources(self) -> Mapping[str, Source]:
        """Name of each frozen tensor of the proxy -> where it was taken from; default: the same name, whole."""
        return {}

    def expected(self, round: int, client: ClientId) -> Mapping[str, Mapping[str, TensorSpec]]:
        """Kind -> tensors an upload of that kind of this client must hold in this round; kinds left out are refused.

        Asked after `broadcast`, for each client that was sent something. Clients may be asked for different shapes:
        adapters of mixed ranks travel, and are charged, at their own.
        """
        return {}

    def trainable(self, client: ClientId) -> int:
        """How many parameters a client trains, head included; by default those of the adapter it sends back."""
        return sum(math.prod(spec.shape) for spec in self.expected(0, client).get("adapter", {}).values())

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


def tuned_fm(server: Server) -> nn.Module:
    """The FM with the tuned parameters in it, of a server that has one model for all clients."""
    model = server.put_in_fm()
    assert model is not None, "there is no one model for all clients"
    return model


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

    def personal(self, inbox: Sequence[Message]) -> PersonalModel | None:
        """Its own model after the last round, by what `Server.farewell` sent it; None for a client that has none."""
        return None

    def state(self) -> State:
        """Everything `restore` needs on a client newly made; empty for a client without memory."""
        return State()

    def restore(self, state: State) -> None:  # noqa: B027 - a client without memory has nothing to do
        """Become the client that `state` was taken from."""


class Method(BaseModel, ABC):
    """A federated method: its name, its version and its validated hyper-parameters.

    A subclass declares hyper-parameters as pydantic fields. Raise `version` whenever a change alters results:
    records of another version are never taken for the method's own.

    needs: what the server has to see of a round's uploads. "sum": no more than their sum, which is what secure
    aggregation leaves it (`fedbench.api.sums` says how a round's messages become one); `fedbench check` then hands
    `aggregate` that alone. "each": every client's upload. personal: whether clients end with models of their own, which
    are scored on test rows of each client's own, beside or instead of one model for all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: ClassVar[str]
    version: ClassVar[int] = 1
    needs: ClassVar[Literal["sum", "each"]] = "each"
    personal: ClassVar[bool] = False

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
