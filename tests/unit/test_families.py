"""Each family's description binds to the right modules: on checkpoints in the real format, through the real path.

What is right is written out here module by module, and computed by hand or by transformers itself, so that a wrong
description cannot agree with itself.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    PACKED,
    PADDED,
    SMALL,
    context,
    logits,
    public_rows,
    random_values,
    save_tiny,
    save_tiny_bert,
    smoke_request,
    train_rows,
)
from torch import nn

from fedbench.api.context import ServerContext
from fedbench.api.local import AdamW, LocalTask
from fedbench.check.suite import tensors_close
from fedbench.data.examples import Examples
from fedbench.data.pixels import ImageProcessor
from fedbench.data.rows import Part
from fedbench.errors import FedbenchError
from fedbench.machine.device import Execution
from fedbench.measures.gradient import gradient_error, gradients
from fedbench.methods.fedpft import FedPFT, zeros
from fedbench.models.build import build
from fedbench.models.cache import ModuleCache
from fedbench.models.families.known import FAMILIES
from fedbench.models.foundation import FoundationModel
from fedbench.models.parts import Parts
from fedbench.models.reading import encode, unknown_tokens
from fedbench.models.spec import LoraSpec
from fedbench.models.weights import frozen_state, get_tensors, set_tensors, tunable_names
from fedbench.models.zoo.load import load_fm
from fedbench.objectives.classification import cross_entropy
from fedbench.run.prepare import prepare
from fedbench.run.run import run
from fedbench.training.alone import execute

CPU = torch.device("cpu")
LAYERS = {
    "bert": "bert.encoder.layer",
    "roberta": "roberta.encoder.layer",
    "distilbert": "distilbert.transformer.layer",
    "vit": "vit.layers",
    "electra": "electra.encoder.layer",
    "mpnet": "mpnet.encoder.layer",
    "modernbert": "model.layers",
    "gpt2": "transformer.h",
    "llama": "model.layers",
    "qwen2": "model.layers",
    "qwen3": "model.layers",
}
BERT_TARGETS = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
LLAMA_TARGETS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
TARGETS = {
    "bert": BERT_TARGETS,
    "roberta": BERT_TARGETS,
    "electra": BERT_TARGETS,
    "mpnet": ["attention.attn.q", "attention.attn.k", "attention.attn.v", "attention.attn.o"],
    "modernbert": ["attn.Wqkv", "attn.Wo"],
    "gpt2": ["attn.c_attn", "attn.c_proj"],
    "llama": LLAMA_TARGETS,
    "qwen2": LLAMA_TARGETS,
    "qwen3": LLAMA_TARGETS,
    "distilbert": ["attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"],
    "vit": ["attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj"],
}
TWO_MAPS = ["classifier.dense", "classifier.out_proj"]
HEADS = {
    "bert": ["classifier"],
    "roberta": TWO_MAPS,
    "electra": TWO_MAPS,
    "mpnet": TWO_MAPS,
    "modernbert": ["head.dense", "head.norm", "classifier"],
    "gpt2": ["score"],
    "llama": ["score"],
    "qwen2": ["score"],
    "qwen3": ["score"],
    "distilbert": ["pre_classifier", "classifier"],
    "vit": ["classifier"],
}
PRE_NORM = ("vit", "modernbert", "gpt2", "llama", "qwen2", "qwen3")
ACTIVATIONS: dict[str, Any] = {
    "modernbert": nn.functional.gelu,
    "gpt2": partial(nn.functional.gelu, approximate="tanh"),
    **dict.fromkeys(("llama", "qwen2", "qwen3"), nn.functional.silu),
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
    plugged = server.put_in_fm()
    auto = "AutoModelForImageClassification" if kind == "vit" else "AutoModelForSequenceClassification"
    stock = getattr(transformers, auto).from_pretrained(checkpoint, num_labels=3, ignore_mismatched_sizes=True).eval()
    stock.config.pad_token_id = fm.processor.pad_token_id if kind != "vit" else None
    used = set()
    with torch.no_grad():
        for i in range(3):
            for target in TARGETS[kind]:
                path = f"{LAYERS[kind]}.{i}.{target}"
                names = [f"{path}.lora_{side}.default.weight" for side in "AB"]
                a, b = (server.values[n] for n in names)
                change = 48 / 2 * b @ a
                stock.get_submodule(path).weight += change.t() if kind == "gpt2" else change
                used.update(names)
        for path in HEADS[kind]:
            for part, value in stock.get_submodule(path).named_parameters():
                value.copy_(server.values[f"{path}.{part}"])
                used.add(f"{path}.{part}")
        assert used == set(server.values), "nothing else is tuned"
        batch = rows(fm).batch(np.arange(5))
        expected = stock(**batch.inputs).logits
        for packed in (False, True):
            assert torch.allclose(logits(plugged, batch, packed), expected, rtol=1e-3, atol=1e-4)


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
    if (gate := parts.ffn_gate_path(1)) and not parts.stacked:
        paths["gate"] = gate
    for role, path in paths.items():
        model.get_submodule(path).register_forward_hook(lambda _m, i, o, role=role: seen.update({role: (i[0], o)}))
    with torch.no_grad():
        logits(model, rows(fm).batch(np.arange(4)), packed=False)
    if gate is None:
        expected = ACTIVATIONS.get(fm.spec.model_type, nn.functional.gelu)(seen["in"][1])
        assert torch.equal(seen["out"][0], seen["act"][1]), "the activation is what the second matrix gets"
    else:
        first, up = seen["in"][1].chunk(2, -1) if parts.stacked else (seen["gate"][1], seen["in"][1])
        active = ACTIVATIONS[fm.spec.model_type](first)
        assert torch.equal(seen["out"][0], active * up), "a gated FFN multiplies the activation of its gate"
        expected = active * up.abs()
    assert torch.allclose(seen["act"][1], expected, atol=1e-6)
    layer = seen["layer"][1][0] if isinstance(seen["layer"][1], tuple) else seen["layer"][1]
    if norm:
        assert torch.equal(seen["norm"][1], layer), "the layer ends with the LayerNorm behind the FFN"
    else:
        assert fm.spec.model_type in PRE_NORM


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
        found.append(execute(task, PACKED if packed else PADDED))
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
    salience = fm.state[f"{path_out}.weight"].double().square().sum(0)
    for name in _rows_of_neurons(fm):
        if name.endswith("weight"):
            rows = fm.state[f"{LAYERS[fm.spec.model_type]}.1.{name}"].double().square().sum(1)
            salience += rows[:24] + rows[24:] if len(rows) == 48 else rows
    kept = salience.topk(6).indices.sort().values
    state = frozen_state(server.put_in_proxy())
    slices = torch.cat([kept, kept + 24]) if len(whole) == 48 else kept
    for name in _rows_of_neurons(fm):
        path = f"{LAYERS[fm.spec.model_type]}.1.{name}"
        assert torch.equal(state[path], fm.state[path][slices])
    assert torch.equal(state[f"{path_out}.weight"], fm.state[f"{path_out}.weight"][:, kept])
    changed = {n for n in state if state[n].shape != fm.state[n].shape}
    assert changed == {f"{Parts(server.full).layer_path(i)}.{n}" for i in (1, 2) for n in _ffn_tensors(fm)}


def _rows_of_neurons(fm: FoundationModel) -> list[str]:
    """The tensors of a layer that have a row, or two, for each neuron."""
    if fm.spec.model_type == "modernbert":
        return ["mlp.Wi.weight"]
    if fm.spec.model_type in ("llama", "qwen2", "qwen3"):
        return ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    return [f"{fm.family.ffn_in}.weight", f"{fm.family.ffn_in}.bias"]


def _ffn_tensors(fm: FoundationModel) -> list[str]:
    return [*_rows_of_neurons(fm), f"{fm.family.ffn_out}.weight"]


def test_gradient_error_is_zero_at_full_width_and_reaches_every_layer_below_it(
    fm: FoundationModel, tmp_path: Path
) -> None:
    ctx, probe = context(tmp_path), rows(fm)
    for r, layers_error in ((24, 0.0), (4, None)):
        server = fedpft(fm, ctx, r=r, distil_steps=0)
        server.values = random_values(server.full)
        plugged, proxy = server.put_in_fm(), server.put_in_proxy()
        reference = gradients(plugged, tunable_names(plugged), probe, Execution())
        mine = gradients(proxy, [*server.fm_names()], probe, Execution())
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
    assert record.accuracy.plug_in.rows == 60
    assert record.gradient_error is not None
    layers = record.gradient_error.points[-1].layers
    assert [entry.layer for entry in layers] == [0, 1, 2]
    assert all(entry.hidden > 0 for entry in record.distillation)
    assert record.exposure is not None
    assert 0 < record.exposure.verbatim.without_embeddings < 1


def test_a_target_that_matches_nothing_is_an_error(fm: FoundationModel, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = fm.spec.model_type
    for field, value in (
        ("attention", (*fm.family.attention[:3], "attention.output.proj")),
        ("ffn_in", "ffn.up"),
        ("ffn_out", fm.family.attention[0].rpartition(".")[0]),  # a module, but no linear map
    ):
        monkeypatch.setitem(FAMILIES, kind, replace(fm.family, **{field: value}))
        with pytest.raises(FedbenchError, match=r"its family's description is wrong|expected Linear"):
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


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return save_tiny_bert(tmp_path / "bert")


def configure(folder: Path, **changes: Any) -> Path:
    """The checkpoint in `folder` with these settings in its configuration."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def refused(folder: Path, says: str) -> None:
    """Loading `folder` is refused, in one line that names it."""
    with pytest.raises(FedbenchError, match=says) as caught:
        load_fm(str(folder), 3, folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"is_decoder": True}, "is_decoder true asks for attention that looks back only"),
        ({"add_cross_attention": True}, "add_cross_attention true asks for attention to another model"),
        ({"position_embedding_type": "relative_key"}, 'position_embedding_type "relative_key" asks for relative'),
        ({"chunk_size_feed_forward": 4}, "chunk_size_feed_forward 4 asks for"),
        ({"quantization_config": {"load_in_8bit": True}}, "quantization_config .* asks for quantised weights"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads .* asks for heads that were cut out"),
        ({"rope_theta": 1e4}, "rope_theta 10000.0 asks for rotary positions"),
        ({"auto_map": {"AutoModel": "own.Model"}}, "auto_map asks for model code of the checkpoint's own"),
        ({"hidden_act": "geglu"}, "hidden_act 'geglu' is no activation known"),
        ({"hidden_act": ["gelu"]}, "is no activation known"),
        (
            {"num_hidden_layers": "2"},
            "config.json cannot be a configuration: .*num_hidden_layers.*expected int, got str",
        ),
        ({"hidden_size": 15}, "hidden size .15. is not a multiple"),
        ({"num_hidden_layers": 2}, "holds 'bert.encoder.layer.2.*which config.json gives the model no place for"),
        ({"num_hidden_layers": 4}, "lacks 'bert.encoder.layer.3"),
        ({"vocab_size": 300}, r"'bert.embeddings.word_embeddings.weight' is \[114, 16\], .* has to be \[300, 16\]"),
        ({"pad_token_id": 500}, "Padding_idx must be within"),
    ],
)
def test_a_configuration_that_asks_for_another_model_is_refused(bert: Path, setting: dict[str, Any], says: str) -> None:
    refused(configure(bert, **setting), says)


