"""Decoders, which look back only: with a head for classes, and with one for the next token.

The head for classes reads a row's last token, the only one that has seen the whole row. Of the next token a model gives
what is asked for, its loss and the likeliest token, and never the logits of a whole batch.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput, SequenceClassifierOutput

from fedbench.objectives.base import IGNORED


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
        hidden = _states(body, input_ids, attention_mask, position_ids)
        if attention_mask is None:
            read = hidden[:, -1]
        else:
            read = hidden[torch.arange(len(hidden), device=hidden.device), attention_mask.sum(1) - 1]
        return SequenceClassifierOutput(logits=self.score(read))


class NextToken(nn.Module):
    """A language model of transformers that answers each token with two numbers, not with logits of its vocabulary.

    Its vocabulary's matrix is frozen; where it is that of the embeddings, the model holds it once, as that.
    """

    base_model_prefix: str

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> CausalLMOutput:
        """Loss and likeliest token, [B, T, 2] as `logits`, of tokens and targets [B, T]; nothing without targets."""
        body = self.get_submodule(self.base_model_prefix)
        hidden = _states(body, input_ids, attention_mask, position_ids)
        if targets is None:
            return CausalLMOutput(logits=hidden[..., :0])
        head = getattr(self, VOCABULARY, None)
        weight = cast(Any, body).get_input_embeddings().weight if head is None else cast(Any, head).weight
        return CausalLMOutput(logits=next_tokens(hidden, weight, targets))


def _states(body: nn.Module, tokens: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
    """The last hidden states [B, T, d]. Without a mask all tokens are real, which transformers wants to be told."""
    mask = torch.ones_like(tokens) if mask is None else mask
    states: Tensor = body(tokens, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
    return states


VOCABULARY = "lm_head"
"""What transformers calls the layer that gives logits of the vocabulary, in all families here."""
AT_ONCE = 2**22
"""The most logits that are computed at once, 16 MB of them: of 49,152 words those of 85 tokens."""


def next_tokens(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each target in nats, and the likeliest token, [.., 2]; 0 where nothing is asked for.

    hidden: [.., d]; weight: [V, d], which gets no gradient; targets: [..], `IGNORED` where nothing is asked for. Logits
    are computed in pieces, for these targets alone, and kept by nobody.
    """
    asked = targets != IGNORED
    losses, answers = _NextTokens.apply(hidden[asked], weight, targets[asked])
    out = losses.new_zeros(*targets.shape, 2)
    out[asked] = torch.stack([losses, answers.to(losses.dtype)], -1)
    return out


class _NextTokens(torch.autograd.Function):
    """hidden [M, d], weight [V, d], targets [M] -> losses [M], likeliest tokens [M].

    The gradient of each loss is computed on the way, while its logits are there: it is but to be scaled later.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        assert not ctx.needs_input_grad[1], "the matrix of the vocabulary is frozen"
        losses, answers, grads = [], [], []
        tokens = max(1, AT_ONCE // len(weight))
        for states, wanted in zip(hidden.split(tokens), targets.split(tokens), strict=True):
            logits = states @ weight.t()
            logits = logits if logits.dtype is torch.float64 else logits.float()
            answers.append(logits.argmax(-1))
            # torch's log-softmax is a tenth as exact over so many words.
            total = logits.logsumexp(-1, keepdim=True)
            losses.append((total - logits.gather(1, wanted[:, None]))[:, 0])
            if ctx.needs_input_grad[0]:
                shares = logits.sub_(total).exp_()
                shares.scatter_add_(1, wanted[:, None], -shares.new_ones(len(wanted), 1))
                grads.append(shares.to(hidden.dtype) @ weight.to(hidden.dtype))
        found = torch.cat(losses), torch.cat(answers)
        ctx.mark_non_differentiable(found[1])
        if grads:
            ctx.save_for_backward(torch.cat(grads))
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (of_states,) = ctx.saved_tensors
        return grads[0].to(of_states.dtype)[:, None] * of_states, None, None


@cache
def _reading_last(kind: Any) -> type[nn.Module]:
    return type(kind.__name__, (LastToken, kind), {})


@cache
def _predicting(kind: Any) -> type[nn.Module]:
    return type(kind.__name__, (NextToken, kind), {})


def predict_next(model: nn.Module) -> None:
    """Make `model`, a decoder with a head for its vocabulary, a `NextToken`, in place."""
    config: Any = model.config
    if config.tie_word_embeddings:
        delattr(model, VOCABULARY)
    model.__class__ = _predicting(cast(Any, type(model)))


def read_last(model: nn.Module) -> None:
    """Make `model`, a decoder with a head for classes, one whose head reads each row's last token, in place."""
    model.__class__ = _reading_last(cast(Any, type(model)))


def body_of(model: nn.Module) -> nn.Module:
    """The decoder itself, without its head."""
    return model.get_submodule(str(model.base_model_prefix))
