"""What those LoRA methods share that look at products B A: pairs, stacks, and what is added to frozen weights.

Shapes: A is [r, in], B is [out, r], their product has the shape of the weight it is added to, [out, in].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fedbench.api.context import ServerContext
from fedbench.api.messages import Message, State
from fedbench.methods.fedavg_lora import AdapterClient, AdapterServer, LoraMethod
from fedbench.models.foundation import FoundationModel
from fedbench.models.weights import frozen_state

Factors = tuple[Tensor, Tensor]
"""B [out, r] and A [r, in]."""


def pairs(names: Iterable[str]) -> list[tuple[str, str, str]]:
    """(name of A, name of B, frozen weight they are added to) of every adapter among `names`."""
    found = [name for name in names if ".lora_A." in name]
    return [(a, a.replace(".lora_A.", ".lora_B."), f"{a.partition('.lora_A.')[0]}.weight") for a in found]


def stacked(factors: Sequence[Factors], shares: Sequence[float]) -> Factors:
    """B and A whose product is the sum of shares times products: clients' factors beside each other (FLoRA, section 3).

    Ranks may differ; the stack has their sum.
    """
    b = torch.cat([b for b, _ in factors], 1)
    a = torch.cat([a * share for (_, a), share in zip(factors, shares, strict=True)], 0)
    return b, a


def decomposed(factors: Factors, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U [out, k], S [k] and Vᵀ [k, in] of the SVD of B A, with k at most `rank`, in fp64.

    By the SVD of the small product of the two triangles of QR. The entry of largest size of each column of U is
    positive, so that machines agree on the signs.
    """
    b, a = (factor.double() for factor in factors)
    (q_b, r_b), (q_a, r_a) = torch.linalg.qr(b), torch.linalg.qr(a.T)
    u, s, vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    u, vt = q_b @ u[:, :rank], vt[:rank] @ q_a.T
    signs = u.gather(0, u.abs().argmax(0, keepdim=True)).sign().where(s[:rank] > 0, torch.ones(()).to(u))
    return u * signs, s[:rank], vt * signs.T


def folded(weight: Tensor, factors: Factors) -> Tensor:
    """weight + B A, on the CPU: the same bits at the server and at every client."""
    b, a = (factor.to("cpu", weight.dtype) for factor in factors)
    return weight.cpu() + b @ a


class FoldingServer(AdapterServer):
    """Adds products to the FM's frozen weights, and has every client add them as well.

    A client is first sent the FM as it was, then the factors of all that was added since it last took part, or the
    changed weights where those are smaller.
    """

    method: LoraMethod

    def __init__(self, method: LoraMethod, fm: FoundationModel, ctx: ServerContext) -> None:
        super().__init__(method, fm, ctx)
        state = frozen_state(self.full)
        self.original = {weight: state[weight].clone() for _, _, weight in pairs(self.initial)}
        self.scale = method.lora.alpha / method.lora.r
        self.added: list[dict[str, Factors]] = []  # the last of them made the present version

    def add(self, factors: Mapping[str, Factors]) -> None:
        """Add a product to each of these frozen weights; it makes a new version of the model."""
        state = frozen_state(self.full)
        with torch.no_grad():
            for name, own in factors.items():
                state[name].copy_(folded(state[name], own))
        self.version += 1
        self.added.append(dict(factors))
        # What is longer than the weights themselves is never sent.
        while len(self.added) > 1 and self._elements(self.added) >= self._whole():
            del self.added[0]

    def _elements(self, added: Sequence[Mapping[str, Factors]]) -> int:
        return sum(b.numel() + a.numel() for each in added for b, a in each.values())

    def _whole(self) -> int:
        return sum(weight.numel() for weight in self.original.values())

    def whole(self) -> tuple[Message, int]:
        message, _ = super().whole()
        return Message(message.kind, {**message.tensors, **self.original}, message.meta), 0

    def update_since(self, version: int) -> Message:
        missed = self.version - version
        if missed > len(self.added) or self._elements(self.added[-missed:]) >= self._whole():
            state = frozen_state(self.full)
            return Message("alignment", {f"whole.{name}": state[name] for name in self.original})
        tensors = {
            f"{i}.{role}.{name}": factor
            for i, each in enumerate(self.added[-missed:])
            for name, own in each.items()
            for role, factor in zip("ba", own, strict=True)
        }
        return Message("alignment", tensors, {"versions": missed})

    def state(self) -> State:
        state, frozen = super().state(), frozen_state(self.full)
        tensors = {f"weight.{name}": frozen[name] for name in self.original} if self.version else {}
        for i, each in enumerate(self.added):
            for name, (b, a) in each.items():
                tensors |= {f"added.{i}.b.{name}": b, f"added.{i}.a.{name}": a}
        return State({**state.tensors, **tensors}, {**state.values, "added": len(self.added)})

    def restore(self, state: State) -> None:
        super().restore(state)
        own = frozen_state(self.full)
        with torch.no_grad():
            for name, original in self.original.items():
                own[name].copy_(state.tensors.get(f"weight.{name}", original))
        self.added = [{} for _ in range(state.values["added"])]
        for i, each in enumerate(self.added):
            start = f"added.{i}.b."
            for name in (n.removeprefix(start) for n in state.tensors if n.startswith(start)):
                each[name] = state.tensors[f"{start}{name}"], state.tensors[f"added.{i}.a.{name}"]


class FoldingClient(AdapterClient):
    """Adds to its frozen weights what it is sent to add."""

    def receive(self, message: Message) -> None:
        if message.kind != "alignment":
            super().receive(message)
            return
        changed = dict(self.frozen)
        for i in range(int(message.meta.get("versions", 0))):
            start = f"{i}.b."
            for name in (n.removeprefix(start) for n in message.tensors if n.startswith(start)):
                factors = message.tensors[f"{start}{name}"], message.tensors[f"{i}.a.{name}"]
                changed[name] = folded(changed[name], factors)
        whole = {n.removeprefix("whole."): t for n, t in message.tensors.items() if n.startswith("whole.")}
        self.frozen = self.ctx.modules.intern({**changed, **whole})
