"""GPT-2's linear layers, which keep their weights transposed, made linear layers as all others have them."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


@torch.no_grad()
def straighten(model: nn.Module) -> None:
    """Replace every `Conv1D` of `model` by the `nn.Linear` that computes the same; its weight is the other's transpose.

    Whatever looks at weights then finds a neuron of an FFN where it always is: a row on the way in, a column on the way
    out.
    """
    for name in [name for name, module in model.named_modules() if isinstance(module, Conv1D)]:
        layer = model.get_submodule(name)
        assert isinstance(layer, Conv1D)
        linear = nn.utils.skip_init(nn.Linear, layer.nx, layer.nf, dtype=layer.weight.dtype)
        linear.weight.copy_(layer.weight.t())
        linear.bias.copy_(layer.bias)
        model.set_submodule(name, linear)