@pytest.mark.parametrize(
    "setting",
    [
        {"return_dict": False},
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"problem_type": "regression"},
        {"problem_type": "single_label_classification", "num_labels": 1},
        {"id2label": ["negative", "positive"]},
        {"id2label": 5},
        {"is_decoder": False, "pruned_heads": {}, "position_embedding_type": "absolute", "quantization_config": None},
        {"torch_dtype": "float16", "transformers_version": "4.0.0", "architectures": ["BertModel"]},
        {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}},
    ],
)
def test_settings_that_are_no_part_of_the_model_change_nothing(bert: Path, setting: dict[str, Any]) -> None:
    before = load_fm(str(bert), 3, bert)
    after = load_fm(str(configure(bert, **setting)), 3, bert)
    batch = rows(before).batch(np.arange(4))
    with torch.no_grad():
        found = [logits(fm.build(None, CPU), batch) for fm in (before, after)]
    assert torch.equal(*found)
    # A setting that asks for nothing is kept as it was written, so only the others leave the hash alone.
    if "is_decoder" not in setting:
        assert after.content_hash == before.content_hash


def test_settings_nobody_knows_are_noted(bert: Path) -> None:
    assert load_fm(str(bert), 3, bert).notes == ()
    assert load_fm("minilm-l6", 3, bert).notes == ()
    configure(bert, task_specific_params={"a": 1}, use_alibi=True, expert_count=4, use_experts=False)
    [note] = load_fm(str(bert), 3, bert).notes
    assert note.endswith("config.json has settings that the model makes no use of: expert_count, use_alibi")


