"""What secure aggregation leaves a server of a round's uploads: their sum, and nothing of any one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fedbench.api.messages import Message


def summed(uploads: Sequence[Sequence[Message]]) -> list[Message]:
    """The uploads of a round as one, a message of each kind.

    Messages with `num_examples` become the mean weighted by it: what clients who send w x and w let a server know.
    Others become the sum of their tensors. Whole numbers in `meta` are added up, other plain values are the first's.
    Sums of floats are taken in fp64. Raises ValueError where clients sent other kinds, names or shapes than each other.
    """
    return [_summed(list(each)) for each in zip(*uploads, strict=True)]


def _summed(messages: Sequence[Message]) -> Message:
    first = messages[0]
    for other in messages[1:]:
        same = {name: tensor.shape for name, tensor in other.tensors.items()}
        if other.kind != first.kind or same != {name: tensor.shape for name, tensor in first.tensors.items()}:
            raise ValueError(f"{first.kind}: the uploads of two clients have no sum: they differ in names or shapes")
    counts = [float(m.meta.get("num_examples", 1)) for m in messages]
    shares = [n / sum(counts) for n in counts] if "num_examples" in first.meta else [1.0] * len(messages)
    tensors = {}
    for name, tensor in first.tensors.items():
        if tensor.is_floating_point():
            parts = [m.tensors[name].double() * share for m, share in zip(messages, shares, strict=True)]
            tensors[name] = torch.stack(parts).sum(0).to(tensor.dtype)
        else:
            tensors[name] = torch.stack([m.tensors[name] for m in messages]).sum(0).to(tensor.dtype)
    return Message(first.kind, tensors, _meta([m.meta for m in messages]))


def _meta(metas: Sequence[Mapping[str, int | float | str | bool]]) -> dict[str, int | float | str | bool]:
    out: dict[str, int | float | str | bool] = dict(metas[0])
    for name, value in out.items():
        if isinstance(value, int) and not isinstance(value, bool):
            out[name] = sum(int(meta[name]) for meta in metas)
    return out
