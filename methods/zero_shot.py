"""Zero-shot: the FM as it is, with the head it was pre-trained with; no rounds, nothing sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from torch import nn

from fedbench.api.context import ClientContext, ServerContext
from fedbench.api.local import LocalResult, LocalTask
from fedbench.api.messages import ClientId, Message, State
from fedbench.api.sides import Client, Method, Server
from fedbench.data.examples import Examples
from fedbench.models.foundation import FoundationModel
from fedbench.models.weights import set_tensors
from fedbench.scenario.tables import Federation, SplitSettings


class ZeroShot(Method):
    """The untouched FM. Available only where the FM has a trained head for the task's classes."""

    name: ClassVar[str] = "zero-shot"
    version: ClassVar[int] = 1
    needs: ClassVar[Literal["sum", "each"]] = "sum"

    def unavailable(self, fm: FoundationModel) -> str | None:
        return None if fm.trained_head is not None else f"{fm.name} has no head trained for this task"

    def plan(self, split: SplitSettings, federation: Federation, rows: int) -> tuple[SplitSettings, Federation]:
        return split, federation.model_copy(update={"rounds": 0})

    def server(self, fm: FoundationModel, public: Examples | None, ctx: ServerContext) -> Server:
        model = fm.build(None, ctx.device)
        set_tensors(model, fm.trained_head or {})
        return UntouchedServer(model)

    def client(self, ctx: ClientContext) -> Client:
        return AbsentClient()


class UntouchedServer(Server):
    """Holds the FM and never sends anything."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def broadcast(self, round: int, cohort: Sequence[ClientId]) -> Mapping[ClientId, Sequence[Message]]:
        return {}

    def aggregate(self, round: int, uploads: Mapping[ClientId, Sequence[Message]]) -> None:
        raise NotImplementedError("zero-shot has no rounds")

    def put_in_fm(self) -> nn.Module:
        return self.model

    def state(self) -> State:
        return State()

    def restore(self, state: State) -> None:
        pass


class AbsentClient(Client):
    """No client takes part."""

    def task(self, round: int, inbox: Sequence[Message], data: Examples) -> LocalTask:
        raise NotImplementedError("zero-shot has no rounds")

    def upload(self, round: int, result: LocalResult) -> Sequence[Message]:
        raise NotImplementedError("zero-shot has no rounds")
