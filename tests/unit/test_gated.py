"""FedPFT on gated FFNs: what a neuron is, which ones stay, when one counts as zero, and what a client is sent of it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from helpers import context, logits, public_rows, save_tiny, train_rows

from fedbench.api.context import ClientContext
from fedbench.methods import _distillation as d
from fedbench.methods.fedpft import FedPFT, FedPFTClient, zeros
from fedbench.models.cache import ModuleCache
from fedbench.models.foundation import FoundationModel
from fedbench.models.parts import NeuronSlices, Parts
from fedbench.models.spec import ModelSpec
from fedbench.models.weights import frozen_state
from fedbench.models.zoo.load import load_fm

CPU = torch.device("cpu")


@cache
def fm_of(family: str) -> FoundationModel:
    with TemporaryDirectory() as folder:
        return load_fm(str(save_tiny(family, Path(folder) / "fm")), 3, Path(folder))


def fedpft(family: str, cache: Path, **changes: Any) -> Any:
    settings = {"r": 6, "layers_retained": [0], "distil_steps": 2, "distil_batch": 4, "lora_r": 2, "align_steps": 2}
    return FedPFT(**(settings | changes)).server(fm_of(family), public_rows(16), context(cache))


def test_the_salience_of_a_gated_neuron_is_the_norm_of_its_three_vectors() -> None:
    up = torch.tensor([[1.0, 2], [0, 0], [3, 0]])
    down = torch.tensor([[2.0, 0, 0], [0, 0, 0], [0, 3, 0], [0, 0, 0]])
    gate = torch.tensor([[4.0, 0], [0, 4], [0, 0]])
    assert d.saliency(up, down, gate).tolist() == pytest.approx([5.0, 5.0, 3.0])
    assert d.saliency(up, down).tolist() == pytest.approx([3.0, 3.0, 3.0])
    assert d.most_salient(up, down, 1, torch.tensor([[0.0, 0], [0, 1], [0, 2]])).tolist() == [2]


def test_a_layer_that_holds_gate_and_up_has_two_slices_of_each_neuron() -> None:
    slices = NeuronSlices("w", 0, 2)
    assert slices.index(torch.tensor([0, 3]), 5).tolist() == [0, 3, 5, 8]
    assert NeuronSlices("w", 1).index(torch.tensor([0, 3]), 5).tolist() == [0, 3]


@pytest.mark.parametrize("family", ["llama", "modernbert"])
def test_the_regularisers_product_is_down_times_up_and_leaves_the_gate_out(family: str) -> None:
    parts = Parts(fm_of(family).build(None, CPU))
    layer = parts.layer(1)
    path_up, path_down = {"llama": ("up_proj", "down_proj"), "modernbert": ("Wi", "Wo")}[family]
    up, down = layer.get_parameter(f"mlp.{path_up}.weight")[-24:], layer.get_parameter(f"mlp.{path_down}.weight")
    assert torch.equal(d.ffn_product(parts, 1), down @ up)
    assert list(d.ffn_product(parts, 1).shape) == [16, 16]


@pytest.mark.parametrize("family", ["llama", "modernbert"])
def test_a_shut_gate_counts_as_zero_whatever_the_sign_of_what_it_shuts(family: str) -> None:
    model = fm_of(family).build(None, CPU)
    parts = Parts(model)
    seen: dict[str, Any] = {}
    model.get_submodule(parts.ffn_activation_path(1)).register_forward_hook(
        lambda _m, _i, out: seen.update(observed=out)
    )
    model.get_submodule(parts.ffn_in_path(1)).register_forward_hook(lambda _m, _i, out: seen.update(up=out))
    if not parts.stacked:
        model.get_submodule(str(parts.ffn_gate_path(1))).register_forward_hook(
            lambda _m, _i, out: seen.update(gate=out)
        )
    with torch.no_grad():
        logits(model, train_rows(4).batch(range(4)), packed=False)
    gate, up = seen["up"].chunk(2, -1) if parts.stacked else (seen["gate"], seen["up"])
    shut = (gate <= 0).flatten(0, 1)
    assert 0.2 < shut.double().mean() < 0.8 and (up < 0).any()
    counted = zeros("non-positive", 0.0)(seen["observed"].flatten(0, 1))
    assert torch.equal(counted, shut.sum(0))


@pytest.mark.parametrize("family", ["llama", "modernbert", "gpt2"])
def test_a_client_that_is_sent_changed_neurons_holds_what_the_server_holds(family: str, tmp_path: Path) -> None:
    ctx = context(tmp_path)
    server = fedpft(family, tmp_path, t=1, p=0.5)
    method = server.method
    client = FedPFTClient(method, ClientContext(0, ctx.streams, ctx.federation, ModuleCache(CPU)))
    outbox = server.broadcast(0, [0])
    for message in outbox[0]:
        if message.kind != "adapter":
            client.receive(message)
    before = {name: tensor.clone() for name, tensor in client.frozen.items()}
    server.apoz = {i: torch.rand(6, generator=torch.Generator().manual_seed(i)) for i in server.aligned}
    server.align(0)
    [update] = [m for m in server.broadcast(1, [0])[0] if m.kind == "alignment"]
    client.receive(update)
    after = frozen_state(server.model)
    assert after.keys() == client.frozen.keys()
    assert all(torch.equal(client.frozen[name], after[name]) for name in after)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    names = [slices.name for i in (1, 2) for slices in server.parts.neurons(i).values()]
    assert set(names) <= changed
    for i in (1, 2):
        kept = server.changed[i] == 0
        assert kept.sum() == 3, "half of the neurons keep their values"
        for slices in server.parts.neurons(i).values():
            index = slices.index(kept.nonzero().flatten(), 6)
            own = before[slices.name].index_select(slices.dim, index)
            assert torch.equal(own, after[slices.name].index_select(slices.dim, index))


def test_a_sub_fm_of_a_gated_family_survives_its_specification(tmp_path: Path) -> None:
    for family in ("llama", "modernbert"):
        spec = fedpft(family, tmp_path, distil_steps=0).spec
        assert ModelSpec.from_json(spec.to_json()) == spec
        assert spec.ffn_widths == (24, 6, 6)
