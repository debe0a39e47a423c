"""Linear layers whose weight is a product of two of lower rank."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from fedbench.errors import FedbenchError
from fedbench.models.linear import FrozenLinear


def low_rank(linear: nn.Linear, rank: int) -> nn.Sequential:
    """A layer in the place of `linear` [in, out]: `down` [in, rank], then `up` [rank, out] with the bias.

    Raises FedbenchError for a rank that is none, or that the layer does not have.
    """
    most = min(linear.in_features, linear.out_features)
    if not 1 <= rank <= most:
        raise FedbenchError(f"a projection of {linear.in_features} to {linear.out_features} has no rank {rank}")
    down = nn.Linear(linear.in_features, rank, bias=False)
    up = nn.Linear(rank, linear.out_features, bias=linear.bias is not None)
    for layer in (down, up):
        FrozenLinear.adopt(layer)
    return nn.Sequential(OrderedDict(down=down, up=up))
