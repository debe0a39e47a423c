"""Decoders that classify: the head reads a row's last token, the only one that has seen the whole row."""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput


class LastToken(nn.Module):
    """A classifier of transformers whose head is given the last real token of each row, by the mask.

    transformers takes the last token that is not the padding token, and gives its head all tokens. Both read the same
    one of a row that does not end with the padding token.
    """

    base_model_prefix: str
    score: nn.Module

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> SequenceClassifierOutput:
        """Logits [B, C] of tokens [B, T]; without a mask the body has gathered the tokens to read, [B, 1, d]."""
        body = self.get_submodule(self.base_model_prefix)
        given: dict[str, Any] = {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": False}
        hidden: Tensor = body(input_ids, **given).last_hidden_state
        if attention_mask is None:
            read = hidden[:, -1]
        else:
            read = hidden[torch.arange(len(hidden), device=hidden.device), attention_mask.sum(1) - 1]
        return SequenceClassifierOutput(logits=self.score(read))


@cache
def _reading_last(kind: Any) -> type[nn.Module]:
    return type(kind.__name__, (LastToken, kind), {})


def read_last(model: nn.Module) -> None:
    """Make `model`, a decoder with a head for classes, one whose head reads each row's last token, in place."""
    model.__class__ = _reading_last(cast(Any, type(model)))


def body_of(model: nn.Module) -> nn.Module:
    """The decoder itself, without its head."""
    return model.get_submodule(str(model.base_model_prefix))
