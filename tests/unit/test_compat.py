"""Private names of libraries: each does what it is used for, and none is used outside `fedbench.compat`."""

from __future__ import annotations

import ast
import gc
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, BertConfig, BertForSequenceClassification

from fedbench import compat

ROOT = Path(__file__).parents[2]
needs_onednn = pytest.mark.skipif(not compat.has_onednn, reason="torch without oneDNN")


# ---------------------------------------------------------------- each does what it is used for


def test_onednn_is_found_wherever_torch_has_it() -> None:
    """A name that went away would only make everything slower, so it has to be missed here."""
    assert compat.has_onednn == torch.backends.mkldnn.is_available()


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_laid_out_weight_gives_the_product_and_comes_back_to_the_bit(dtype: torch.dtype) -> None:
    if dtype is torch.bfloat16 and not compat.cpu_has_bf16():
        pytest.skip("a CPU without bf16")
    weight, bias, x = (torch.randn(shape).to(dtype) for shape in ((24, 16), (24,), (2, 5, 16)))
    laid_out = compat.laid_out(weight)
    assert laid_out.dtype is dtype
    assert torch.equal(laid_out.to_dense(), weight)
    for b in (bias, None):
        found = compat.laid_out_product(x, laid_out, b, "none", [], "")
        assert found.dtype is dtype
        assert torch.allclose(found, F.linear(x, weight, b), atol=1e-5 if dtype is torch.float32 else 0.2)


def test_whether_the_cpu_has_bf16_is_known() -> None:
    known = compat.cpu_has_bf16()
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    if known and "avx" in flags:
        assert "avx512bw" in flags or "avx_ne_convert" in flags, "oneDNN computes bf16 with these alone"
    elif "avx512_bf16" in flags:
        assert known or not compat.has_onednn


def gradient(y: torch.Tensor, x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(y, x, grad)[0]


def test_backward_operators_give_the_gradients_of_autograd() -> None:
    x, grad = torch.randn(2, 7, 12, dtype=torch.float64)
    x.requires_grad_()
    found = compat.softmax_backward(grad, x.detach().softmax(-1), -1, x.dtype)
    assert torch.allclose(found, gradient(x.softmax(-1), x, grad))
    assert torch.allclose(compat.gelu_backward(grad, x.detach()), gradient(F.gelu(x), x, grad))
    assert torch.allclose(compat.silu_backward(grad, x.detach()), gradient(F.silu(x), x, grad))


def test_layer_norm_keeps_what_its_backward_pass_needs() -> None:
    x, grad = torch.randn(2, 7, 12)
    norm = nn.LayerNorm(12, eps=1e-3)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x.requires_grad_()
    own = norm.weight.detach(), norm.bias.detach()
    out, *statistics = compat.layer_norm_forward(x.detach(), norm.normalized_shape, *own, norm.eps)
    assert torch.equal(out, norm(x))
    found = compat.layer_norm_backward(
        grad, x.detach(), norm.normalized_shape, *statistics, *own, [True, False, False]
    )[0]
    assert torch.allclose(found, gradient(norm(x), x, grad), atol=1e-6)


def test_writes_count_what_changes_a_tensor_in_place() -> None:
    tensor = torch.zeros(4)
    start = compat.writes(tensor)
    assert tensor.add(1).sum() == 4
    assert compat.writes(tensor) == start, "reading is no writing"
    for change in (lambda: tensor.add_(1), lambda: tensor[1:].zero_(), lambda: tensor.detach().copy_(torch.ones(4))):
        change()
        assert compat.writes(tensor) > start
        start = compat.writes(tensor)


def test_a_dictionary_by_tensor_goes_by_identity_and_forgets() -> None:
    keys = compat.TensorKeys()
    one, other = torch.zeros(2), torch.zeros(2)
    keys[one] = "one"
    assert (keys.get(one), keys.get(other)) == ("one", None)
    del one
    gc.collect()
    assert len(keys) == 0


def test_a_module_with_hooks_or_a_forward_of_its_own_is_watched() -> None:
    layer = nn.Linear(2, 2)
    assert not compat.watched(layer)
    for add in (layer.register_forward_hook, layer.register_forward_pre_hook):
        hook = add(lambda *_: None)
        assert compat.watched(layer)
        hook.remove()
        assert not compat.watched(layer)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    assert compat.watched(layer)
    del layer.__dict__["forward"]
    assert not compat.watched(layer)


def tiny_config() -> BertConfig:
    return BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)


def test_the_attention_that_is_set_is_the_one_computed_from_the_next_batch_on() -> None:
    calls = []

    def attention(module: nn.Module, query: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor, None]:
        calls.append(module)
        return query.transpose(1, 2), None

    AttentionInterface.register("fedbench_test", attention)
    config = tiny_config()
    compat.set_attention(config, "sdpa")
    assert compat.attention_of(config) == "sdpa"
    model = BertForSequenceClassification(config).eval()
    assert compat.attention_of(model.config) == "sdpa"
    rows = torch.tensor([[1, 2, 3]])
    before = model(rows).logits
    assert calls == []
    compat.set_attention(model.config, "fedbench_test")
    assert not torch.equal(model(rows).logits, before)
    assert len(calls) == 1
    compat.set_attention(model.config, "sdpa")
    assert torch.equal(model(rows).logits, before)
    assert len(calls) == 1


