"""Families, LoRA, weights and sharing, on small random checkpoints that are saved and loaded as real ones are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import layer_outputs, logits, save_tiny, save_tiny_bert, tiny_fm, train_rows
from safetensors.torch import save_file

from fedbench.data.examples import Batch
from fedbench.errors import FedbenchError
from fedbench.models.build import build
from fedbench.models.cache import ModuleCache, TensorStore
from fedbench.models.foundation import FoundationModel
from fedbench.models.parts import Parts
from fedbench.models.spec import LoraSpec, ModelSpec
from fedbench.models.weights import frozen_state, get_tensors, initial_tunables, load_frozen, set_tensors, tunable_names
from fedbench.models.zoo.load import load_fm
from fedbench.rng import Streams

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["bert", "roberta", "distilbert", "vit"])
def fm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FoundationModel:
    folder = save_tiny(request.param, tmp_path_factory.mktemp(request.param) / "checkpoint")
    return load_fm(str(folder), 3, folder)


def inputs(fm: FoundationModel) -> Batch:
    if fm.family.modality == "image":
        pixels = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        return Batch({"pixel_values": pixels}, torch.zeros(4, dtype=torch.long), None)
    return train_rows(4).batch(np.arange(4))


def tuned(fm: FoundationModel, **lora: object) -> torch.nn.Module:
    model = fm.build(LoraSpec(2, 4, **lora), CPU)  # type: ignore[arg-type]
    set_tensors(model, initial_tunables(model, Streams(0, "unit")))
    return model


def test_the_parts_bind_to_the_right_modules(fm: FoundationModel) -> None:
    model = tuned(fm)
    parts = Parts(model)
    assert parts.count == 3
    seen: dict[str, tuple[int, ...]] = {}
    paths = [parts.ffn_activation_path(i) for i in range(3)]
    hooks = [
        model.get_submodule(p).register_forward_hook(lambda _m, _i, out, p=p: seen.update({p: tuple(out.shape)}))
        for p in paths
    ]
    outputs, _ = layer_outputs(model, inputs(fm))
    for hook in hooks:
        hook.remove()
    assert len(outputs) == 3
    assert all(seen[p][-1] == 24 for p in paths), "the hook sees the activation of every FFN neuron"
    assert parts.ffn_in(1).weight.shape == (24, 16)
    assert parts.ffn_out(1).weight.shape == (16, 24)
    assert (parts.ffn_norm_path(0) is None) == (fm.family.modality == "image")
    # LoRA on four projections of three layers, A and B each; the head is trained, embeddings and pooler are not.
    names = tunable_names(model)
    assert sum(".lora_" in n for n in names) == 24
    assert {parts.layer_of(n) for n in names if ".lora_" in n} == {0, 1, 2}
    assert all(parts.is_head(n) for n in names if ".lora_" not in n)
    assert not any("pooler" in n or fm.family.embeddings in n for n in names)


def test_every_tunable_gets_a_gradient_and_nothing_else_does(fm: FoundationModel) -> None:
    model, names = tuned(fm), None
    names = set(tunable_names(model))
    for n, p in model.named_parameters():
        p.requires_grad_(n in names)
        if ".lora_B." in n:
            torch.nn.init.ones_(p)
    logits(model, inputs(fm)).square().sum().backward()
    for n, p in model.named_parameters():
        assert (p.grad is not None and bool(p.grad.abs().sum() > 0)) == (n in names), n


def test_compression_keeps_the_other_weights(fm: FoundationModel) -> None:
    spec = fm.spec.with_ffn_widths([24, 5, 24]).with_lora(LoraSpec(2, 4))
    model = build(ModelSpec.from_json(spec.to_json()))
    assert Parts(model).ffn_in(1).weight.shape == (5, 16)
    ours, theirs = frozen_state(model), fm.state
    assert set(ours) == set(theirs)
    different = [n for n in ours if ours[n].shape != theirs[n].shape]
    assert len(different) == 3, "W1, b1 and W2 of the compressed layer"
    with pytest.raises(FedbenchError, match="expected"):
        load_frozen(model, theirs)


def test_an_untrained_adapter_changes_nothing_and_the_weights_are_the_checkpoints(fm: FoundationModel) -> None:
    model, plain = tuned(fm), fm.build(None, CPU)
    head = {n: t for n, t in get_tensors(model, tunable_names(model)).items() if ".lora_" not in n}
    set_tensors(plain, head)
    with torch.no_grad():
        assert torch.allclose(logits(model, inputs(fm)), logits(plain, inputs(fm)), atol=1e-6)
    for name, tensor in frozen_state(plain).items():
        assert torch.equal(tensor, fm.state[name])


def test_fewer_layers(fm: FoundationModel) -> None:
    model = build(fm.spec.with_layers([0, 2]))
    assert Parts(model).count == 2


def test_adapters_on_some_layers_only(fm: FoundationModel) -> None:
    model = tuned(fm, layers=(0, 2))
    parts = Parts(model)
    assert {parts.layer_of(n) for n in tunable_names(model) if ".lora_" in n} == {0, 2}


def test_initial_values_depend_on_the_name_alone() -> None:
    short, full = tiny_fm(3).build(LoraSpec(2, 4), CPU), tiny_fm(4).build(LoraSpec(2, 4), CPU)
    torch.rand(7)
    a, b = (initial_tunables(m, Streams(0, "unit")) for m in (short, full))
    assert all(torch.equal(a[n], b[n]) for n in a)
    other = initial_tunables(short, Streams(1, "unit"))
    assert not any(torch.equal(a[n], other[n]) for n in a if ".lora_A." in n)


def test_building_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    tuned(tiny_fm())
    assert torch.equal(torch.rand(3), expected)


def test_equal_contents_share_one_module_and_equal_tensors_one_copy() -> None:
    fm, cache = tiny_fm(), ModuleCache(CPU)
    one = {n: t.clone() for n, t in fm.state.items()}
    two = {n: t.clone() for n, t in fm.state.items()}
    a, b = cache.intern(one), cache.intern(two)
    assert all(a[n] is b[n] for n in a)
    assert cache.get(fm.spec, a).module is cache.get(fm.spec, b).module
    two["bert.pooler.dense.bias"] = two["bert.pooler.dense.bias"] + 1
    assert cache.get(fm.spec, cache.intern(two)).key != cache.get(fm.spec, a).key


def test_a_digest_follows_a_change_in_place() -> None:
    store, tensor = TensorStore(), torch.zeros(3)
    before = store.digest(tensor)
    tensor.add_(1)
    assert store.digest(tensor) != before == store.digest(torch.zeros(3))


def test_the_embedded_minilm_is_the_pinned_one(tmp_path: Path) -> None:
    fm = load_fm("minilm-l6", 3, tmp_path)
    assert fm.spec.ffn_widths == (1536,) * 6
    assert sum(t.numel() for t in fm.state.values()) == 22_713_216


@pytest.mark.parametrize(
    ("name", "says"),
    [("nonsense", "not one of minilm-l6"), ("owner/name", "three|--fm PATH"), ("./absent", "no such folder")],
)
def test_an_fm_that_cannot_be_had_is_one_line(tmp_path: Path, name: str, says: str) -> None:
    with pytest.raises(FedbenchError, match=says) as caught:
        load_fm(name, 2, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_head_trained_for_these_classes_is_kept_and_any_other_is_not(tmp_path: Path) -> None:
    import json

    import transformers

    folder = save_tiny_bert(tmp_path / "bert")  # two labels, called LABEL_0 and LABEL_1
    assert load_fm(str(folder), 2, tmp_path, ("negative", "positive")).trained_head is None
    path = folder / "config.json"
    labels = {"id2label": {"0": "NEGATIVE", "1": "POSITIVE"}, "label2id": {"NEGATIVE": 0, "POSITIVE": 1}}
    path.write_text(json.dumps(json.loads(path.read_text()) | labels))
    fm = load_fm(str(folder), 2, tmp_path, ("negative", "positive"))
    assert fm.trained_head is not None
    model = fm.build(None, CPU)
    set_tensors(model, fm.trained_head)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    batch = train_rows(4).batch(np.arange(4))
    with torch.no_grad():
        assert torch.allclose(logits(model, batch), theirs(**batch.inputs).logits, atol=1e-6)
    swapped = load_fm(str(folder), 2, tmp_path, ("positive", "negative"))
    assert swapped.trained_head is None
    assert swapped.content_hash != fm.content_hash, "a head that is used is part of what the model is"
    assert load_fm(str(folder), 3, tmp_path, ("a", "b", "c")).trained_head is None


def test_the_embedded_minilm_computes_what_transformers_computes(tmp_path: Path) -> None:
    import transformers

    from fedbench.models.zoo.load import minilm_folder

    fm = load_fm("minilm-l6", 3, tmp_path)
    ours = fm.build(None, CPU)
    theirs = transformers.AutoModel.from_pretrained(minilm_folder()).eval()
    inputs = fm.processor(
        ["a short tweet", "another one, a little longer than that"], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected = theirs(**inputs).last_hidden_state
        hidden = ours(**inputs, output_hidden_states=True).hidden_states[-1]
        assert torch.allclose(hidden, expected, atol=1e-6), (hidden - expected).abs().max()
        batch = Batch(dict(inputs), torch.zeros(2), inputs["attention_mask"])
        packed = layer_outputs(ours, batch)[0][-1]
    longest = expected[1]  # which comes first in the packed row
    assert torch.allclose(packed[0, : len(longest)], longest, atol=2e-5)


def save_nothing_but_a_config(folder: Path, text: str) -> Path:
    (folder / "config.json").write_text(text)
    return folder


def test_broken_checkpoints_are_named(tmp_path: Path) -> None:
    with pytest.raises(FedbenchError, match="has no weights: it lacks model.safetensors and pytorch_model.bin"):
        load_fm(str(save_nothing_but_a_config(tmp_path, "{}")), 2, tmp_path)
    (tmp_path / "model.safetensors").write_bytes((10).to_bytes(8, "little") + b'{"a":null}')
    with pytest.raises(FedbenchError, match=r"model\.safetensors is damaged or cut short .*fetch it again"):
        load_fm(str(tmp_path), 2, tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "xlnet"}')
    with pytest.raises(FedbenchError, match="'xlnet' is not supported; known: bert, distilbert, .*roberta, vit"):
        load_fm(str(tmp_path), 2, tmp_path)


def test_packing_gives_every_family_its_own_positions(fm: FoundationModel) -> None:
    model, batch = tuned(fm), inputs(fm)
    set_tensors(model, {n: torch.randn_like(t) for n, t in get_tensors(model, tunable_names(model)).items()})
    found = []
    for enabled in (False, True):
        with torch.no_grad():
            found.append(logits(model, batch, enabled))
    assert torch.allclose(*found, rtol=1e-4, atol=1e-4)


def test_a_whole_alpha_is_one_text_however_it_was_given() -> None:
    """What a method's class says, 48, is 48.0 once its settings were read from a record."""
    texts = {ModelSpec("bert", {}, (4,), LoraSpec(8, alpha)).to_json() for alpha in (48, 48.0)}
    assert len(texts) == 1
    assert ModelSpec.from_json(texts.pop()).lora == LoraSpec(8, 48.0)
    assert (
        ModelSpec("bert", {}, (4,), LoraSpec(8, 0.5)).to_json() != ModelSpec("bert", {}, (4,), LoraSpec(8, 0)).to_json()
    )
