"""Layers of a vision transformer as one function each, against transformers' own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import PACKED, PADDED, random_values, save_tiny
from torch import Tensor, nn

from fedbench.api.local import AdamW, LocalTask
from fedbench.check.suite import tensors_close
from fedbench.compat import has_onednn
from fedbench.data.examples import Batch, Examples
from fedbench.forward import image
from fedbench.forward.feed import forward
from fedbench.models.cache import Frozen
from fedbench.models.foundation import FoundationModel
from fedbench.models.parts import Parts
from fedbench.models.spec import LoraSpec
from fedbench.models.weights import get_tensors, set_tensors, tunable_names
from fedbench.models.zoo.load import load_fm
from fedbench.objectives.classification import cross_entropy
from fedbench.training.alone import execute

pytestmark = pytest.mark.skipif(not has_onednn, reason="torch without oneDNN")
LORA, FFN = LoraSpec(2, 4), LoraSpec(2, 4, projections=("query", "up", "down"))


@pytest.fixture(scope="module")
def fm(tmp_path_factory: pytest.TempPathFactory) -> FoundationModel:
    folder = save_tiny("vit", tmp_path_factory.mktemp("vit") / "checkpoint")
    return load_fm(str(folder), 3, folder)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each layer computed as one function, the tokens of an image that are asked about."""
    seen: list[int] = []
    attend = image._attend

    def counted(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        seen.append(query.shape[1])
        return attend(query, key, value)

    monkeypatch.setattr(image, "_attend", counted)
    return seen


def build(fm: FoundationModel, lora: LoraSpec | None) -> nn.Module:
    model = fm.build(lora, torch.device("cpu"))
    set_tensors(model, random_values(model))
    return model


def images(n: int) -> Examples:
    generator = torch.Generator().manual_seed(1)
    return Examples(torch.arange(n) % 3, pixels=torch.randn(n, 3, 8, 8, generator=generator))


def agree(model: nn.Module, names: list[str], n: int = 7) -> None:
    """Logits, gradients and hidden states are those of stock modules."""
    batch: Batch = images(n).batch(range(n))
    parameters = dict(model.named_parameters())
    out = []
    for execution in (PADDED, PACKED):
        for name in names:
            parameters[name].requires_grad_(True)
        with forward(model, execution, gradients=True) as passing:
            answer = passing.logits(batch)
            grads = torch.autograd.grad(answer.square().sum(), [parameters[name] for name in names])
            hidden, _ = passing.layer_outputs(batch)
        for name in names:
            parameters[name].requires_grad_(False)
        out.append((answer.detach(), dict(zip(names, grads, strict=True)), [h.detach() for h in hidden]))
    (answer, grads_of, hidden), (found, found_of, states) = out
    assert torch.allclose(answer, found, rtol=1e-5, atol=1e-5)
    assert tensors_close(grads_of, found_of, 1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(hidden, states, strict=True))


@pytest.mark.parametrize("short", [128, 3], ids=["scores kept", "torch's kernel"])
@pytest.mark.parametrize(
    "lora",
    [LORA, LoraSpec(3, 2, layers=(1,)), LoraSpec(2, 4, projections=("key", "output")), FFN, None],
    ids=["all", "one layer", "two projections", "ffn", "none"],
)
def test_a_layer_is_what_transformers_computes(
    fm: FoundationModel, calls: list[int], lora: LoraSpec | None, short: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image, "SHORT", short)
    model = build(fm, lora)
    agree(model, tunable_names(model))
    assert calls == [5, 5, 1, 5, 5, 5], "the last layer asks about first tokens only, unless all are wanted"
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_a_gradient_reaches_what_lies_below(fm: FoundationModel, calls: list[int]) -> None:
    model = build(fm, LORA)
    agree(model, [next(n for n, _ in model.named_parameters() if "position_embeddings" in n)])
    assert len(calls) == 6


@pytest.mark.parametrize("what", ["a hook on the FFN", "a hook on LoRA", "a tuned bias", "a tuned LayerNorm"])
def test_a_layer_steps_aside_for_whatever_it_cannot_do(fm: FoundationModel, calls: list[int], what: str) -> None:
    model = build(fm, LORA)
    parts, also = Parts(model), []
    if what == "a hook on the FFN":
        model.get_submodule(parts.ffn_activation_path(2)).register_forward_hook(lambda *_: None)
    elif what == "a hook on LoRA":
        model.get_submodule(f"{parts.attention_paths(2)[0]}.lora_A.default").register_forward_hook(lambda *_: None)
    elif what == "a tuned bias":
        also = [f"{parts.ffn_in_path(2)}.bias"]
    else:
        also = [f"{parts.layer_path(2)}.layernorm_before.weight"]
    agree(model, [*tunable_names(model), *also])
    assert len(calls) == 4, "the two other layers, for logits and for hidden states"


def test_a_hook_in_the_last_layer_sees_all_tokens(fm: FoundationModel) -> None:
    model, seen = build(fm, None), []
    path = Parts(model).ffn_activation_path(2)
    model.get_submodule(path).register_forward_hook(lambda _, __, out: seen.append(tuple(out.shape[:2])))
    with forward(model, PACKED) as passing, passing.feeding(images(4).batch(range(4)), observed=[path]) as (inputs, _):
        model(**inputs)
    assert seen == [(4, 5)]


def test_other_arithmetic_is_left_to_transformers(fm: FoundationModel, calls: list[int]) -> None:
    model = build(fm, LORA).double()
    batch = images(2).batch(range(2))
    with forward(model, PACKED) as passing, passing.feeding(batch) as (inputs, _):
        model(pixel_values=inputs["pixel_values"].double())
    assert not calls


def test_local_training_ends_where_stock_modules_end(fm: FoundationModel, calls: list[int], tmp_path: Path) -> None:
    model = build(fm, LORA)
    start = get_tensors(model, tunable_names(model))
    batches = np.split(np.arange(12), 3)
    task = LocalTask(Frozen("vit", model), start, images(12), batches, AdamW(lr=1e-3), cross_entropy, clip_norm=1.0)
    plain, packed = execute(task, PADDED).tunables, execute(task, PACKED).tunables
    moved = {n: plain[n] - start[n] for n in start}
    assert tensors_close(moved, {n: packed[n] - start[n] for n in start}, 1e-4)
    assert calls
