"""Every name of a library that its makers keep private or do not document, in one place.

Any of them may change with any release. `tests/unit/test_compat.py` asks each for what it is used for here, so the
release that changes one fails there, by name. What is called for every layer of every batch is the library's own
object, not a function around it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary as TensorKeys

__all__ = ["TensorKeys"]  # a dictionary by tensor that keeps no tensor alive; torch has no documented one

# ---------------------------------------------------------------- torch: operators

# The operators behind torch.compile's linear layers on a CPU, which nothing documented reaches: the product with a
# weight that was laid out beforehand, and its laying out. A build of torch without oneDNN lacks them.
_onednn: Any = torch.ops.mkldnn
has_onednn: bool = torch.backends.mkldnn.is_available() and hasattr(_onednn, "_linear_pointwise")
"""Whether there are `laid_out` and `laid_out_product`."""

laid_out: Any = getattr(_onednn, "_reorder_linear_weight", None)
"""weight [out, in] -> the same in the blocks that oneDNN's kernels read; `to_dense` gives it back."""

laid_out_product: Any = getattr(_onednn, "_linear_pointwise", None)
"""(input [.., in], laid-out weight, bias [out] or None, "none", [], "") -> [.., out], with nothing done to it after."""

softmax_backward: Callable[..., Tensor] = torch._softmax_backward_data
"""(gradient, softmax, dimension, dtype of the input) -> gradient of the input; autograd gives it only with a graph."""

gelu_backward: Callable[..., Tensor] = torch.ops.aten.gelu_backward
"""(gradient, input) -> gradient of the input."""

silu_backward: Callable[..., Tensor] = torch.ops.aten.silu_backward
"""(gradient, input) -> gradient of the input."""

layer_norm_forward: Callable[..., tuple[Tensor, Tensor, Tensor]] = torch.native_layer_norm
"""(input, shape, weight, bias, eps) -> output, mean and inverse deviation, which the backward pass needs."""

layer_norm_backward: Callable[..., tuple[Tensor, ...]] = torch.ops.aten.native_layer_norm_backward
"""(gradient, input, shape, mean, inverse deviation, weight, bias, which three) -> gradients of input, weight, bias."""


def cpu_has_bf16() -> bool:
    """Whether oneDNN has kernels for bf16 on this CPU. Without them torch computes bf16 in ways slower than fp32."""
    return has_onednn and bool(_onednn._is_mkldnn_bf16_supported())


# ---------------------------------------------------------------- torch: tensors and modules


def writes(tensor: Tensor) -> int:
    """How often a tensor was written to in place; autograd keeps count, and writes through `.data` escape it."""
    return tensor._version


def watched(module: nn.Module) -> bool:
    """Whether somebody has hooks on a module or a forward of their own in it, and so its call has to be made."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


# ---------------------------------------------------------------- transformers


def attention_of(config: Any) -> str:
    """The registered attention that a model of this configuration computes."""
    return str(config._attn_implementation)


def set_attention(config: Any, name: str) -> None:
    """Let the model of this configuration compute the attention registered as `name`, from its next batch on.

    The documented way, `set_attn_implementation`, checks for kernels of the hub and walks all modules: too much for
    every batch, and a model that is yet to be built has no such method.
    """
    config._attn_implementation = name


def has_fused_attention(kind: type[nn.Module]) -> bool:
    """Whether a model class of transformers takes its attention from the registry, torch's fused kernel among it."""
    return bool(getattr(kind, "_supports_sdpa", False))


def without_initial_values() -> AbstractContextManager[None]:
    """Inside the block models are built without drawing the initial values of their parameters."""
    from transformers.initialization import no_init_weights

    context: AbstractContextManager[None] = no_init_weights()
    return context


# ---------------------------------------------------------------- peft


def plain_lora(layer: Any) -> str | None:
    """The name of the one adapter of peft's LoRA layer, where all it does is to add b(a(x)) · scale; else None.

    Not so with several adapters, disabled or merged ones, variants of LoRA (DoRA and the like), or active dropout.
    """
    name, *others = layer.active_adapters
    if others or layer.disable_adapters or layer.merged or name in layer.lora_variant:
        return None
    if layer.training and not isinstance(layer.lora_dropout[name], nn.Identity):
        return None
    return str(name)


# ---------------------------------------------------------------- numpy


def array_of_pickle() -> Callable[..., Any]:
    """The function that a pickled array names as its maker."""
    from numpy._core import multiarray

    maker: Callable[..., Any] = multiarray._reconstruct
    return maker
