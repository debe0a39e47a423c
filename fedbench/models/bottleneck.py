"""Bottleneck adapters (Houlsby et al., ICML 2019, arXiv 1902.00751)."""

from __future__ import annotations

from torch import Tensor, nn


class Bottleneck(nn.Module):
    """A linear layer y = W x with a small residual network behind it: y + up(gelu(down(y))).

    Like peft's LoRA layers it holds what it adapts as `base_layer`, so that frozen weights keep their names in a
    checkpoint.
    """

    def __init__(self, layer: nn.Linear, neurons: int) -> None:
        super().__init__()
        self.base_layer = layer
        self.adapter_down = nn.Linear(layer.out_features, neurons)
        self.adapter_up = nn.Linear(neurons, layer.out_features)

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = self.base_layer(input)
        added: Tensor = self.adapter_up(nn.functional.gelu(self.adapter_down(out)))
        return out + added
