"""LoRA on feed-forward layers: it starts as nothing, is computed alike on every path, and ends where it was trained."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    answers_of,
    context,
    logits,
    on_every_executor,
    public_rows,
    random_values,
    save_tiny,
    smoke_request,
    train_rows,
)
from pydantic import ValidationError
from torch import Tensor, nn

from fedbench.api.local import AdamW, LocalTask
from fedbench.api.messages import Message
from fedbench.check.suite import tensors_close
from fedbench.data.examples import Batch
from fedbench.errors import FedbenchError
from fedbench.forward.feed import Forward, forward
from fedbench.machine.device import Execution
from fedbench.methods.fedavg_lora import FedAvgLora
from fedbench.methods.fedot import FedOT
from fedbench.methods.fedpft import FedPFT
from fedbench.methods.fedpft_official import FedPFTOfficial
from fedbench.models.build import build
from fedbench.models.cache import Frozen
from fedbench.models.foundation import FoundationModel
from fedbench.models.parts import Parts
from fedbench.models.spec import LoraSpec, ModelSpec
from fedbench.models.weights import get_tensors, initial_tunables, set_tensors, tunable_names
from fedbench.models.zoo.load import load_fm
from fedbench.rng import Streams
from fedbench.run.prepare import prepare
from fedbench.run.run import run
from fedbench.tables.matching import departures

CPU = torch.device("cpu")
FAMILIES = ("bert", "distilbert", "vit", "modernbert", "gpt2", "llama")
ALL = FedAvgLora(lora_targets="all", lora_r=2, lora_alpha=4).lora
GATED = ("llama", "modernbert")


@cache
def fm_of(family: str) -> FoundationModel:
    with TemporaryDirectory() as folder:
        return load_fm(str(save_tiny(family, Path(folder) / "fm")), 3, Path(folder))


def model_of(family: str, lora: LoraSpec = ALL) -> nn.Module:
    model = fm_of(family).build(lora, CPU)
    set_tensors(model, random_values(model))
    return model


def rows_of(family: str) -> Batch:
    if family == "vit":
        pixels = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        return Batch({"pixel_values": pixels}, torch.zeros(4, dtype=torch.long), None)
    return train_rows(9).batch(range(9))


def merged(model: nn.Module, family: str) -> nn.Module:
    """The family's model without adapters, whose weights have the adapters of `model` in them."""
    values = dict(model.named_parameters())
    plain = fm_of(family).build(None, CPU)
    own = dict(plain.named_parameters())
    with torch.no_grad():
        for name, value in values.items():
            if ".lora_" not in name:
                own[name.replace(".base_layer.", ".")].copy_(value)
        for name, a in values.items():
            if ".lora_A." in name:
                module: Any = model.get_submodule(name.partition(".lora_A.")[0])
                b = values[name.replace(".lora_A.", ".lora_B.")]
                own[f"{name.partition('.lora_A.')[0]}.weight"].add_(b @ a, alpha=module.scaling["default"])
    return plain


# ---------------------------------------------------------------- where adapters go


@pytest.mark.parametrize("family", FAMILIES)
def test_each_target_has_its_layers(family: str) -> None:
    parts = Parts(fm_of(family).build(None, CPU))
    attention, ffn = len({*parts.family.attention}), 3 if family == "llama" else 2
    for targets, layers in (("attention", attention), ("ffn", ffn), ("all", attention + ffn), ("down", 1)):
        lora = FedAvgLora(lora_targets=targets, lora_r=2).lora
        names = [n for n in tunable_names(fm_of(family).build(lora, CPU)) if ".lora_A." in n]
        assert len(names) == 3 * layers
    assert all(n.startswith(parts.ffn_out_path(i)) for i, n in enumerate(names))


def test_names_are_held_in_one_form_and_unknown_ones_refused() -> None:
    assert FedAvgLora(lora_targets="down, UP").lora_targets == "up,down"
    assert FedAvgLora(lora_targets="output,value,key,query").lora_targets == "attention"
    with pytest.raises(ValidationError, match="'mlp' is none of attention, ffn, all, query"):
        FedAvgLora(lora_targets="up,mlp")


def test_a_gate_that_is_not_there_and_half_of_a_layer_are_refused() -> None:
    with pytest.raises(FedbenchError, match="LoRA on gate: a layer of gpt2 has none"):
        fm_of("gpt2").build(FedAvgLora(lora_targets="gate,up").lora, CPU)
    with pytest.raises(FedbenchError, match="in modernbert one layer gives gate, up; name all of them or none"):
        fm_of("modernbert").build(FedAvgLora(lora_targets="up").lora, CPU)


def test_a_specification_keeps_its_targets() -> None:
    spec = fm_of("llama").spec.with_lora(ALL)
    assert ModelSpec.from_json(spec.to_json()) == spec
    assert len(json.loads(spec.with_lora(FedAvgLora().lora).to_json())["lora"]) == 4, "as it was before"


# ---------------------------------------------------------------- what is computed


