"""FM exposure: how much of the FM's weights a client ends up holding.

A proxy method exists because the FM must not be given away, so what its proxy gives away is part of the result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedbench.api.messages import SETUP_KINDS, Message, Source, State
from fedbench.api.sides import Server
from fedbench.files import state_digest
from fedbench.measures.observer import Observer
from fedbench.models.foundation import FoundationModel
from fedbench.models.weights import frozen_state

NEAR = 0.01
"""An element counts as exposed within this relative distance of the FM's value."""


class Exposure:
    """Which elements of the FM have reached a client: verbatim, and within 1% relative.

    What was sent stays sent: `observe` only ever adds. Adapters and head are not part of the FM's frozen state.
    """

    def __init__(self, fm: Mapping[str, Tensor], *embeddings: str) -> None:
        """`fm`: the FM's frozen tensors by name; `embeddings`: the modules of its embedding tables."""
        self._fm = {n: t.detach().cpu() for n, t in fm.items() if t.is_floating_point()}
        self._embeddings = tuple(f"{module}." for module in embeddings)
        self._verbatim = {n: torch.zeros(t.shape, dtype=torch.bool) for n, t in self._fm.items()}
        self._near = {n: torch.zeros(t.shape, dtype=torch.bool) for n, t in self._fm.items()}
        self._whole: set[str] = set()  # tensors of which every element is out: nothing can be added to them

    def observe(self, sent: Mapping[str, Tensor], sources: Mapping[str, Source]) -> None:
        """Compare each frozen tensor in a client's hands with the place in the FM it was taken from."""
        for name, tensor in sent.items():
            source = sources.get(name, Source(name))
            if source.name not in self._fm or source.name in self._whole:
                continue
            whole, value = self._fm[source.name], tensor.detach().cpu()
            if source.index is None and value.dtype == whole.dtype and torch.equal(value, whole):
                self._verbatim[source.name].fill_(True)
                self._near[source.name].fill_(True)
                self._whole.add(source.name)
                continue
            index = torch.arange(whole.shape[source.dim]) if source.index is None else source.index.cpu()
            original = whole.index_select(source.dim, index)
            value = value.to(original.dtype)
            if value.shape != original.shape:
                continue
            same = value == original
            near = (value - original).abs() <= NEAR * original.abs()
            for masks, found in ((self._verbatim, same), (self._near, near)):
                mask = masks[source.name]
                mask.index_copy_(source.dim, index, mask.index_select(source.dim, index) | found)
            if bool(self._verbatim[source.name].all() and self._near[source.name].all()):
                self._whole.add(source.name)

    def __contains__(self, name: str) -> bool:
        """Whether the FM has a tensor of this name."""
        return name in self._fm

    def _share(self, masks: Mapping[str, Tensor], embeddings: bool) -> float:
        names = [n for n in masks if embeddings or not n.startswith(self._embeddings)]
        total = sum(masks[n].numel() for n in names)
        return float(sum(int(masks[n].sum()) for n in names) / total) if total else 0.0

    def block(self) -> dict[str, dict[str, float]]:
        """The record's block: shares from 0 to 1."""
        return {
            label: {"all": self._share(masks, True), "without_embeddings": self._share(masks, False)}
            for label, masks in (("verbatim", self._verbatim), ("within_1_percent", self._near))
        }

    def state(self) -> dict[str, Tensor]:
        """The masks, for a checkpoint."""
        return {f"verbatim.{n}": m for n, m in self._verbatim.items()} | {f"near.{n}": m for n, m in self._near.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._verbatim = {n: state[f"verbatim.{n}"] for n in self._fm}
        self._near = {n: state[f"near.{n}"] for n in self._fm}
        self._whole = set()


class Exposures(Observer):
    """Compares with the FM whatever of it is sent: set-up messages, and the proxy as an alignment left it."""

    name = "exposure"

    def __init__(self, fm: FoundationModel) -> None:
        self.exposure = Exposure(fm.state, fm.family.embeddings, *fm.family.beside)
        self._alignments: set[str] = set()
        self._last: Message | None = None

    def sent(self, round: int, server: Server, messages: Sequence[Message]) -> None:
        for message in messages:
            # Tunables that are the FM's own, as biases may be: where they start is what they are in it.
            own = {n: t for n, t in message.tensors.items() if n in self.exposure} if message.kind == "adapter" else {}
            if own:
                self.exposure.observe(own, {})
            # A large message that has not changed is the same object, round after round.
            if message.kind in SETUP_KINDS and message is not self._last:
                self.exposure.observe(message.tensors, server.fm_sources())
                self._last = message
        # Comparing a proxy with the FM takes some percent of a round, and the same alignment is sent for many rounds.
        alignments = {state_digest(m.tensors) for m in messages if m.kind == "alignment"}
        if not alignments <= self._alignments and (proxy := server.put_in_proxy()) is not None:
            self.exposure.observe(frozen_state(proxy), server.fm_sources())
            self._alignments |= alignments

    def block(self, server: Server) -> dict[str, dict[str, float]]:
        return self.exposure.block()

    def state(self) -> State:
        return State(self.exposure.state())

    def restore(self, state: State | None, notes: Sequence[Any]) -> None:
        assert state is not None
        self.exposure.restore(dict(state.tensors))
