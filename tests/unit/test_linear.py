"""Frozen linear layers: what nn.Linear computes, for as long as their weight stays the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedbench.linear import FrozenLinear, _available
from fedbench.packing import packing


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
    for fast in (True, False):
        with packing(fast):
            y = layer(x)
            # A gradient that comes in expanded or transposed has to be read right.
            seen = (y.sum(), y.transpose(1, 2).square().sum())
            found += [(y.detach(), torch.autograd.grad(s, x, retain_graph=True)[0]) for s in seen]
    for (y, g), (y0, g0) in zip(found[:2], found[2:], strict=True):
        assert torch.allclose(y, y0, atol=1e-5)
        assert torch.allclose(g, g0, atol=1e-4)


def test_a_changed_weight_is_used_at_once() -> None:
    layer = frozen()
    x = torch.randn(3, 24, requires_grad=True)
    for change in (lambda w: w.mul_(-2.0), lambda w: w.copy_(torch.ones_like(w))):
        layer(x).sum().backward()
        with torch.no_grad():
            change(layer.weight)
        x.grad = None
        layer(x).sum().backward()
        assert torch.allclose(layer(x), nn.functional.linear(x, layer.weight, layer.bias), atol=1e-5)
        assert torch.allclose(x.grad, layer.weight.sum(0).expand(3, -1), atol=1e-5)


@pytest.mark.skipif(not _available, reason="torch without oneDNN")
def test_only_a_frozen_fp32_weight_outside_the_reference_executor_is_reordered() -> None:
    layer, x = frozen(), torch.randn(3, 24)
    with packing(False):
        layer(x)
    layer.weight.requires_grad_(True)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    assert layer._reordered is None
    layer.weight.requires_grad_(False)
    layer(x)
    assert layer._reordered is not None
    assert layer.double()(x.double()).dtype is torch.float64
    assert set(layer.state_dict()) == {"weight", "bias"}


def test_a_tuned_bias_gets_its_gradient() -> None:
    layer = frozen()
    layer.bias.requires_grad_(True)
    layer(torch.randn(2, 5, 24)).sum().backward()
    assert torch.allclose(layer.bias.grad, torch.full((40,), 10.0))
