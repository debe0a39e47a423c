"""Prompt tuning: learned vectors beside the embeddings of a row's tokens (Lester et al. 2021, arXiv 2104.08691).

A decoder is given them before its tokens, whose positions then follow theirs, as every token may look back at them. An
encoder is given them behind its tokens and without positions: all tokens see each other wherever they lie, its head
goes on reading the first token, and rows may be as long as before. For images that is visual prompt tuning in its
shallow form (Jia et al. 2022, arXiv 2203.12119). Batches are fed padded to models that have a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedbench.errors import FedbenchError
from fedbench.models.parts import family_of, note_added_tokens
from fedbench.objectives.base import IGNORED


class Prompt(nn.Module):
    """`tokens` vectors of the width of an embedding, [tokens, d]."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.zeros(tokens, width))

    def rows(self, like: Tensor) -> Tensor:
        """The vectors for each row of embeddings [B, T, d]: [B, tokens, d]."""
        return self.tokens.to(like.dtype).expand(len(like), -1, -1)


def add_prompt(model: nn.Module, tokens: int) -> None:
    """Give a model a prompt of so many vectors, as wide as its embeddings, which may be narrower than its layers.

    Raises FedbenchError for an encoder that goes by distances of tokens: a prompt has none.
    """
    note_added_tokens(model)
    family = family_of(model)
    config: Any = model.config
    prompt = Prompt(tokens, getattr(config, "embedding_size", config.hidden_size))
    if family.reads == "last":
        body = model.get_submodule(str(model.base_model_prefix))
        body.add_module("prompt", prompt)
        body.register_forward_pre_hook(_embedded, with_kwargs=True)
        model.register_forward_pre_hook(_extended_before, with_kwargs=True)
        model.register_forward_hook(_cut)
        return
    if family.modality == "text" and (family.rotary or family.relative or not family.packs):
        raise FedbenchError(f"prompt: a model of type {family.name} goes by distances of tokens, which a prompt lacks")
    embeddings = model.get_submodule(family.embeddings)
    embeddings.add_module("prompt", prompt)
    embeddings.register_forward_hook(_behind)
    model.register_forward_pre_hook(_extended_behind, with_kwargs=True)


def _behind(embeddings: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    """Embeddings [B, T, d] with the prompt behind them."""
    prompt = embeddings.prompt
    assert isinstance(prompt, Prompt)
    return torch.cat([output, prompt.rows(output)], 1)


def _extended_behind(model: nn.Module, args: Any, given: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Inputs of an encoder whose mask [B, T], if there is one, counts the prompt behind its tokens."""
    prompt: Any = model.get_submodule(family_of(model).embeddings).prompt
    return args, _with(given, "attention_mask", lambda mask: (mask, mask.new_ones(len(mask), len(prompt.tokens))))


def _extended_before(model: nn.Module, args: Any, given: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Inputs of a decoder whose mask and targets [B, T], if there are any, count the prompt before its tokens."""
    body: Any = model.get_submodule(str(model.base_model_prefix))
    config: Any = model.config
    new = len(body.prompt.tokens)
    length, most = given["input_ids"].shape[1] + new, int(config.max_position_embeddings)
    if length > most:
        raise FedbenchError(
            f"rows of {length - new} tokens with a prompt of {new} are longer than the FM's {most} positions; lower "
            "dataset.max_length or the prompt's tokens"
        )
    given = _with(given, "attention_mask", lambda mask: (mask.new_ones(len(mask), new), mask))
    return args, _with(given, "targets", lambda asked: (asked.new_full((len(asked), new), IGNORED), asked))


def _with(given: Mapping[str, Any], name: str, parts: Any) -> dict[str, Any]:
    return {**given, name: torch.cat(parts(given[name]), 1)} if given.get(name) is not None else dict(given)


def _embedded(body: nn.Module, args: Any, given: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A decoder's tokens [B, T] as embeddings with the prompt before them, [B, tokens + T, d]."""
    [tokens] = args
    own: Any = body
    words = own.get_input_embeddings()(tokens)
    return (), {**given, "inputs_embeds": torch.cat([own.prompt.rows(words), words], 1)}


def _cut(model: nn.Module, _inputs: Any, output: Any) -> Any:
    """What a decoder answers to its tokens, without what it answers to the prompt."""
    body: Any = model.get_submodule(str(model.base_model_prefix))
    if output.logits.dim() == 3:
        output.logits = output.logits[:, len(body.prompt.tokens) :]
    return output
