"""Encoder layers as one function each, against transformers' own; and that they step aside for whoever needs those."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import PACKED, PADDED, logits, random_values, save_tiny, train_rows
from torch import Tensor, nn

from fedbench.check.suite import tensors_close
from fedbench.compat import has_onednn
from fedbench.forward import encoder
from fedbench.forward.feed import forward
from fedbench.models.foundation import FoundationModel
from fedbench.models.parts import Parts
from fedbench.models.spec import LoraSpec
from fedbench.models.weights import frozen_state, set_tensors, tunable_names
from fedbench.models.zoo.load import load_fm

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not has_onednn, reason="torch without oneDNN")


@pytest.fixture(scope="module", params=["bert", "roberta", "distilbert", "mpnet"])
def fm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FoundationModel:
    folder = save_tiny(request.param, tmp_path_factory.mktemp(request.param) / "checkpoint")
    return load_fm(str(folder), 3, folder)


def build(fm: FoundationModel, lora: LoraSpec | None) -> nn.Module:
    """The model with random tunables, none of them zero."""
    model = fm.build(lora, CPU)
    set_tensors(model, random_values(model))
    return model


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry for each layer computed as one function: whether it was trimmed to first tokens."""
    seen: list[bool] = []
    attend = encoder.attend

    def counted(*args: object) -> object:
        seen.append(bool(args[-1]))
        return attend(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(encoder, "attend", counted)
    return seen


def both(model: nn.Module, names: list[str], rows: int = 9) -> list[tuple[Tensor, dict[str, Tensor], list[Tensor]]]:
    """Logits, gradients and hidden states of real tokens: padded with stock modules, and packed with reordered ones."""
    batch = train_rows(40).batch(np.random.default_rng(5).choice(40, rows, replace=False))
    parameters = dict(model.named_parameters())
    out = []
    try:
        for name in names:
            parameters[name].requires_grad_(True)
        for packed in (False, True):
            with forward(model, PACKED if packed else PADDED, gradients=True) as passing:
                answer = passing.logits(batch)
                grads = torch.autograd.grad(answer.square().sum(), [parameters[n] for n in names])
                hidden, mask = passing.layer_outputs(batch)
            assert mask is not None
            # Packed, rows lie in another order: sorted, the two can be compared.
            states = [h.detach()[mask.bool()].sort(0).values for h in hidden]
            out.append((answer.detach(), dict(zip(names, grads, strict=True)), states))
    finally:
        for name in names:
            parameters[name].requires_grad_(False)
    return out


def agree(model: nn.Module, names: list[str], rows: int = 9) -> None:
    (answer, grads, hidden), (answer_p, grads_p, hidden_p) = both(model, names, rows)
    assert torch.allclose(answer, answer_p, rtol=1e-5, atol=1e-5)
    assert tensors_close(grads, grads_p, 1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(hidden, hidden_p, strict=True))


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize(
    "lora",
    [LoraSpec(2, 4), LoraSpec(3, 2, layers=(1,)), LoraSpec(2, 4, projections=("query", "output")), None],
    ids=["all", "one layer", "two projections", "none"],
)
def test_a_layer_is_what_transformers_computes(
    fm: FoundationModel, calls: list[bool], lora: LoraSpec | None, rows: int
) -> None:
    model = build(fm, lora)
    before = {n: t.clone() for n, t in frozen_state(model).items()}
    agree(model, tunable_names(model), rows)
    trims = fm.spec.model_type not in ("distilbert", "mpnet")
    assert calls == [False, False, trims, False, False, False], "three layers for logits, three for hidden states"
    assert all(torch.equal(before[n], t) for n, t in frozen_state(model).items())
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_a_gradient_reaches_what_lies_below(fm: FoundationModel, calls: list[bool]) -> None:
    model = build(fm, LoraSpec(2, 4))
    embedding = next(n for n, _ in model.named_parameters() if "word_embeddings" in n)
    agree(model, [embedding])
    assert len(calls) == 6


def hooked(model: nn.Module, path: str) -> None:
    model.get_submodule(path).register_forward_hook(lambda *_: None)


ASIDE: dict[str, Callable[[nn.Module, Parts], str | None]] = {
    "a hook on the FFN": lambda m, p: hooked(m, p.ffn_activation_path(1)),
    "a hook on a projection": lambda m, p: hooked(m, p.attention_paths(1)[2]),
    "a hook on LoRA": lambda m, p: hooked(m, f"{p.attention_paths(1)[0]}.lora_A.default"),
    "a tuned bias": lambda m, p: f"{p.ffn_in_path(1)}.bias",
    "a tuned bias beside LoRA": lambda m, p: f"{p.attention_paths(1)[3]}.base_layer.bias",
    "a tuned weight": lambda m, p: f"{p.ffn_out_path(1)}.weight",
    "a tuned LayerNorm": lambda m, p: f"{p.ffn_norm_path(1)}.weight",
    "LoRA switched off": lambda m, p: m.get_submodule(p.attention_paths(1)[0]).enable_adapters(False),
    "a layer in training mode": lambda m, p: p.layer(1).train() and None,
}


@pytest.mark.parametrize("what", [*ASIDE])
def test_a_layer_steps_aside_for_whatever_it_cannot_do(fm: FoundationModel, calls: list[bool], what: str) -> None:
    model = build(fm, LoraSpec(2, 4))
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    also = ASIDE[what](model, Parts(model))
    names = [n for n in tunable_names(model) if not n.startswith(Parts(model).attention_paths(1)[0])]
    agree(model, [*names, *([also] if also else [])])
    assert len(calls) == 4, "the two other layers, for logits and for hidden states"


def test_a_hook_in_the_last_layer_sees_all_tokens(fm: FoundationModel) -> None:
    model, seen = build(fm, None), []
    path = Parts(model).ffn_activation_path(2)
    model.get_submodule(path).register_forward_hook(lambda _, __, out: seen.append(out.shape[1]))
    batch = train_rows(8).batch(range(8))
    with forward(model, PACKED) as passing, passing.feeding(batch, observed=[path]) as (inputs, _), torch.no_grad():
        model(**inputs)
    assert batch.mask is not None
    assert seen == [int(batch.mask.sum())]


@pytest.mark.parametrize("other", ["float64", "autocast", "outside of a block"])
def test_other_arithmetic_is_left_to_transformers(fm: FoundationModel, calls: list[bool], other: str) -> None:
    model, batch = build(fm, LoraSpec(2, 4)), train_rows(8).batch(range(8))
    if other == "float64":
        model.double()
    if other == "outside of a block":
        logits(model, batch)
    else:
        with torch.autocast("cpu", torch.bfloat16, enabled=other == "autocast"), forward(model, PACKED) as passing:
            passing.logits(batch)
    assert not calls


def test_another_activation_is_left_to_transformers(calls: list[bool], tmp_path: Path) -> None:
    import json

    folder = save_tiny("bert", tmp_path / "relu")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    model = build(load_fm(str(folder), 3, folder), LoraSpec(2, 4))
    agree(model, tunable_names(model))
    assert not calls


def test_a_module_put_in_between_blocks_is_used(calls: list[bool], fm: FoundationModel) -> None:
    model = build(fm, LoraSpec(2, 4))
    agree(model, tunable_names(model))
    path = Parts(model).ffn_out_path(1)
    other = copy.deepcopy(model.get_submodule(path))
    with torch.no_grad():
        other.weight.mul_(-1)
    model.set_submodule(path, other)
    agree(model, tunable_names(model))
    assert len(calls) == 12
