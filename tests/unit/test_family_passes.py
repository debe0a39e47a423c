"""What every text family computes: without padding as with it, and as transformers does; decoders look back only."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    DECODERS,
    answers_of,
    context,
    logits,
    on_every_executor,
    public_rows,
    random_values,
    save_tiny,
    save_tiny_decoder,
    train_rows,
)
from torch import Tensor, nn

from fedbench.api.local import AdamW, LocalTask
from fedbench.check.suite import tensors_close
from fedbench.data.examples import Batch
from fedbench.data.rows import Part
from fedbench.errors import FedbenchError
from fedbench.forward.feed import Forward, forward
from fedbench.forward.layout import Layout
from fedbench.machine.device import Execution
from fedbench.methods.fedpft import FedPFT
from fedbench.models.cache import Frozen
from fedbench.models.families.known import FAMILIES
from fedbench.models.foundation import FoundationModel
from fedbench.models.parts import Parts
from fedbench.models.reading import encode
from fedbench.models.spec import LoraSpec
from fedbench.models.weights import get_tensors, initial_tunables, set_tensors, tunable_names
from fedbench.models.zoo.load import load_fm
from fedbench.rng import Streams

CPU = torch.device("cpu")
TEXT = [name for name, family in FAMILIES.items() if family.modality == "text"]
PACKED = [name for name in TEXT if FAMILIES[name].packs]


@cache
def fm_of(family: str) -> FoundationModel:
    with TemporaryDirectory() as folder:
        return load_fm(str(save_tiny(family, Path(folder) / "fm")), 3, Path(folder))


def model_of(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = fm_of(family).build(LoraSpec(2, 4), CPU)
    set_tensors(model, random_values(model))
    return model.to(dtype)


def answers(passing: Forward, batch: Batch, layout: Layout | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    return answers_of(passing, batch, lambda out: out.square().sum(), layout)


@pytest.mark.parametrize("family", PACKED)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("short", [0, 128])
def test_packed_equals_padded_in_outputs_and_gradients(
    family: str, dtype: torch.dtype, tolerance: float, short: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedbench.forward.layout.SHORT", short)
    model, batch = model_of(family, dtype), train_rows(9).batch(range(9))
    expected, wanted = answers(Forward(model, packed=False), batch)
    assert Forward(model).packed
    with forward(model, Execution(), gradients=True) as whole_layers:
        for passing in (Forward(model), whole_layers):
            found, grads = answers(passing, batch)
            assert (found - expected).abs().max() <= tolerance * expected.abs().max()
            assert tensors_close(grads, wanted, tolerance)


@pytest.mark.parametrize("family", PACKED)
def test_segments_of_clients_equal_padded_rows(family: str) -> None:
    model, rows = model_of(family, torch.float64), train_rows(7)
    batch = rows.batch(range(7))
    assert batch.mask is not None
    layout = Layout.of_segments([rows.lengths[:3].tolist(), rows.lengths[3:].tolist()], batch.mask.shape[1], CPU)
    with torch.no_grad(), Forward(model).feeding(batch, layout=layout) as (inputs, _):
        found = model(**inputs).logits
    expected = logits(model, batch, packed=False)
    assert torch.allclose(found[[0, 1, 2, 4, 5, 6, 7]], expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("family", TEXT)
def test_a_row_is_what_transformers_makes_of_it_alone(family: str, tmp_path: Path) -> None:
    import transformers

    folder, rows = save_tiny(family, tmp_path / "fm"), train_rows(6)
    fm = load_fm(str(folder), 3, tmp_path)
    model = fm.build(None, CPU)
    set_tensors(model, random_values(model))
    kind = getattr(transformers, fm.family.architecture)
    stock = kind.from_pretrained(folder, num_labels=3, ignore_mismatched_sizes=True).eval()
    for name, value in random_values(model).items():
        stock.get_parameter(name).data.copy_(value)
    with torch.no_grad():
        alone = [stock(input_ids=rows.batch([i]).inputs["input_ids"]).logits[0] for i in range(6)]
        for packed in (False, True):
            assert torch.allclose(logits(model, rows.batch(range(6)), packed), torch.stack(alone), atol=1e-5)


@pytest.mark.parametrize("family", ["mpnet", "modernbert", "gpt2", "llama", "qwen2"])
def test_clients_of_a_family_learn_alike_on_every_executor(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = model_of(family), train_rows(12)
    values = get_tensors(model, tunable_names(model))

    def task(seed: int) -> LocalTask:
        rng = np.random.default_rng(seed)
        batches = [rng.choice(12, 4, replace=False) for _ in range(3)]
        return LocalTask(Frozen("fm", model), {n: t.clone() for n, t in values.items()}, rows, batches, AdamW(1e-3))

    tasks = [task(seed) for seed in range(3)]
    for reference, result in on_every_executor(tasks, monkeypatch):
        assert result.loss == pytest.approx(reference.loss, rel=1e-4)
        assert tensors_close(reference.tunables, result.tunables, 1e-3)


@pytest.mark.parametrize("family", TEXT)
def test_an_adapter_that_is_not_trained_changes_nothing(family: str, tmp_path: Path) -> None:
    fm = fm_of(family)
    server: Any = FedPFT(r=6, distil_steps=2, distil_batch=4, lora_r=2).server(fm, public_rows(16), context(tmp_path))
    bare = fm.build(None, CPU)
    set_tensors(bare, {n: t for n, t in server.initial.items() if ".lora_" not in n})
    batch = train_rows(5).batch(range(5))
    assert torch.equal(logits(server.put_in_fm(), batch), logits(bare, batch))


@pytest.mark.parametrize("family", TEXT)
def test_a_sub_fm_of_full_width_is_the_fm(family: str, tmp_path: Path) -> None:
    server: Any = FedPFT(r=24, distil_steps=0, lora_r=2).server(fm_of(family), public_rows(16), context(tmp_path))
    server.values = random_values(server.full)
    batch = train_rows(5).batch(range(5))
    assert torch.equal(logits(server.put_in_proxy(), batch), logits(server.put_in_fm(), batch))


# ---------------------------------------------------------------- decoders


@pytest.mark.parametrize("family", DECODERS)
def test_a_decoders_token_never_sees_a_later_one_or_another_row(family: str) -> None:
    model, rows = model_of(family, torch.float64), train_rows(8)
    assert rows.tokens is not None
    changed = replace(rows, tokens=[row.copy() for row in rows.tokens])
    assert changed.tokens is not None
    changed.tokens[3][-1] += 1
    found = []
    for each in (rows, changed):
        batch = each.batch(range(8))
        with torch.no_grad(), Forward(model).feeding(batch, gather=False) as (inputs, _):
            [body] = [m for n, m in model.named_children() if n == model.base_model_prefix]
            found.append(body(**inputs, use_cache=False).last_hidden_state[0])
    differs = (found[0] != found[1]).any(-1)
    layout = Layout.of(rows.batch(range(8)).inputs["attention_mask"])
    assert differs.nonzero().flatten().tolist() == [int(layout.last[3])], "the last token of that row alone"


def test_queries_that_share_keys_attend_as_if_each_had_its_own(tmp_path: Path) -> None:
    save_tiny_decoder("llama", tmp_path / "shared", num_key_value_heads=1)
    save_tiny_decoder("llama", tmp_path / "own", num_key_value_heads=2)
    shared, own = (load_fm(str(tmp_path / name), 3, tmp_path) for name in ("shared", "own"))
    doubled = {
        name: torch.cat([tensor, tensor]) if name.endswith(("k_proj.weight", "v_proj.weight")) else tensor
        for name, tensor in shared.state.items()
    }
    batch = train_rows(6).batch(range(6))
    found = []
    for fm in (shared, replace(own, state=doubled)):
        model = fm.build(None, CPU)
        set_tensors(model, random_values(model))
        found.append(logits(model, batch))
    assert torch.allclose(*found, atol=1e-6)


@pytest.mark.parametrize("family", DECODERS)
def test_a_decoder_that_has_no_padding_token_takes_the_one_that_ends_texts(family: str) -> None:
    fm = fm_of(family)
    assert fm.processor.pad_token_id == fm.spec.config["pad_token_id"] == 0
    part = Part(np.zeros(3, dtype=np.int64), ["a good film<|endoftext|>", "", "film"])
    rows = encode(part, fm, 32)
    assert rows.tokens is not None
    assert rows.tokens[0][-1] != 0, "the head of transformers reads the token before it"
    assert rows.tokens[1].tolist() == [0], "a row has at least one token"


def test_two_texts_of_a_decoder_are_two_lines() -> None:
    fm = fm_of("gpt2")
    rows = encode(Part(np.zeros(1, dtype=np.int64), ["a film"], text_pairs=["a plot"]), fm, 32)
    assert rows.tokens is not None and rows.segments is None
    assert fm.processor.decode(rows.tokens[0]) == "a film\na plot"


def test_gpt2_keeps_its_checkpoints_numbers_but_straightens_its_matrices(tmp_path: Path) -> None:
    import transformers

    folder = save_tiny("gpt2", tmp_path / "gpt2")
    stock = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    state = load_fm(str(folder), 3, tmp_path).state
    name = "transformer.h.1.mlp.c_fc.weight"
    assert (list(stock[name].shape), list(state[name].shape)) == ([16, 24], [24, 16])
    assert torch.equal(state[name], stock[name].t())
    assert torch.equal(state["transformer.wpe.weight"], stock["transformer.wpe.weight"])


def test_layers_of_a_shallower_model_attend_as_they_did() -> None:
    spec = fm_of("qwen2").spec
    assert spec.config["layer_types"] == ["full_attention", "full_attention", "sliding_attention"]
    assert spec.with_layers([0, 2]).config["layer_types"] == ["full_attention", "sliding_attention"]


def test_lora_on_some_of_what_one_layer_gives_is_refused() -> None:
    fm = fm_of("gpt2")
    names = tunable_names(fm.build(LoraSpec(2, 4, projections=("output",)), CPU))
    assert sum(".lora_A." in name for name in names) == 3
    with pytest.raises(FedbenchError, match="in gpt2 one layer gives query, key, value; name all of them or none"):
        fm.build(LoraSpec(2, 4, projections=("query", "value")), CPU)


def test_a_norm_within_a_head_starts_as_one() -> None:
    model = fm_of("modernbert").build(None, CPU)
    values = initial_tunables(model, Streams(0, "unit"))
    assert torch.equal(values["head.norm.weight"], torch.ones(16))
    assert values["head.dense.weight"].std() > 0


@pytest.mark.parametrize(
    ("family", "setting", "says"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "asks for layers that differ by their number"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rotary positions of kind 'dynamic'"),
        ("llama", {"sliding_window": 8}, "sliding_window 8 asks for attention within a window"),
        ("mpnet", {"pad_token_id": 0}, "pad_token_id is 0; a model of type mpnet counts positions from token 1"),
    ],
)
def test_what_a_family_does_not_compute_is_refused(
    family: str, setting: dict[str, Any], says: str, tmp_path: Path
) -> None:
    import json

    folder = save_tiny(family, tmp_path / "fm")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | setting))
    with pytest.raises(FedbenchError, match=says):
        load_fm(str(folder), 3, tmp_path)


def test_batches_of_all_families_lose_their_padding() -> None:
    assert TEXT == PACKED
    assert not any(fm_of(name).notes for name in TEXT)


def test_a_modernbert_that_pools_all_tokens_is_fed_padded(tmp_path: Path) -> None:
    import json

    folder = save_tiny("modernbert", tmp_path / "fm")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"classifier_pooling": "mean"}))
    fm = load_fm(str(folder), 3, tmp_path)
    model, rows = fm.build(None, CPU), train_rows(4)
    set_tensors(model, random_values(model))
    assert not Forward(model).packed and "keep their padding" in fm.notes[0]
    with torch.no_grad():
        alone = [logits(model, rows.batch([i]))[0] for i in range(4)]
        assert torch.allclose(logits(model, rows.batch(range(4))), torch.stack(alone), atol=1e-5)
    assert Parts(model).stacked
