"""MPNet's attention, made to go through transformers' registry like that of all other families.

transformers computes it in the layer, with a learned bias of the distance of two tokens in the scores (Song et al.
2020). Where the model is told to compute another attention than its own, that one is called, and is to add the bias.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, cast

from torch import Tensor, nn

from fedbench.compat import attention_of

ENCODER = "mpnet.encoder"
"""The encoder's path, in all of MPNet's models."""


def attend_by_registry(model: nn.Module) -> None:
    """Make the encoder of `model`, an MPNet, and its attentions ask for the attention that is set, in place."""
    encoder: Any = model.get_submodule(ENCODER)
    encoder.__class__, own = _classes()
    for layer in encoder.layer:
        layer.attention.attn.__class__ = own
        layer.attention.attn.config = model.config


def distance_bias(model: nn.Module) -> Callable[[int], Tensor] | None:
    """length -> what MPNet adds to the scores of a row of that length, [1, heads, length, length]; None of others."""
    if getattr(getattr(model, "config", None), "model_type", None) != "mpnet":
        return None
    encoder: Any = model.get_submodule(ENCODER)

    def of(length: int) -> Tensor:
        table = encoder.relative_attention_bias.weight
        assert not table.requires_grad, "the bias of distances is frozen"
        bias: Tensor = encoder.compute_position_bias(table.new_empty(1, length))
        return bias.detach()

    return of


@cache
def _classes() -> tuple[Any, Any]:
    """The encoder and its attention; made when the first MPNet is."""
    from transformers import AttentionInterface
    from transformers.modeling_outputs import BaseModelOutput
    from transformers.models.mpnet import modeling_mpnet as mpnet

    registry = AttentionInterface()

    class Encoder(mpnet.MPNetEncoder):  # type: ignore[misc]  # transformers is not typed here
        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if attention_of(self.config) not in registry:
                return super().forward(hidden_states, *args, **kwargs)
            for layer in self.layer:
                out = layer(hidden_states)
                hidden_states = out[0] if isinstance(out, tuple) else out
            return BaseModelOutput(hidden_states) if kwargs.get("return_dict") else (hidden_states,)

    class Attention(mpnet.MPNetSelfAttention):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if (name := attention_of(self.config)) not in registry:
                return super().forward(hidden_states, *args, **kwargs)
            shape = (*hidden_states.shape[:-1], -1, self.attention_head_size)
            query, key, value = (
                cast(nn.Module, p)(hidden_states).view(shape).transpose(1, 2) for p in (self.q, self.k, self.v)
            )
            mixed, _ = registry[name](self, query, key, value, None)
            return (self.o(mixed.flatten(2)),)

    return Encoder, Attention
