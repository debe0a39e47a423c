"""Models and tensors held once, however many clients were sent them."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from fedbench.compat import TensorKeys, writes
from fedbench.files import state_digest, tensor_digest
from fedbench.models.build import build
from fedbench.models.spec import ModelSpec
from fedbench.models.weights import load_frozen


class TensorStore:
    """Keeps one copy of equal tensors, by content: the sub-FMs of a hundred clients cost about one.

    Hashes are remembered for as long as a tensor lives and stays unchanged.
    """

    def __init__(self) -> None:
        self._digests = TensorKeys()  # tensor -> (version, digest)
        self._kept: WeakValueDictionary[str, Tensor] = WeakValueDictionary()

    def digest(self, tensor: Tensor) -> str:
        """SHA-256 of dtype, shape and bytes."""
        known = self._digests.get(tensor)
        if known is not None and known[0] == writes(tensor):
            return str(known[1])
        digest = tensor_digest(tensor)
        self._digests[tensor] = (writes(tensor), digest)
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
            load_frozen(model, frozen, share=True)
            self._modules[key] = model.to(self.device)
            self.resident = max(self.resident, sum(p.numel() for p in model.parameters()))
            while len(self._modules) > self.size:
                self._modules.popitem(last=False)
        self._modules.move_to_end(key)
        return Frozen(key, self._modules[key])


@dataclass(frozen=True, slots=True)
class Frozen:
    """A frozen backbone a client has assembled from what it received.

    `key` is the content hash of specification and weights: tasks with equal keys may share one module, and
    `module` is that shared module. Only the executor runs it; nobody may change its frozen weights.
    """

    key: str
    module: nn.Module