def test_labels_in_a_list_are_labels(bert: Path) -> None:
    configure(bert, id2label=["Negative", "Positive"])
    assert load_fm(str(bert), 2, bert, ("negative", "positive")).trained_head is not None
    assert load_fm(str(bert), 2, bert, ("positive", "negative")).trained_head is None


@pytest.mark.parametrize("text", ["[]", "null", '"bert"', "{", "\x00"])
def test_a_configuration_that_is_no_object_is_refused(bert: Path, text: str) -> None:
    (bert / "config.json").write_text(text)
    refused(bert, r"config\.json")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("bert.encoder.layer.0.attention.self.query.lora_A.default.weight", (2, 16)),
        ("bert.encoder.layer.1.output.adapter.down.weight", (4, 16)),
        ("bert.encoder.layer.0.crossattention.self.query.weight", (16, 16)),
        ("bert.encoder.layer.0.output.dense.weight.SCB", (16,)),
        ("bert.encoder.layer.3.output.dense.weight", (16, 24)),
        ("bert.embeddings.rotary.weight", (16,)),
        ("encoder.rel_pos.weight", (16,)),
        ("classifier.lora_B.default.weight", (3, 2)),
    ],
)
def test_a_tensor_of_the_encoder_that_the_model_has_no_place_for_is_refused(
    bert: Path, name: str, shape: tuple[int, ...]
) -> None:
    add(bert, **{name: torch.ones(shape)})
    refused(bert, f"holds '{name}' .1 such tensors., which config.json gives the model no place for")


