"""Foundation models: architecture specifications, LoRA, weights, and access to parts by role.

A model is described by a `ModelSpec` (JSON, sent along with weights), built empty by `build`, and filled by
`load_frozen` and `set_tensors`. Frozen weights go by the names of the plain checkpoint, tunables (LoRA and head) by
their parameter names in the built module.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from fedbench.api.sides import Frozen
from fedbench.errors import FedbenchError
from fedbench.files import state_digest, tensor_digest
from fedbench.models.families import FAMILIES, Family
from fedbench.models.linear import AdaptedLinear, FrozenLinear
from fedbench.rng import Streams

PROJECTIONS = ("query", "key", "value", "output")
"""The linear layers of an attention, in the order of `Family.attention`."""


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """LoRA on these projections of the attention of these layers; None means all layers."""

    r: int
    alpha: float
    dropout: float = 0.0
    layers: tuple[int, ...] | None = None
    projections: tuple[str, ...] = PROJECTIONS


@dataclass(frozen=True)
class ModelSpec:
    """Everything needed to build a classifier but its weights; survives JSON.

    config: a transformers configuration as a dictionary, labels and layer count included.
    ffn_widths: neurons of each layer's FFN.
    """

    model_type: str
    config: Mapping[str, Any]
    ffn_widths: tuple[int, ...]
    lora: LoraSpec | None = None

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    def with_lora(self, lora: LoraSpec | None) -> ModelSpec:
        """The same model with other adapters."""
        return replace(self, lora=lora)

    def with_ffn_widths(self, widths: Sequence[int]) -> ModelSpec:
        """The same model with other FFN widths, one a layer."""
        return replace(self, ffn_widths=tuple(widths))

    def with_layers(self, layers: Sequence[int]) -> ModelSpec:
        """A shallower model made of these layers of this one."""
        config = {**self.config, self.family.layer_count: len(layers)}
        return replace(self, config=config, ffn_widths=tuple(self.ffn_widths[i] for i in layers))

    def to_json(self) -> str:
        lora: list[Any] | None = None
        if self.lora is not None:
            layers, projections = self.lora.layers, self.lora.projections
            lora = [self.lora.r, self.lora.alpha, self.lora.dropout, None if layers is None else list(layers)]
            if projections != PROJECTIONS:
                lora.append(list(projections))
        body = {"type": self.model_type, "config": dict(self.config), "ffn": list(self.ffn_widths), "lora": lora}
        return json.dumps(body, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> ModelSpec:
        body = json.loads(text)
        lora = None
        if body["lora"] is not None:
            r, alpha, dropout, layers, *rest = body["lora"]
            lora = LoraSpec(r, alpha, dropout, None if layers is None else tuple(layers), *map(tuple, rest))
        return cls(body["type"], body["config"], tuple(body["ffn"]), lora)


class Parts:
    """A model's parts by role, whatever the family calls them; works with and without LoRA."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.family = family_of(model)
        layers = model.get_submodule(self.family.layers)
        assert isinstance(layers, nn.ModuleList)
        self.count = len(layers)

    def layer_path(self, i: int) -> str:
        return f"{self.family.layers}.{i}"

    def layer(self, i: int) -> nn.Module:
        return self.model.get_submodule(self.layer_path(i))

    def ffn_in_path(self, i: int) -> str:
        return f"{self.layer_path(i)}.{self.family.ffn_in}"

    def ffn_out_path(self, i: int) -> str:
        return f"{self.layer_path(i)}.{self.family.ffn_out}"

    def ffn_norm_path(self, i: int) -> str | None:
        """The LayerNorm behind the FFN in post-norm models; None where there is none."""
        return f"{self.layer_path(i)}.{self.family.ffn_norm}" if self.family.ffn_norm else None

    def ffn_activation_path(self, i: int) -> str:
        """The module whose output is the FFN's activation, [B, T, d_ff]."""
        return f"{self.layer_path(i)}.{self.family.ffn_activation}"

    def ffn_in(self, i: int) -> nn.Linear:
        return _linear(self.model, self.ffn_in_path(i))

    def ffn_out(self, i: int) -> nn.Linear:
        return _linear(self.model, self.ffn_out_path(i))

    def attention_paths(self, i: int) -> list[str]:
        """Query, key, value and output projections, as in `PROJECTIONS`."""
        return [f"{self.layer_path(i)}.{path}" for path in self.family.attention]

    def layer_of(self, name: str) -> int | None:
        """The layer a parameter belongs to; None for embeddings, pooler and head."""
        found = re.match(re.escape(self.family.layers) + r"\.(\d+)\.", name)
        return int(found[1]) if found else None

    def is_head(self, name: str) -> bool:
        return any(name.startswith(head + ".") for head in self.family.head)