@pytest.mark.parametrize("family", FAMILIES)
def test_an_untrained_adapter_changes_nothing(family: str) -> None:
    model, plain = fm_of(family).build(ALL, CPU), fm_of(family).build(None, CPU)
    set_tensors(model, initial_tunables(model, Streams(0, "unit")))
    set_tensors(plain, {n: t for n, t in initial_tunables(model, Streams(0, "unit")).items() if ".lora_" not in n})
    with torch.no_grad():
        assert torch.equal(logits(model, rows_of(family), False), logits(plain, rows_of(family), False))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trained_one_is_the_weights_with_its_product_added(family: str) -> None:
    model, batch = model_of(family), rows_of(family)
    with torch.no_grad():
        found, expected = logits(model, batch), logits(merged(model, family), batch, packed=False)
        frozen = logits(model_of(family, FedAvgLora(lora_r=2, lora_alpha=4).lora), batch)
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(found, frozen, atol=1e-2), "the FFN's adapters matter"


@pytest.mark.parametrize("targets", ["all", "ffn", "down"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_fast_path_is_the_plain_one_in_outputs_and_gradients(family: str, targets: str) -> None:
    model, batch = model_of(family, FedAvgLora(lora_targets=targets, lora_r=2, lora_alpha=4).lora), rows_of(family)

    def total(out: Tensor) -> Tensor:
        return out.square().sum()

    expected, wanted = answers_of(Forward(model, packed=False), batch, total)
    with forward(model, Execution(), gradients=True) as fast:
        found, grads = answers_of(fast, batch, total)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert tensors_close(wanted, grads, 1e-5)
    assert all(bool(grads[n].any()) for n in grads if ".lora_" in n)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_clients_learn_alike_on_every_executor(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = model_of(family), train_rows(12)
    values = get_tensors(model, tunable_names(model))

    def task(seed: int) -> LocalTask:
        rng = np.random.default_rng(seed)
        batches = [rng.choice(12, 4, replace=False) for _ in range(2)]
        return LocalTask(Frozen("fm", model), {n: t.clone() for n, t in values.items()}, rows, batches, AdamW(1e-3))

    tasks = [task(seed) for seed in range(2)]
    for reference, result in on_every_executor(tasks, monkeypatch):
        assert tensors_close(reference.tunables, result.tunables, 1e-4)


# ---------------------------------------------------------------- proxies, runs and records


SHORT: dict[str, Any] = {"distil_steps": 1, "distil_batch": 4, "lora_r": 2, "lora_alpha": 4, "lora_targets": "all"}


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_fedots_adapters_are_plugged_into_the_fms_own_ffns(family: str, tmp_path: Path) -> None:
    server: Any = FedOT(emulator=1, **SHORT).server(fm_of(family), public_rows(8), context(tmp_path))
    names = server.fm_names()
    assert any(Parts(server.full).ffn_out_path(2) in name for name in names.values())
    assert not any(server.parts.layer_of(name) == 1 and ".lora_" in name for name in names), "the emulator is frozen"
    generator = torch.Generator().manual_seed(4)
    sent = {n: 0.3 * torch.randn(t.shape, generator=generator) for n, t in server.values.items()}
    server.aggregate(0, {0: [Message("adapter", sent, {"num_examples": 3})]})
    tuned = server.put_in_fm()
    with torch.no_grad():
        found = logits(tuned, rows_of(family))
        assert torch.allclose(found, logits(merged(tuned, family), rows_of(family), packed=False), atol=1e-4)
    with pytest.raises(FedbenchError, match="fedpft, which has no LoRA on FFNs, but lora_targets is 'all'"):
        FedOT(emulator="fedpft", **SHORT).server(fm_of(family), public_rows(8), context(tmp_path))


def test_fedpft_refuses_adapters_on_ffns_that_are_not_the_fms(tmp_path: Path) -> None:
    fm, public, ctx = fm_of("bert"), public_rows(8), context(tmp_path)
    with pytest.raises(FedbenchError, match="fedpft: lora_targets is 'all', but the sub-FM's FFN of layer 1 is not"):
        FedPFT(r=6, **SHORT).server(fm, public, ctx)
    with pytest.raises(FedbenchError, match="fedpft-official: lora_targets is 'all'.* layer 0 is not"):
        FedPFTOfficial(layers_retained=(0, 1, 2), **SHORT).server(fm, public, ctx)
    server: Any = FedPFT(layers_retained=(0, 1, 2), **SHORT).server(fm, public, ctx)
    assert server.fm_names().keys() == set(tunable_names(server.full))


def test_only_a_run_with_other_targets_says_so(tmp_path: Path) -> None:
    folder = save_tiny("bert", tmp_path / "fm")

    def prepared(**settings: str) -> Any:
        return prepare(smoke_request(tmp_path, "fedavg-lora", "tweets-noniid", folder, **settings))

    plain, same, other = prepared(), prepared(lora_targets="attention"), prepared(lora_targets="ffn")
    assert "lora_targets" not in plain.identity["method"]["settings"]
    assert plain.key == same.key != other.key
    record, wide = run(plain), run(other)
    assert "lora_targets" not in record.method.settings and wide.method.settings["lora_targets"] == "ffn"
    assert departures(record, {"lora_targets": "attention"}) == []
    assert departures(record, {"lora_targets": "ffn"}) == ["lora_targets attention instead of ffn"]
    assert departures(wide, {"lora_targets": "attention"}) == ["lora_targets ffn instead of attention"]
    assert wide.accuracy.plug_in.rows == 60


def test_a_model_with_adapters_everywhere_is_built_from_its_text() -> None:
    for family in GATED:
        text = fm_of(family).spec.with_lora(ALL).to_json()
        assert tunable_names(build(ModelSpec.from_json(text))) == tunable_names(model_of(family))
