"""Whether a plugin's description of a family is right: fedbench's own passes have to give what transformers gives."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from fedbench.data.examples import Batch, Examples
from fedbench.errors import FedbenchError
from fedbench.forward.feed import Forward, forward
from fedbench.machine.device import Execution
from fedbench.models.foundation import FoundationModel
from fedbench.models.spec import LoraSpec
from fedbench.models.weights import tunable_names
from fedbench.rng import Streams

LENGTHS = (3, 12, 5, 9)
"""Tokens of the rows; of different lengths, so that a padded batch has padding."""


def check_family(fm: FoundationModel) -> None:
    """Compare the packed passes, module by module and by whole layers, with transformers' own, on random rows.

    LoRA and head are random, and so are biases and LayerNorms: those of a fresh checkpoint are all alike. Only texts of
    a family that gives its positions are packed; any other model is computed by transformers anyway. Raises
    FedbenchError where answers differ by more than rounding.
    """
    if fm.family.modality != "text" or fm.family.position_offset is None:
        return
    streams = Streams(0, "agreement")
    model, batch = _random_model(fm, streams), _random_rows(fm, streams)
    with torch.no_grad():
        expected = Forward(model, packed=False).logits(batch)
        if all(_agrees(answer, expected) for answer in _packed(model, batch)):
            return
    raise FedbenchError(
        f"family {fm.spec.model_type!r}: its description gives other answers than transformers does; look at residual, "
        "attention_norm, ffn_norm and position_offset (docs/adding-a-family.md), or set position_offset to None"
    )


def _random_model(fm: FoundationModel, streams: Streams) -> nn.Module:
    model = fm.build(LoraSpec(2, 4), torch.device("cpu"))
    tunable, generator = set(tunable_names(model)), streams.torch("values")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in tunable or p.dim() == 1:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def _random_rows(fm: FoundationModel, streams: Streams) -> Batch:
    table, pad = len(fm.state[f"{fm.family.embeddings}.{fm.family.words}"]), int(fm.processor.pad_token_id)
    ids = np.array([i for i in range(table) if i != pad], dtype=np.int32)
    rng = streams.numpy("tokens")
    tokens = [rng.choice(ids, min(length, fm.positions())) for length in LENGTHS]
    return Examples(torch.zeros(len(tokens), dtype=torch.int64), tokens, pad_token=pad).batch(range(len(tokens)))


def _packed(model: nn.Module, batch: Batch) -> list[Tensor | None]:
    """The answers of both packed passes; None where one ends in an error, as a wrong path can make it."""
    answers: list[Tensor | None] = []
    with forward(model, Execution()) as whole_layers:
        for passing in (Forward(model), whole_layers):
            try:
                answers.append(passing.logits(batch))
            except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
                answers.append(None)
    return answers


def _agrees(answer: Tensor | None, expected: Tensor) -> bool:
    if answer is None or answer.shape != expected.shape:
        return False
    return torch.allclose(answer, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