def test_a_model_is_built_without_drawing_its_initial_values() -> None:
    drawn = torch.random.get_rng_state()
    with compat.without_initial_values():
        built = BertForSequenceClassification(tiny_config())
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert {n: p.shape for n, p in built.named_parameters()}.items() >= {"classifier.weight": (2, 4)}.items()
    BertForSequenceClassification(tiny_config())
    assert not torch.equal(torch.random.get_rng_state(), drawn), "outside of the block values are drawn"


def adapted(name: str = "default", **settings: object) -> tuple[nn.Module, LoraLinear]:
    model = nn.Sequential(nn.Linear(6, 6))
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=3, target_modules=["0"], **settings), model, adapter_name=name)
    layer = model[0]
    assert isinstance(layer, LoraLinear)
    nn.init.normal_(layer.lora_B[name].weight)
    return model, layer


def test_plain_lora_adds_its_scaled_product_and_nothing_else() -> None:
    _, layer = adapted()
    name = compat.plain_lora(layer)
    assert name == "default"
    x = torch.randn(3, 6)
    own = layer.lora_B[name](layer.lora_A[name](x)) * layer.scaling[name]
    assert torch.allclose(layer(x), layer.base_layer(x) + own, atol=1e-6)


def test_lora_that_does_more_is_not_plain() -> None:
    _, dora = adapted(use_dora=True)
    assert compat.plain_lora(dora) is None
    _, dropping = adapted(lora_dropout=0.5)
    assert compat.plain_lora(dropping.train()) is None
    assert compat.plain_lora(dropping.eval()) == "default"
    _, disabled = adapted()
    disabled.enable_adapters(False)
    assert compat.plain_lora(disabled) is None
    _, merged = adapted()
    merged.merge()
    assert compat.plain_lora(merged) is None
    model, two = adapted()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), model, adapter_name="second")
    two.set_adapter(["default", "second"])
    assert compat.plain_lora(two) is None
    two.set_adapter(["second"])
    assert compat.plain_lora(two) == "second"


def test_the_maker_of_a_pickled_array_is_the_one_its_pickle_names() -> None:
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    maker, arguments, state = array.__reduce__()
    assert compat.array_of_pickle() is maker
    again = compat.array_of_pickle()(*arguments)
    again.__setstate__(state)
    assert np.array_equal(again, array)
    assert b"_reconstruct" in pickle.dumps(array, protocol=2)


# ---------------------------------------------------------------- and none is used elsewhere

DOCUMENTED = {("machine/workers.py", "_exit")}
"""Names of libraries that begin with an underscore and yet are documented."""
OWN = {("scenario/load.py", "_sources"), ("scenario/load.py", "_folder"), ("models/weights.py", "_tunable_biases")}
"""Private names of the package that a neighbour in the same room uses, or that it gives to a library's object."""


def foreign(source: str, known: set[str]) -> Iterator[str]:
    """Private names that `source` takes from a library: of modules and objects, by import, or by their text.

    `known`: the private names that the package defines itself, which `self`, `cls` and `super()` may mean.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            owner = ast.unparse(node.value)
            if owner not in ("self", "cls", "super()") or node.attr not in known:
                yield node.attr
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith(("fedbench", "__")):
            yield from (part for part in (node.module or "").split(".") if is_private(part))
            yield from (alias.name for alias in node.names if is_private(alias.name))
        elif isinstance(node, ast.Import):
            yield from (part for alias in node.names for part in alias.name.split(".") if is_private(part))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr", "delattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(str(name.value)):
                yield str(name.value)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def defined(source: str) -> Iterator[str]:
    """Private names that `source` gives to something of its own."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and is_private(node.name):
            yield node.name
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr


def sources() -> dict[str, str]:
    found = {}
    for folder in (ROOT / "fedbench", ROOT / "methods"):
        found |= {str(path.relative_to(folder)): path.read_text(encoding="utf-8") for path in folder.rglob("*.py")}
    return found


def test_private_names_of_libraries_stand_in_compat_alone() -> None:
    package = sources()
    assert len(package) > 80
    known = {name for source in package.values() for name in defined(source)}
    found = {(file, name) for file, source in package.items() for name in foreign(source, known)}
    elsewhere = {(file, name) for file, name in found if file != "compat.py"}
    assert elsewhere == DOCUMENTED | OWN
    assert {name for file, name in found if file == "compat.py"} >= {"_version", "_linear_pointwise"}


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("torch._C._x", ["_C", "_x"]),
        ("self._own; cls._own; super()._own; x.__class__; __name__", []),
        ("self._theirs", ["_theirs"]),
        ("other._own", ["_own"]),
        ("from numpy._core import multiarray", ["_core"]),
        ("from torch import _VF\nfrom fedbench.run.loop import _run", ["_VF"]),
        ("import torch._dynamo.config", ["_dynamo"]),
        ("getattr(x, '_hidden', None); getattr(x, 'shown')", ["_hidden"]),
    ],
)
def test_a_private_name_is_found_however_it_is_taken(source: str, names: list[str]) -> None:
    assert sorted(foreign(source, {"_own"})) == sorted(names)
