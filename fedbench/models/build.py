"""Models built from their specification, empty: all parameters zero until they are set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from fedbench.compat import has_fused_attention, set_attention, without_initial_values
from fedbench.errors import FedbenchError
from fedbench.models.bottleneck import Bottleneck
from fedbench.models.decoder import predict_next, read_last
from fedbench.models.gated import GatedFFN
from fedbench.models.linear import AdaptedLinear, FrozenLinear
from fedbench.models.low_rank import low_rank
from fedbench.models.mpnet import attend_by_registry
from fedbench.models.parts import Parts, _linear, family_of
from fedbench.models.prefix import add_prefix
from fedbench.models.prompt import add_prompt
from fedbench.models.spec import FFN, FFN_ROLES, PROJECTIONS, ModelSpec
from fedbench.models.straight import straighten
from fedbench.models.weights import set_tunable


def build(spec: ModelSpec) -> nn.Module:
    """The architecture of `spec` on the CPU in fp32, all parameters zero, nothing trainable, in evaluation mode."""
    import transformers
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import AutoConfig

    config = AutoConfig.for_model(spec.model_type, **{k: v for k, v in spec.config.items() if k != "model_type"})
    kind = getattr(transformers, spec.architecture)
    set_attention(config, "sdpa" if has_fused_attention(kind) else "eager")
    with without_initial_values():
        model = kind(config)
    as_computed_here(model)
    parts = Parts(model)
    for i, width in enumerate(spec.ffn_widths):
        if width != parts.ffn_out(i).in_features:
            _narrow(parts, i, width)
    for i in range(parts.count):
        ffn = (parts.ffn_in_path(i), parts.ffn_gate_path(i) or parts.ffn_in_path(i), parts.ffn_out_path(i))
        for path in (*parts.attention_paths(i), *ffn):
            FrozenLinear.adopt(_linear(model, path))  # fails for a path that is no linear layer
    for i, rank in enumerate(spec.ranks or ()):
        if rank is not None:
            for path in dict.fromkeys(parts.attention_paths(i)):
                model.set_submodule(path, low_rank(_linear(model, path), rank))
    if spec.lora is not None:
        lora = spec.lora
        layers = range(parts.count) if lora.layers is None else lora.layers
        targets = [path for i in layers for path in _adapted(parts, i, lora.projections)]
        settings = LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets)
        with torch.random.fork_rng([]):  # peft draws initial values we overwrite; nobody else's draws may move
            inject_adapter_in_model(settings, model)
        for path in targets:
            AdaptedLinear.adopt(model.get_submodule(path))
    if spec.bottleneck is not None:
        for i in range(parts.count):
            for path in (parts.attention_paths(i)[PROJECTIONS.index("output")], parts.ffn_out_path(i)):
                model.set_submodule(path, Bottleneck(_linear(model, path), spec.bottleneck))
    for i, times in enumerate(spec.repeats or ()):
        if times > 1:
            parts.layer(i).register_forward_hook(partial(_again, times - 1), with_kwargs=True)
    if spec.prefix is not None:
        add_prefix(model, spec.prefix)
    if spec.prompt is not None:
        add_prompt(model, spec.prompt)
    with torch.no_grad():
        for p in model.parameters():
            p.requires_grad_(False)
            p.zero_()
    set_tunable(model, biases=spec.biases)
    return model.eval()


def as_computed_here(model: nn.Module) -> None:
    """Make a model of transformers' one whose parts look alike in all families; what it computes stays the same.

    Transposed linear layers are straightened, gated FFNs can be watched, and a decoder's head for classes reads the
    last real token by the mask, where transformers goes by the number of the padding token; one for the next token
    gives what is asked for alone. MPNet's attention goes through the registry.
    """
    family = family_of(model)
    if family.transposed:
        straighten(model)
    if family.ffn_gate:
        parts = Parts(model)
        for i in range(parts.count):
            GatedFFN.adopt(model.get_submodule(parts.ffn_path(i)), family)
    if family.name == "mpnet":
        attend_by_registry(model)
    if type(model).__name__ == family.language:
        predict_next(model)
    elif family.reads == "last":
        read_last(model)


def _again(times: int, layer: nn.Module, inputs: tuple[Any, ...], given: Mapping[str, Any], output: Any) -> Any:
    """Run a layer on what it has made, so many times more; whatever else it was given stays the same."""
    for _ in range(times):
        output = layer.forward(output[0] if isinstance(output, tuple) else output, *inputs[1:], **given)
    return output


def _narrow(parts: Parts, i: int, width: int) -> None:
    """Give a layer's FFN another number of neurons."""
    model, times = parts.model, 2 if parts.stacked else 1
    up, down, gate = parts.ffn_in(i), parts.ffn_out(i), parts.ffn_gate(i)
    model.set_submodule(parts.ffn_in_path(i), nn.Linear(up.in_features, times * width, up.bias is not None))
    model.set_submodule(parts.ffn_out_path(i), nn.Linear(width, down.out_features, down.bias is not None))
    if gate is not None and not parts.stacked:
        model.set_submodule(str(parts.ffn_gate_path(i)), nn.Linear(gate.in_features, width, gate.bias is not None))


def _adapted(parts: Parts, i: int, projections: Sequence[str]) -> list[str]:
    """The linear layers of a layer that these projections name, each once.

    Raises FedbenchError for one that the layer does not have, and where one linear layer gives several, of which some
    are named and some are not.
    """
    roles = parts.linear_paths(i)
    asked = {*projections} | ({role for role, _ in roles if role in FFN_ROLES} if FFN in projections else set())
    if missing := sorted(asked - {FFN, *(role for role, _ in roles)}):
        raise FedbenchError(f"LoRA on {missing[0]}: a layer of {parts.family.name} has none")
    found = dict.fromkeys(path for role, path in roles if role in asked)
    for role, path in roles:
        if path in found and role not in asked:
            together = [other for other, same in roles if same == path]
            raise FedbenchError(
                f"LoRA on {', '.join(projections)}: in {parts.family.name} one layer gives {', '.join(together)}; name "
                "all of them or none"
            )
    return list(found)