def _linear(model: nn.Module, path: str) -> nn.Linear:
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise FedbenchError(
            f"{type(model).__name__} has no {path}: its family's description in fedbench/models/families.py is wrong"
        ) from None
    module = getattr(module, "base_layer", module)
    if not isinstance(module, nn.Linear):
        raise FedbenchError(f"{path} is a {type(module).__name__}, expected Linear: the family description is wrong")
    return module


def family_of(model: nn.Module) -> Family:
    """The description of a model's family, by its configuration."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in FAMILIES:
        raise FedbenchError(f"models of type {model_type!r} are not supported; known: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def build(spec: ModelSpec) -> nn.Module:
    """The architecture of `spec` on the CPU in fp32, all parameters zero, nothing trainable, in evaluation mode."""
    import transformers
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import AutoConfig
    from transformers.initialization import no_init_weights

    family = spec.family
    config = AutoConfig.for_model(spec.model_type, **{k: v for k, v in spec.config.items() if k != "model_type"})
    config._attn_implementation = "sdpa"
    with no_init_weights():
        model = getattr(transformers, family.architecture)(config)
    parts = Parts(model)
    for i, width in enumerate(spec.ffn_widths):
        up, down = parts.ffn_in(i), parts.ffn_out(i)
        if width != up.out_features:
            model.set_submodule(parts.ffn_in_path(i), nn.Linear(up.in_features, width))
            model.set_submodule(parts.ffn_out_path(i), nn.Linear(width, down.out_features))
    for i in range(parts.count):
        for path in (*parts.attention_paths(i), parts.ffn_in_path(i), parts.ffn_out_path(i)):
            FrozenLinear.adopt(_linear(model, path))  # fails for a path that is no linear layer
    if spec.lora is not None:
        lora = spec.lora
        layers = range(parts.count) if lora.layers is None else lora.layers
        targets = [
            path
            for i in layers
            for projection, path in zip(PROJECTIONS, parts.attention_paths(i), strict=True)
            if projection in lora.projections
        ]
        settings = LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets)
        with torch.random.fork_rng([]):  # peft draws initial values we overwrite; nobody else's draws may move
            inject_adapter_in_model(settings, model)
        for path in targets:
            AdaptedLinear.adopt(model.get_submodule(path))
    with torch.no_grad():
        for p in model.parameters():
            p.requires_grad_(False)
            p.zero_()
    return model.eval()


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
def load_frozen(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy frozen tensors into `model`. Raises FedbenchError unless names and shapes are exactly the model's."""
    mine = frozen_state(model)
    if missing := sorted(set(mine) - set(state)):
        raise FedbenchError(f"frozen weights: {missing[0]!r} is missing ({len(missing)} in all)")
    if extra := sorted(set(state) - set(mine)):
        raise FedbenchError(f"frozen weights: the model has no {extra[0]!r} ({len(extra)} in all)")
    for name, tensor in mine.items():
        if tensor.shape != state[name].shape:
            raise FedbenchError(f"frozen weights: {name!r} is {list(state[name].shape)}, expected {list(tensor.shape)}")
        if tensor.data_ptr() != state[name].data_ptr():
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


class TensorStore:
    """Keeps one copy of equal tensors, by content: the sub-FMs of a hundred clients cost about one.

    Hashes are remembered for as long as a tensor lives and stays unchanged.
    """

    def __init__(self) -> None:
        self._digests = WeakTensorKeyDictionary()  # tensor -> (version, digest)
        self._kept: WeakValueDictionary[str, Tensor] = WeakValueDictionary()

    def digest(self, tensor: Tensor) -> str:
        """SHA-256 of dtype, shape and bytes."""
        known = self._digests.get(tensor)
        if known is not None and known[0] == tensor._version:
            return str(known[1])
        digest = tensor_digest(tensor)
        self._digests[tensor] = (tensor._version, digest)
        return digest

    def intern(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same tensors, each replaced by an equal one that is already kept where there is one."""
        return {name: self._kept.setdefault(self.digest(tensor), tensor) for name, tensor in tensors.items()}


class ModuleCache:
    """Builds a model of given contents once, and keeps the few most recently used."""

    def __init__(self, device: torch.device, size: int = 3) -> None:
        self.device, self.size = device, size
        self._store = TensorStore()
        self._modules: OrderedDict[str, nn.Module] = OrderedDict()
        self.resident = 0

    def intern(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors to keep: equal ones are shared between clients."""
        return self._store.intern(tensors)

    def get(self, spec: ModelSpec, frozen: Mapping[str, Tensor]) -> Frozen:
        """The model of `spec` with these frozen weights; equal contents give the same module."""
        key = hashlib.sha256((spec.to_json() + state_digest(frozen, self._store.digest)).encode()).hexdigest()
        if key not in self._modules:
            model = build(spec)
            load_frozen(model, frozen)
            self._modules[key] = model.to(self.device)
            self.resident = max(self.resident, sum(p.numel() for p in model.parameters()))
            while len(self._modules) > self.size:
                self._modules.popitem(last=False)
        self._modules.move_to_end(key)
        return Frozen(key, self._modules[key])
