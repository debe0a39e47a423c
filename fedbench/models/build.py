"""Models built from their specification, empty: all parameters zero until they are set."""

from __future__ import annotations

import torch
from torch import nn

from fedbench.compat import set_attention, without_initial_values
from fedbench.models.bottleneck import Bottleneck
from fedbench.models.linear import AdaptedLinear, FrozenLinear
from fedbench.models.parts import Parts, _linear
from fedbench.models.spec import PROJECTIONS, ModelSpec
from fedbench.models.weights import set_tunable


def build(spec: ModelSpec) -> nn.Module:
    """The architecture of `spec` on the CPU in fp32, all parameters zero, nothing trainable, in evaluation mode."""
    import transformers
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import AutoConfig

    family = spec.family
    config = AutoConfig.for_model(spec.model_type, **{k: v for k, v in spec.config.items() if k != "model_type"})
    set_attention(config, "sdpa")
    with without_initial_values():
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
    if spec.bottleneck is not None:
        for i in range(parts.count):
            for path in (parts.attention_paths(i)[PROJECTIONS.index("output")], parts.ffn_out_path(i)):
                model.set_submodule(path, Bottleneck(_linear(model, path), spec.bottleneck))
    with torch.no_grad():
        for p in model.parameters():
            p.requires_grad_(False)
            p.zero_()
    set_tunable(model, biases=spec.biases)
    return model.eval()
