"""Weights in and out of a model.

Frozen weights go by the names of the plain checkpoint, tunables (LoRA, head, and biases where the model's specification
says so) by their parameter names in the built module.
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


def set_tunable(model: nn.Module, biases: bool) -> None:
    """Note in a model that was just built whether its own biases are tunables too."""
    model._tunable_biases = biases  # type: ignore[assignment]  # no module and no parameter


def _is_added(name: str) -> bool:
    """Whether a parameter is of an adapter: of LoRA, of a bottleneck, of a prefix or of a prompt."""
    return any(word in name for word in (".lora_", ".adapter_", ".prefix.", ".prompt."))


def _is_frozen(parts: Parts, name: str) -> bool:
    if _is_added(name) or parts.is_head(name):
        return False
    return not (getattr(parts.model, "_tunable_biases", False) and name.endswith(".bias"))


def frozen_state(model: nn.Module) -> dict[str, Tensor]:
    """Frozen tensors by checkpoint name: no tunables. They share memory with the model; do not write to them."""
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
    """Names of all tunables, in the model's order: LoRA and head, and biases where they are tunable."""
    parts = Parts(model)
    return [n for n, _ in model.named_parameters() if not _is_frozen(parts, n)]


def get_tensors(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """Copies of the named parameters, on the CPU."""
    parameters = dict(model.named_parameters())
    return {n: parameters[n].detach().to("cpu", copy=True) for n in names}


@torch.no_grad()
def set_tensors(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy values into the named parameters. Raises FedbenchError for an unknown name or another shape."""
    for name, value in values.items():
        try:
            parameter = model.get_parameter(name)  # walking through all modules takes longer than the copies
        except AttributeError:
            parameter = None
        if parameter is None or parameter.shape != value.shape:
            raise FedbenchError(f"{name!r} {list(value.shape)} is no parameter of the model, or of another shape")
        parameter.copy_(value)


def initial_tunables(model: nn.Module, streams: Streams) -> dict[str, Tensor]:
    """Start values of all tunables of an FM: LoRA A Kaiming-uniform (a = sqrt 5), B zero, head normal, its biases zero.

    Of a bottleneck down is normal and up zero, so that it changes nothing at first. Biases of the FM itself start as
    they are.

    Norms within a head start as one. Each tensor has a stream of its own, named after it, so every method starts from
    the same values.
    """
    deviation = float(getattr(model.config, "initializer_range", 0.02))
    parameters, parts = dict(model.named_parameters()), Parts(model)
    out = {}
    for name in tunable_names(model):
        value = torch.zeros(parameters[name].shape)
        if not _is_added(name) and not parts.is_head(name):
            out[name] = parameters[name].detach().to("cpu", copy=True)
            continue
        generator = streams.torch("initialisation", name)
        if ".lora_A." in name:
            nn.init.kaiming_uniform_(value, a=5**0.5, generator=generator)
        elif ".lora_" not in name and value.dim() == 1 and name.endswith(".weight"):
            nn.init.ones_(value)
        elif ".lora_" not in name and ".adapter_up." not in name and value.dim() > 1:
            nn.init.normal_(value, std=deviation, generator=generator)
        out[name] = value
    return out
