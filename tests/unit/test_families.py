"""Each family's description binds to the right modules: on checkpoints in the real format, through the real path.

What is right is written out here module by module, and computed by hand or by transformers itself, so that a wrong
description cannot agree with itself.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import context, public_rows, random_values, save_tiny, save_tiny_bert, smoke_request, train_rows
from torch import nn

from fedbench import models
from fedbench.api import AdamW, LocalTask
from fedbench.context import ServerContext
from fedbench.data import Examples
from fedbench.engine import prepare, run
from fedbench.errors import FedbenchError
from fedbench.families import FAMILIES
from fedbench.foundation import FoundationModel, load_fm
from fedbench.gradient import gradient_error, gradients
from fedbench.methods.fedavg_lora import cross_entropy
from fedbench.methods.fedpft import FedPFT, zeros
from fedbench.models import LoraSpec, ModuleCache, Parts, build, get_tensors, set_tensors, tunable_names
from fedbench.packing import logits, packing
from fedbench.processors import ImageProcessor
from fedbench.testing import tensors_close
from fedbench.training import execute

CPU = torch.device("cpu")
LAYERS = {
    "bert": "bert.encoder.layer",
    "roberta": "roberta.encoder.layer",
    "distilbert": "distilbert.transformer.layer",
    "vit": "vit.layers",
}
BERT_TARGETS = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
TARGETS = {
    "bert": BERT_TARGETS,
    "roberta": BERT_TARGETS,
    "distilbert": ["attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"],
    "vit": ["attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj"],
}
HEADS = {
    "bert": ["classifier"],
    "roberta": ["classifier.dense", "classifier.out_proj"],
    "distilbert": ["pre_classifier", "classifier"],
    "vit": ["classifier"],
}


@pytest.fixture(scope="module", params=[*FAMILIES])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(request.param, tmp_path_factory.mktemp(request.param) / "checkpoint")


@pytest.fixture(scope="module")
def fm(checkpoint: Path) -> FoundationModel:
    return load_fm(str(checkpoint), 3, checkpoint)


def rows(fm: FoundationModel, public: bool = False) -> Examples:
    if fm.family.modality == "text":
        return public_rows(16) if public else train_rows(16)
    pixels = torch.randint(0, 256, (16, 3, 6, 6), generator=torch.Generator().manual_seed(int(public)))
    return Examples(torch.arange(16) % 3, pixels=pixels.byte(), processor=fm.processor)


def fedpft(fm: FoundationModel, ctx: ServerContext, **changes: Any) -> Any:
    settings = {"r": 6, "layers_retained": [0], "distil_steps": 3, "distil_batch": 4, "lora_r": 2, "align_steps": 2}
    return FedPFT(**(settings | changes)).server(fm, rows(fm, public=True), ctx)


def test_the_plugged_in_fm_is_the_stock_model_with_lora_merged_by_hand(
    fm: FoundationModel, checkpoint: Path, tmp_path: Path
) -> None:
    import transformers

    kind = fm.spec.model_type
    server = fedpft(fm, context(tmp_path))
    server.values = random_values(server.full)
    plugged = server.plug_in()
    auto = "AutoModelForImageClassification" if kind == "vit" else "AutoModelForSequenceClassification"
    stock = getattr(transformers, auto).from_pretrained(checkpoint, num_labels=3, ignore_mismatched_sizes=True).eval()
    used = set()
    with torch.no_grad():
        for i in range(3):
            for target in TARGETS[kind]:
                path = f"{LAYERS[kind]}.{i}.{target}"
                names = [f"{path}.lora_{side}.default.weight" for side in "AB"]
                a, b = (server.values[n] for n in names)
                stock.get_submodule(path).weight += 48 / 2 * b @ a
                used.update(names)
        for path in HEADS[kind]:
            for part in ("weight", "bias"):
                getattr(stock.get_submodule(path), part).copy_(server.values[f"{path}.{part}"])
                used.add(f"{path}.{part}")
        assert used == set(server.values), "nothing else is tuned"
        batch = rows(fm).batch(np.arange(5))
        expected = stock(**batch.inputs).logits
        for packed in (False, True):
            with packing(packed):
                assert torch.allclose(logits(plugged, batch), expected, rtol=1e-3, atol=1e-4)


def test_hooks_see_what_the_ffn_computes(fm: FoundationModel) -> None:
    model = fm.build(None, CPU)
    parts = Parts(model)
    seen: dict[str, Any] = {}
    paths = {
        "in": parts.ffn_in_path(1),
        "act": parts.ffn_activation_path(1),
        "out": parts.ffn_out_path(1),
        "layer": parts.layer_path(1),
    }
    if norm := parts.ffn_norm_path(1):
        paths["norm"] = norm
    for role, path in paths.items():
        model.get_submodule(path).register_forward_hook(lambda _m, i, o, role=role: seen.update({role: (i[0], o)}))
    with torch.no_grad(), packing(False):
        logits(model, rows(fm).batch(np.arange(4)))
    assert torch.allclose(seen["act"][1], nn.functional.gelu(seen["in"][1]), atol=1e-6)
    assert torch.equal(seen["out"][0], seen["act"][1]), "the activation is what the second matrix gets"
    layer = seen["layer"][1][0] if isinstance(seen["layer"][1], tuple) else seen["layer"][1]
    if norm:
        assert torch.equal(seen["norm"][1], layer), "the layer ends with the LayerNorm behind the FFN"
    else:
        assert fm.spec.model_type == "vit"


def test_observers_count_zeros_of_real_tokens_packed_and_padded(fm: FoundationModel) -> None:
    model = fm.build(LoraSpec(2, 4), CPU)
    set_tensors(model, random_values(model))
    path = Parts(model).ffn_activation_path(2)
    found = []
    for packed in (False, True):
        task = LocalTask(
            frozen=ModuleCache(CPU).get(fm.spec.with_lora(LoraSpec(2, 4)), fm.state),
            tunables=get_tensors(model, tunable_names(model)),
            data=rows(fm),
            batches=[np.arange(8), np.arange(8, 16)],
            optimiser=AdamW(lr=1e-3),
            loss=cross_entropy,
            observers={path: zeros("non-positive", 0.0)},
        )
        with packing(packed):
            found.append(execute(task, CPU))
    padded, packed_result = found
    assert torch.equal(padded.observed[path], packed_result.observed[path])
    # An image of 8 pixels across, in patches of 4, is four patches and the class token.
    tokens = 5 * len(rows(fm)) if fm.family.modality == "image" else int(rows(fm).lengths.sum())
    assert padded.observed_tokens == packed_result.observed_tokens == tokens
    assert tensors_close(padded.tunables, packed_result.tunables, 1e-4)


def test_compression_takes_the_salient_neurons_of_this_very_ffn(fm: FoundationModel, tmp_path: Path) -> None:
    server = fedpft(fm, context(tmp_path), distil_steps=0)
    assert server.spec.ffn_widths == (24, 6, 6)
    path_in, path_out = Parts(server.full).ffn_in_path(1), Parts(server.full).ffn_out_path(1)
    whole = fm.state[f"{path_in}.weight"]
    salience = whole.double().square().sum(1) + fm.state[f"{path_out}.weight"].double().square().sum(0)
    kept = salience.topk(6).indices.sort().values
    state = models.frozen_state(server.proxy())
    assert torch.equal(state[f"{path_in}.weight"], whole[kept])
    assert torch.equal(state[f"{path_in}.bias"], fm.state[f"{path_in}.bias"][kept])
    assert torch.equal(state[f"{path_out}.weight"], fm.state[f"{path_out}.weight"][:, kept])
    changed = {n for n in state if state[n].shape != fm.state[n].shape}
    assert changed == {f"{Parts(server.full).layer_path(i)}.{n}" for i in (1, 2) for n in _ffn_tensors(fm)}


def _ffn_tensors(fm: FoundationModel) -> list[str]:
    return [f"{fm.family.ffn_in}.weight", f"{fm.family.ffn_in}.bias", f"{fm.family.ffn_out}.weight"]


def test_gradient_error_is_zero_at_full_width_and_reaches_every_layer_below_it(
    fm: FoundationModel, tmp_path: Path
) -> None:
    ctx, probe = context(tmp_path), rows(fm)
    for r, layers_error in ((24, 0.0), (4, None)):
        server = fedpft(fm, ctx, r=r, distil_steps=0)
        server.values = random_values(server.full)
        plugged, proxy = server.plug_in(), server.proxy()
        reference = gradients(plugged, tunable_names(plugged), probe, CPU)
        mine = gradients(proxy, [*server.fm_names()], probe, CPU)
        parts = Parts(plugged)
        block = gradient_error(mine, reference, parts.layer_of, parts.is_head)
        assert [entry["layer"] for entry in block["layers"]] == [0, 1, 2]
        errors = [entry["error"] for entry in block["layers"]] + [block["head"]["error"]]
        if layers_error is None:
            assert all(error > 0 for error in errors)
        else:
            assert errors == pytest.approx([layers_error] * 4, abs=1e-6)


@pytest.mark.parametrize("method", ["fedpft", "fedot"])
def test_a_whole_run(checkpoint: Path, tmp_path: Path, method: str) -> None:
    vision = checkpoint.parent.name.startswith("vit")
    settings = {"t": "1", "r": "6"} if method == "fedpft" else {"emulator": "1"}
    scenario = "digits-noniid" if vision else "tweets-noniid"
    asked = smoke_request(tmp_path, method, scenario, checkpoint, lr="1e-2", **settings)
    record = run(prepare(asked))
    assert record.status == "complete"
    assert record.accuracy["plug_in"]["rows"] == 60
    assert record.gradient_error is not None
    layers = record.gradient_error["points"][-1]["layers"]
    assert [entry["layer"] for entry in layers] == [0, 1, 2]
    assert all(entry["hidden"] > 0 for entry in record.distillation)
    assert record.exposure is not None
    assert 0 < record.exposure["verbatim"]["without_embeddings"] < 1


def test_a_target_that_matches_nothing_is_an_error(fm: FoundationModel, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = fm.spec.model_type
    for field, value in (
        ("attention", (*fm.family.attention[:3], "attention.output.proj")),
        ("ffn_in", "ffn.up"),
        ("ffn_out", fm.family.attention[0].rpartition(".")[0]),  # a module, but no linear map
    ):
        monkeypatch.setitem(FAMILIES, kind, replace(fm.family, **{field: value}))
        with pytest.raises(FedbenchError, match=r"the description of its family in|expected Linear"):
            build(fm.spec.with_lora(LoraSpec(2, 4)))


# ---------------------------------------------------------------- what checkpoints bring along


def test_pickled_weights_are_read_as_the_same_model(tmp_path: Path) -> None:
    folder = save_tiny_bert(tmp_path / "bert")
    expected = load_fm(str(folder), 3, tmp_path).content_hash
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert load_fm(str(folder), 3, tmp_path).content_hash == expected


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (exec, ("import pathlib; pathlib.Path('pwned').touch()",))


def test_pickled_weights_that_could_run_code_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny_bert(tmp_path / "bert")
    (folder / "model.safetensors").unlink()
    torch.save({"bert.pooler.dense.bias": Evil()}, folder / "pytorch_model.bin")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FedbenchError, match=r"could run code when loaded, .*convert them to model\.safetensors"):
        load_fm(str(folder), 3, tmp_path)
    assert not (tmp_path / "pwned").exists()


def test_the_hub_is_asked_for_pickled_weights_only_where_there_are_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    folder = save_tiny_bert(tmp_path / "bert")
    asked: list[bool] = []

    def snapshot_download(repository: str, revision: str, allow_patterns: list[str]) -> str:
        asked.append("pytorch_model*.bin" in allow_patterns)
        if asked[-1]:
            (hidden / "pytorch_model.bin").rename(folder / "pytorch_model.bin")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    load_fm("owner/name", 3, tmp_path)
    assert asked == [False]
    from safetensors.torch import load_file

    hidden = tmp_path / "hidden"
    hidden.mkdir()
    torch.save(load_file(folder / "model.safetensors"), hidden / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert load_fm("owner/name", 3, tmp_path).provenance["source"] == "owner/name"
    assert asked == [False, False, True]


def test_size_and_normalisation_come_from_the_checkpoints_processor(tmp_path: Path) -> None:
    folder = save_tiny("vit", tmp_path / "vit")
    path = folder / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3], "resample": 3}))
    expected = ImageProcessor(8, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0), 3, "bicubic")
    assert load_fm(str(folder), 2, tmp_path).processor == expected
    path.write_text(json.dumps(settings | {"do_normalize": False}))
    assert load_fm(str(folder), 2, tmp_path).processor == ImageProcessor(8, (0.0,) * 3, (1.0,) * 3, 3)
    default = ImageProcessor(8, (0.5,) * 3, (0.5,) * 3, 3)
    for change in (
        {"size": 8},  # as older checkpoints have it
        {"size": [8, 8], "image_mean": None, "image_std": None},  # null stands for the default
        {"image_mean": 0.5, "image_std": 0.5, "rescale_factor": 1 / 255},  # one number is that of all channels
    ):
        path.write_text(json.dumps(change))
        assert load_fm(str(folder), 2, tmp_path).processor == default
    for change, says in (
        ({"size": {"height": 16, "width": 16}}, "the model takes 8 x 8"),
        ({"size": {"shortest_edge": 8}}, "the model takes 8 x 8"),
        ({"do_center_crop": True}, "asks for do_center_crop true; supported are"),
        ({"do_resize": False}, "asks for do_resize false"),
        ({"do_rescale": False}, "asks for do_rescale false"),
        ({"do_pad": True}, "asks for do_pad true"),
        ({"rescale_factor": 1 / 127.5}, "asks for rescale_factor 0.0078"),
        ({"resample": 1}, "asks for resample 1; supported are"),
        ({"resample": [2]}, "asks for resample"),
        ({"size": [8, 9]}, "the model takes 8 x 8"),
        ({"size": []}, "the model takes 8 x 8"),
        ({"image_mean": [0.5]}, r"image_mean is \[0.5\], expected 3 numbers"),
        ({"image_mean": "0.5"}, "image_mean is 0.5, expected 3 numbers"),
        ({"image_std": [0.5, float("nan"), 0.5]}, "image_std is .*expected 3 numbers"),
        ({"image_std": [0.5, 0, 0.5]}, "a deviation has to be above 0"),
        ({"image_std": 0}, "a deviation has to be above 0"),
        ({"image_processor_type": "DeiTImageProcessor", "do_center_crop": None}, "set do_center_crop in it"),
    ):
        path.write_text(json.dumps(settings | change))
        with pytest.raises(FedbenchError, match=says):
            load_fm(str(folder), 2, tmp_path)
    path.write_text("[1]")
    with pytest.raises(FedbenchError, match=r"preprocessor_config\.json holds no JSON object"):
        load_fm(str(folder), 2, tmp_path)
    path.write_text("{")
    with pytest.raises(FedbenchError, match=r"cannot read .*preprocessor_config\.json"):
        load_fm(str(folder), 2, tmp_path)
