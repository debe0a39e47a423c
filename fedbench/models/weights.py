"""Weights in and out of a model.

Frozen weights go by the names of the plain checkpoint, tunables (LoRA and head) by their parameter names in the
built module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fedbench.errors import FedbenchError
from fedbench.models.parts import Parts
from fedbench.rng import Streams


def checkpoint_name(name: str) -> str:
    """What the plain checkpoint calls a frozen parameter of a model with LoRA."""
    return name.replace(".base_layer.", ".")


def _is_frozen(parts: Parts, name: str) -> bool:
    return ".lora_" not in name and not parts.is_head(name)


def frozen_state(model: nn.Module) -> dict[str, Tensor]:
    """Frozen tensors by checkpoint name: no LoRA, no head. They share memory with the model; do not write to them."""
    parts = Parts(model)
    return {checkpoint_name(n): t.detach() for n, t in model.state_dict().items() if _is_frozen(parts, n)}


@torch.no_grad()
def load_frozen(model: nn.Module, state: Mapping[str, Tensor], share: bool = False) -> None:
    """Copy frozen tensors into `model`. Raises FedbenchError unless names and shapes are exactly the model's.

    `share`: let the model's tensors be those of `state`, where nobody will write to either.
    """
    parts = Parts(model)
    mine = {checkpoint_name(n): t for n, t in model.state_dict(keep_vars=True).items() if _is_frozen(parts, n)}
    if missing := sorted(set(mine) - set(state)):
        raise FedbenchError(f"frozen weights: {missing[0]!r} is missing ({len(missing)} in all)")
    if extra := sorted(set(state) - set(mine)):
        raise FedbenchError(f"frozen weights: the model has no {extra[0]!r} ({len(extra)} in all)")
    for name, tensor in mine.items():
        if tensor.shape != state[name].shape:
            raise FedbenchError(f"frozen weights: {name!r} is {list(state[name].shape)}, expected {list(tensor.shape)}")
        if share and tensor.dtype == state[name].dtype and tensor.device == state[name].device:
            tensor.data = state[name]
        elif tensor.data_ptr() != state[name].data_ptr():
            tensor.copy_(state[name])


def tunable_names(model: nn.Module) -> list[str]:
    """Names of all LoRA and head parameters, in the model's order."""
    parts = Parts(model)
    return [n for n, _ in model.named_parameters() if not _is_frozen(parts, n)]


def get_tensors(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """Copies of the named parameters, on the CPU."""
    parameters = dict(model.named_parameters())
    return {n: parameters[n].detach().to("cpu", copy=True) for n in names}


@torch.no_grad()
def set_tensors(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy values into the named parameters. Raises FedbenchError for an unknown name or another shape."""
    parameters = dict(model.named_parameters())
    for name, value in values.items():
        if name not in parameters or parameters[name].shape != value.shape:
            raise FedbenchError(f"{name!r} {list(value.shape)} is no parameter of the model, or of another shape")
        parameters[name].copy_(value)


def initial_tunables(model: nn.Module, streams: Streams) -> dict[str, Tensor]:
    """Start values of all tunables of an FM: LoRA A Kaiming-uniform (a = sqrt 5), B zero, head normal, biases zero.

    Each tensor has a stream of its own, named after it, so every method starts from the same values.
    """
    deviation = float(getattr(model.config, "initializer_range", 0.02))
    parameters = dict(model.named_parameters())
    out = {}
    for name in tunable_names(model):
        value = torch.zeros(parameters[name].shape)
        generator = streams.torch("initialisation", name)
        if ".lora_A." in name:
            nn.init.kaiming_uniform_(value, a=5**0.5, generator=generator)
        elif ".lora_" not in name and value.dim() > 1:
            nn.init.normal_(value, std=deviation, generator=generator)
        out[name] = value
    return out