def add(folder: Path, **tensors: torch.Tensor) -> None:
    """Put tensors into a checkpoint's file, in place of those of the same name."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    save_file(load_file(path) | tensors, path, metadata={"format": "pt"})


def test_heads_of_other_tasks_are_left_out(checkpoint: Path, fm: FoundationModel, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "more"
    shutil.copytree(checkpoint, folder)
    prefix = fm.family.embeddings.partition(".")[0]
    names = ["cls.predictions.bias", "lm_head.bias", "qa_outputs.weight", "vocab_transform.weight", "decoder.0.weight"]
    names += ["pooler.dense.weight"] if fm.spec.model_type != "bert" else []
    names += [f"{prefix}.embeddings.position_ids", f"{prefix}.embeddings.mask_token"]
    add(folder, **{name: torch.ones(2, 2) for name in names})
    assert load_fm(str(folder), 3, tmp_path).content_hash == fm.content_hash


def test_weights_that_are_not_finite_are_refused(bert: Path) -> None:
    add(bert, **{"bert.encoder.layer.1.output.dense.bias": torch.full((16,), torch.nan)})
    refused(bert, r"'bert.encoder.layer.1.output.dense.bias' .1 tensors in all. holds values that are not finite")


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 90000000\n"


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "vocab.txt"])
def test_a_git_lfs_pointer_is_said_to_be_one(bert: Path, file: str) -> None:
    (bert / file).write_text(POINTER)
    refused(bert, f"{file} is a git-lfs pointer, not the file; run `git lfs pull` in ")


def test_files_that_are_not_read_may_be_anything(bert: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "model_card.json", "README.txt"):
        (bert / name).write_text(POINTER)
    (bert / "eval_results.json").write_text("")
    load_fm(str(bert), 3, bert)


def test_pickled_weights_that_are_a_pointer_or_no_pickle_are_not_said_to_run_code(bert: Path) -> None:
    (bert / "model.safetensors").unlink()
    for content, says in (
        (POINTER.encode(), "is a git-lfs pointer"),
        (b"<!DOCTYPE html><html>not found</html>", "cannot load"),
        (b"PK\x03\x04" + bytes(200), "cannot load"),
        (b"", "is empty; fetch it again"),
    ):
        (bert / "pytorch_model.bin").write_bytes(content)
        refused(bert, says)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_weights_that_were_fetched_in_part_are_refused(bert: Path, share: float) -> None:
    path = bert / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refused(bert, r"model\.safetensors is (damaged or cut short|empty).*fetch it again")


def test_shards_are_read_and_a_missing_one_is_named(bert: Path) -> None:
    from transformers import BertForSequenceClassification

    whole = load_fm(str(bert), 3, bert).content_hash
    model = BertForSequenceClassification.from_pretrained(bert)
    (bert / "model.safetensors").unlink()
    model.save_pretrained(bert, max_shard_size="10KB")
    shards = sorted(bert.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert load_fm(str(bert), 3, bert).content_hash == whole
    shards[1].unlink()
    refused(bert, f"lacks 1 of {len(shards)} shards that model.safetensors.index.json names; fetch {shards[1].name}")
    (bert / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    refused(bert, "model.safetensors.index.json names no shards")


# ---------------------------------------------------------------- tokenizers


def words_of(folder: Path) -> list[str]:
    """The vocabulary of a checkpoint that then has vocab.txt alone."""
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    return (folder / "vocab.txt").read_text().split("\n")


def test_a_checkpoint_without_a_vocabulary_is_refused(bert: Path) -> None:
    words = words_of(bert)
    for left, says in (
        (words[:5], "holds special tokens alone"),
        (words[:40], "the tokenizer has 40 tokens up to number 39, the model has embeddings of 114"),
        ([*words, "more"], "the tokenizer has 115 tokens up to number 114, the model has embeddings of 114"),
        ([""], "vocab.txt is empty"),
        (["", ""], "the tokenizer has 6 tokens"),
    ):
        (bert / "vocab.txt").write_text("\n".join(left))
        refused(bert, says)
    (bert / "vocab.txt").unlink()
    refused(bert, r"has no vocabulary: it lacks tokenizer\.json, vocab\.txt, vocab\.json with merges\.txt")
    (bert / "vocab.json").write_text("{}")
    refused(bert, "has no vocabulary")


@pytest.mark.parametrize("text", ["{}", "[]", "null", "{", '{"model": 1}'])
def test_a_tokenizer_that_is_none_is_refused(bert: Path, text: str) -> None:
    (bert / "tokenizer.json").write_text(text)
    refused(bert, "has no tokenizer that can be read")


def test_a_tokenizer_that_marks_no_start_of_a_row_is_refused(bert: Path) -> None:
    path = bert / "tokenizer.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"post_processor": None}))
    (bert / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "cls_token": "[CLS]", "sep_token": "[SEP]",
                    "pad_token": "[PAD]", "unk_token": "[UNK]"})
    )  # fmt: skip
    refused(bert, r"puts no \[CLS\] and \[SEP\] around a row")
    (bert / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    refused(bert, "the tokenizer has no token for")


def test_positions_counted_from_another_padding_token_are_refused(tmp_path: Path) -> None:
    folder = save_tiny("roberta", tmp_path / "roberta")
    refused(configure(folder, pad_token_id=1), "counts positions from padding token 1, the tokenizer pads with 0")
    refused(configure(folder, pad_token_id=None), "pad_token_id is None; positions are counted from it")


def test_a_byte_level_tokenizer_as_robertas_is_read(tmp_path: Path) -> None:
    import transformers
    from tokenizers import ByteLevelBPETokenizer

    made = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    made.train_from_iterator(["the film is good", "a great plot"], vocab_size=300, special_tokens=special)
    folder = tmp_path / "roberta"
    config = transformers.RobertaConfig(**SMALL, vocab_size=made.get_vocab_size(), max_position_embeddings=20)
    transformers.RobertaForMaskedLM(config).save_pretrained(folder)
    made.save_model(str(folder))
    fm = load_fm(str(folder), 3, tmp_path)
    ids = fm.processor("the film")["input_ids"]
    assert (ids[0], ids[-1]) == (0, 2)
    assert fm.positions() == 18, "the first two of twenty are those of padding"
    (folder / "merges.txt").unlink()
    refused(folder, "has no vocabulary")


@pytest.mark.parametrize(("family", "room"), [("bert", 64), ("distilbert", 64), ("roberta", 65)])
def test_a_row_longer_than_the_models_positions_is_refused(family: str, room: int, tmp_path: Path) -> None:
    fm = load_fm(str(save_tiny(family, tmp_path / "fm")), 2, tmp_path)
    part = Part(np.zeros(2, dtype=np.int64), ["film " * (room - 2), "a film"])
    longest = encode(part, fm, 400)
    assert longest.lengths.tolist() == [room, 4], "a limit that no row reaches is no error"
    model = fm.build(None, CPU)
    for packed in (True, False):
        with torch.no_grad():
            assert torch.isfinite(logits(model, longest.batch([0, 1]), packed)).all()
    longer = Part(part.labels, ["film " * (room - 1), "a film"])
    assert encode(longer, fm, room).lengths.max() == room
    says = f"dataset.max_length is 400 and a row has {room + 1} tokens, but FM fm has positions for {room}; set"
    with pytest.raises(FedbenchError, match=says):
        encode(longer, fm, 400)


def test_token_types_that_the_model_does_not_have_are_refused(bert: Path) -> None:
    from safetensors.torch import load_file

    name = "bert.embeddings.token_type_embeddings.weight"
    add(configure(bert, type_vocab_size=1), **{name: load_file(bert / "model.safetensors")[name][:1].clone()})
    fm = load_fm(str(bert), 2, bert)
    encode(Part(np.zeros(1, dtype=np.int64), ["a film"]), fm, 32)
    with pytest.raises(FedbenchError, match="gives 2 token types to pairs, the model has 1"):
        encode(Part(np.zeros(1, dtype=np.int64), ["a film"], text_pairs=["a plot"]), fm, 32)


def test_the_share_of_unknown_tokens_is_noted(bert: Path) -> None:
    fm = load_fm(str(bert), 2, bert)

    def note(*texts: str) -> str | None:
        tokens = encode(Part(np.zeros(len(texts), dtype=np.int64), texts), fm, 32).tokens
        assert tokens is not None
        return unknown_tokens(fm.processor, tokens)

    assert note("the film", "a good plot") is None
    assert note("the film " * 9 + "фильм", "a good plot") is None
    found = note("the фильм", "хороший плохой")
    assert found is not None and found.startswith("75% of the tokens are unknown to the tokenizer")
    assert note("", "") is None


def test_a_run_says_where_most_words_are_unknown(bert: Path, tmp_path: Path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (bert / file).unlink()
    words = (bert / "vocab.txt").read_text().split("\n")
    (bert / "vocab.txt").write_text("\n".join(w if i < 5 else f"zq{i}" for i, w in enumerate(words)))
    prepared = prepare(smoke_request(tmp_path, "head-only", "tweets-noniid", bert))
    assert any("100% of the tokens are unknown" in note for note in prepared.notes)
