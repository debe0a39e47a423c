"""Differential privacy of clients, laid over any method whose server needs no more than sums (`Method.needs`).

Each client's update is scaled down to an L2 norm of at most `clip`, and all count alike. The server is handed the mean
of a round's updates and nothing else, with Gaussian noise of standard deviation `noise` times `clip` on their sum
(DP-FedAvg, McMahan et al. 2018, section 3, with cohorts of a fixed size). What is protected is all that one client
holds, against whoever sees the server's models. The record itself, with its losses and scores, is not private.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from fedbench.api.messages import ClientId, Message
from fedbench.api.sides import Method
from fedbench.api.sums import summed
from fedbench.errors import FedbenchError
from fedbench.rng import Streams
from fedbench.run.gate import update_norm
from fedbench.scenario.tables import PrivacySettings


@dataclass(frozen=True)
class Private:
    """Settings of differential privacy, and the run's streams, of which noise has its own."""

    settings: PrivacySettings
    streams: Streams


def check_private(method: Method, settings: PrivacySettings) -> None:
    """Raise FedbenchError where a method cannot be run under privacy, or where epsilon cannot be told."""
    if method.needs != "sum":
        raise FedbenchError(
            f"{method.name}: its server needs each client's upload, so [privacy] is not for it; choose a method that "
            "needs sums (`fedbench list methods`), or leave [privacy] out"
        )
    spent(settings, clients=2, cohort=1, rounds=1)


def clipped(
    method: str, messages: Sequence[Message], start: Mapping[str, Tensor], settings: PrivacySettings
) -> list[Message]:
    """An upload whose adapter is at most `clip` away from the values that training started from, with a count of 1.

    Raises FedbenchError for an upload with anything beside its adapter, to which nothing would be done.
    """
    if other := sorted({m.kind for m in messages} - {"adapter"}):
        raise FedbenchError(
            f"{method}: clients also send {other[0]}, which is neither clipped nor noised; leave [privacy] out"
        )
    out = []
    for message in messages:
        norm = update_norm(message.tensors, start)
        scale = min(1.0, settings.clip / norm) if norm > 0 else 1.0
        tensors = {}
        for name, tensor in message.tensors.items():
            before = start[name].to(tensor) if name in start else torch.zeros_like(tensor)
            tensors[name] = before + scale * (tensor - before)
        out.append(replace(message, tensors=tensors, meta={**message.meta, "num_examples": 1}))
    return out


def noised(
    uploads: Mapping[ClientId, Sequence[Message]], streams: Streams, round: int, settings: PrivacySettings
) -> dict[ClientId, Sequence[Message]]:
    """The uploads of a round as one: their mean with noise, under the number of the first client."""
    [mean] = summed(list(uploads.values()))
    deviation = settings.noise * settings.clip / len(uploads)
    tensors = {}
    for name, tensor in mean.tensors.items():
        generator = streams.torch("privacy-noise", round, name)
        tensors[name] = tensor + deviation * torch.randn(tensor.shape, generator=generator).to(tensor)
    return {min(uploads): [replace(mean, tensors=tensors)]}


def spent(settings: PrivacySettings, clients: int, cohort: int, rounds: int) -> dict[str, Any]:
    """The record's block: what was protected, and the epsilon that so many rounds cost.

    By Renyi differential privacy of sampling without replacement (Wang et al. 2019), of neighbours in which one client
    is another: their sums differ by up to twice the clip. Raises FedbenchError where dp-accounting is not installed.
    """
    try:
        from dp_accounting import NeighboringRelation, dp_event, rdp
    except ImportError:
        raise FedbenchError("[privacy] needs the package dp-accounting: pip install 'fedbench[privacy]'") from None
    epsilon: float | None = None
    if settings.noise > 0 and rounds:
        gaussian = dp_event.GaussianDpEvent(settings.noise / 2)
        sampled = dp_event.SampledWithoutReplacementDpEvent(clients, cohort, gaussian)
        accountant = rdp.RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_ONE)
        accountant.compose(dp_event.SelfComposedDpEvent(sampled, rounds))
        epsilon = float(accountant.get_epsilon(settings.delta))
    return {
        "unit": "client",
        "neighbours": "one client replaced",
        "clip": settings.clip,
        "noise": settings.noise,
        "sampling": "fixed size, without replacement",
        "clients": clients,
        "cohort": cohort,
        "rounds": rounds,
        "delta": settings.delta,
        "epsilon": epsilon,
        "accountant": f"dp-accounting {version('dp-accounting')}, Renyi",
    }
