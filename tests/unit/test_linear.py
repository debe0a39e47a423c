"""Frozen linear layers: what nn.Linear computes, for as long as their weight stays the same."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedbench.compat import cpu_has_bf16, has_onednn
from fedbench.machine.device import Execution
from fedbench.models.linear import FrozenLinear, reordered


def frozen(n_in: int = 24, n_out: int = 40, seed: int = 0) -> FrozenLinear:
    torch.manual_seed(seed)
    layer = nn.Linear(n_in, n_out).requires_grad_(False)
    FrozenLinear.adopt(layer)
    assert isinstance(layer, FrozenLinear)
    return layer


@given(rows=st.integers(1, 50), n_in=st.integers(1, 40), n_out=st.integers(1, 40), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_output_and_gradient_are_those_of_a_linear_layer(rows: int, n_in: int, n_out: int, seed: int) -> None:
    layer = frozen(n_in, n_out, seed)
    x = torch.randn(1, rows, n_in, requires_grad=True)
    found = []
    for block in (reordered(layer), nullcontext()):
        with block:
            y = layer(x)
            # A gradient that comes in expanded or transposed has to be read right.
            seen = (y.sum(), y.transpose(1, 2).square().sum())
            found += [(y.detach(), torch.autograd.grad(s, x, retain_graph=True)[0]) for s in seen]
    for (y, g), (y0, g0) in zip(found[:2], found[2:], strict=True):
        assert torch.allclose(y, y0, atol=1e-5)
        assert torch.allclose(g, g0, atol=1e-4)


def test_a_weight_changed_between_blocks_is_used_whichever_way_it_was_written() -> None:
    layer = frozen()
    x = torch.randn(3, 24, requires_grad=True)
    changes = (
        lambda w: w.mul_(-2.0),
        lambda w: w.data.copy_(w[torch.randperm(len(w))]),  # counted by no version
        lambda w: w.detach().numpy().__setitem__((0, 0), 7.0),
        lambda w: w.data[-1].add_(1e-6),
    )
    for change in changes:
        with reordered(layer, gradients=True, keep=True):
            layer(x)
        assert layer._copies is not None
        with torch.no_grad():
            change(layer.weight)
        with reordered(layer, gradients=True, keep=True):
            y = layer(x)
            (grad,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(layer._copies[0].to_dense(), layer.weight)
        assert torch.allclose(y, nn.functional.linear(x, layer.weight, layer.bias), atol=1e-5)
        assert torch.allclose(grad, layer.weight.sum(0).expand(3, -1), atol=1e-5)


@pytest.mark.skipif(not has_onednn, reason="torch without oneDNN")
def test_only_a_frozen_fp32_weight_in_a_block_is_reordered() -> None:
    layer, x = frozen(), torch.randn(3, 24)
    layer(x)
    layer.weight.requires_grad_(True)
    with reordered(layer):
        layer(x).sum().backward()
    assert layer.weight.grad is not None
    assert layer._copies is None
    layer.weight.requires_grad_(False)
    with reordered(layer):
        with reordered(layer):
            layer(x)
        assert layer.live, "the inner block must not end the outer one"
        assert layer._copies is not None
    assert not layer.live
    assert layer._copies is None, "which would take as much memory as the weight"
    with reordered(layer.double()):
        assert layer(x.double()).dtype is torch.float64
        assert layer._copies is None
    assert set(layer.state_dict()) == {"weight", "bias"}


@pytest.mark.skipif(not has_onednn, reason="torch without oneDNN")
def test_copies_are_kept_for_the_last_that_asked_alone() -> None:
    first, second, third = frozen(), frozen(), frozen()
    for layers in ([first, second], [second, third]):
        with reordered(*layers, keep=True):
            pass
    with reordered(first):
        pass
    assert [layer._copies is None for layer in (first, second, third)] == [True, False, False]


@pytest.mark.skipif(not cpu_has_bf16(), reason="a CPU without bf16")
def test_under_autocast_the_copies_are_in_bf16() -> None:
    layer = frozen()
    x = torch.randn(3, 24, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        stock = layer(x)
        (gradient,) = torch.autograd.grad(stock.float().square().sum(), x)
        with reordered(layer, precision="bf16"):
            assert layer.copy(False).dtype is layer.copy(True).dtype is torch.bfloat16
            y = layer(x)
            (found,) = torch.autograd.grad(y.float().square().sum(), x)
        with reordered(layer):
            assert layer.copy(False).dtype is torch.float32
            assert torch.equal(layer(x), stock), "copies in fp32 are of no use under autocast"
    assert y.dtype is stock.dtype is torch.bfloat16
    assert found.dtype is torch.float32
    # bf16 has 8 bits of mantissa, and kernels sum in orders of their own.
    assert torch.allclose(y.float(), stock.float(), rtol=2**-7, atol=1e-2)
    assert torch.allclose(found, gradient, rtol=2**-5, atol=5e-2)
    with reordered(layer, precision="bf16"):
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias)), "without autocast: fp32"


def test_a_layer_that_was_in_a_block_can_be_copied_and_pickled() -> None:
    layer, x = frozen(), torch.randn(3, 24)
    with reordered(layer, gradients=True):
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert twin.live is None
            with reordered(twin):
                assert torch.equal(twin(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_tuned_bias_gets_its_gradient(precision: str) -> None:
    layer = frozen()
    layer.bias.requires_grad_(True)
    with reordered(layer, precision=precision), Execution(precision=precision).autocast():
        layer(torch.randn(2, 5, 24)).sum().backward()
    assert layer.bias.grad.dtype is torch.float32
    assert torch.allclose(layer.bias.grad, torch.full((40,), 10.0))
