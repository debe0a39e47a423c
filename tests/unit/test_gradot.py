"""GradOT: what is felt of a weight, the nearest product of a rank, and the proxy made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import context, logits, public_rows, random_values, tiny_fm, train_rows
from torch import nn

from fedbench.api.context import ClientContext
from fedbench.api.messages import Message
from fedbench.errors import FedbenchError
from fedbench.forward.feed import Forward
from fedbench.measures.exposure import Exposure
from fedbench.methods.gradot import GradOT, factors, felt, root
from fedbench.models.cache import ModuleCache
from fedbench.models.low_rank import low_rank
from fedbench.models.parts import Parts
from fedbench.models.spec import ModelSpec
from fedbench.models.weights import frozen_state, set_tensors
from fedbench.rng import Streams

CPU = torch.device("cpu")


def server_of(method: GradOT, tmp_path: Path, layers: int = 4) -> Any:
    return method.server(tiny_fm(layers), public_rows(), context(tmp_path))


def test_the_nearest_product_goes_by_what_is_given_and_what_is_felt() -> None:
    # W = diag-like [3, 2] with entries 3 and 2; the input of the second is felt ten times as much.
    weight = torch.tensor([[3.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    alike, other = torch.eye(2), torch.diag(torch.tensor([1.0, 100.0]))
    up, down = factors(weight, alike, torch.eye(3), 1)
    assert (up.shape, down.shape) == ((3, 1), (1, 2))
    assert torch.allclose(up @ down, torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, 0.0]]), atol=1e-4)
    up, down = factors(weight, other, torch.eye(3), 1)
    assert torch.allclose(up @ down, torch.tensor([[0.0, 0.0], [0.0, 2.0], [0.0, 0.0]]), atol=1e-4)
    up, down = factors(weight, alike, torch.diag(torch.tensor([1.0, 100.0, 1.0])), 1)
    assert torch.allclose(up @ down, torch.tensor([[0.0, 0.0], [0.0, 2.0], [0.0, 0.0]]), atol=1e-4)
    up, down = factors(weight, other, torch.eye(3), 2)
    assert torch.allclose(up @ down, weight, atol=1e-4), "of full rank nothing is lost"


def test_a_root_of_a_moment_and_its_inverse() -> None:
    moment = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    ridge = 1e-3 * 2.0 * torch.eye(2, dtype=torch.float64)
    assert torch.allclose(root(moment) @ root(moment), moment + ridge)
    assert torch.allclose(root(moment) @ root(moment, inverse=True), torch.eye(2, dtype=torch.float64))


def test_a_layer_of_low_rank_is_two_products_and_a_bias() -> None:
    layer = low_rank(nn.Linear(5, 3), 2)
    x = torch.randn(4, 5)
    assert torch.allclose(layer(x), x @ layer.down.weight.T @ layer.up.weight.T + layer.up.bias, atol=1e-6)
    with pytest.raises(FedbenchError, match="of 5 to 3 has no rank 4"):
        low_rank(nn.Linear(5, 3), 4)


def test_what_is_felt_is_the_gradient_of_random_directions_at_the_end() -> None:
    model, public = tiny_fm(4).build(None, CPU), public_rows(6)
    parts = Parts(model)
    path, end = parts.ffn_out_path(1), 2
    with torch.enable_grad():
        found = felt(model, [path], 1, end, public, np.random.default_rng(0))[path]
        # By hand: the FFN's activation as a leaf, and the same directions.
        kept: list[Any] = []

        def leaf(_m: Any, inputs: Any) -> Any:
            kept.append(inputs[0].detach().requires_grad_())
            return (kept[0],)

        def output(_m: Any, _i: Any, out: Any) -> None:
            out.retain_grad()
            kept.append(out)

        hooks = [
            model.get_submodule(path).register_forward_pre_hook(leaf),
            model.get_submodule(path).register_forward_hook(output),
        ]
        batch = public.batch(np.arange(6), CPU)
        states, _ = Forward(model, packed=False).layer_outputs(batch, end)
        v = torch.from_numpy(np.random.default_rng(0).standard_normal(states[end].shape)).float()
        assert batch.mask is not None
        (states[end] * v * batch.mask[..., None]).sum().backward()
        for hook in hooks:
            hook.remove()
    x, out = kept
    own = batch.mask.bool()
    a, g, da = x.detach()[own].double(), out.grad[own].double(), x.grad[own].double()
    assert torch.allclose(found.inputs, a.T @ a, rtol=1e-3)  # type: ignore[arg-type]
    assert torch.allclose(found.outputs, g.T @ g, rtol=1e-3, atol=1e-6)  # type: ignore[arg-type]
    assert torch.allclose(found.channels, (a * da).square().sum(0), rtol=1e-3, atol=1e-9)  # type: ignore[arg-type]


def test_the_proxy_is_the_fm_where_nothing_is_cut(tmp_path: Path) -> None:
    server = server_of(GradOT(rank=16, r=24), tmp_path)
    set_tensors(server.model, values := random_values(server.model))
    server.values = values
    batch = train_rows(5).batch(np.arange(5), CPU)
    assert torch.allclose(logits(server.put_in_proxy(), batch), logits(server.put_in_fm(), batch), atol=1e-3)
    assert all(r["hidden"] < 1e-5 for r in server.residuals())


def test_the_middle_is_cut_and_its_tensors_say_where_they_are_from(tmp_path: Path) -> None:
    server = server_of(GradOT(), tmp_path)
    assert server.spec.ranks == (None, 4, 4, None)
    assert server.spec.ffn_widths == (24, 12, 12, 24)
    assert ModelSpec.from_json(server.spec.to_json()) == server.spec
    assert {n.split(".")[3] for n in server.values if "layer" in n} == {"0", "3"}
    sent, whole = frozen_state(server.model), frozen_state(server.full)
    for name, source in server.fm_sources().items():
        assert torch.equal(sent[name], whole[source.name].index_select(source.dim, source.index))
    assert sent["bert.encoder.layer.1.attention.self.query.down.weight"].shape == (4, 16)
    query = "bert.encoder.layer.1.attention.self.query"
    assert torch.equal(sent[f"{query}.up.bias"], whole[f"{query}.bias"])
    exposure = Exposure({f"{query}.weight": whole[f"{query}.weight"]})
    exposure.observe(sent, server.fm_sources())
    assert exposure.block()["verbatim"]["all"] == 0.0, "a product of lower rank is nothing of the weight verbatim"
    first = "bert.encoder.layer.0."
    assert all(torch.equal(t, whole[n]) for n, t in sent.items() if n.startswith(first))


def test_a_client_assembles_the_proxy_and_two_of_them_are_averaged(tmp_path: Path) -> None:
    server, modules = server_of(GradOT(lora_r=2), tmp_path), ModuleCache(CPU)
    ctx = context(tmp_path)
    client: Any = GradOT(lora_r=2).client(ClientContext(0, Streams(0, "unit"), ctx.federation, modules))
    task = client.task(0, server.broadcast(0, [0])[0], train_rows(8))
    batch = train_rows(5).batch(np.arange(5), CPU)
    set_tensors(task.frozen.module, task.tunables)
    assert torch.allclose(logits(task.frozen.module, batch), logits(server.put_in_proxy(), batch), atol=1e-6)
    start = dict(server.values)
    uploads = {
        i: [Message("adapter", {n: v + add for n, v in start.items()}, {"num_examples": rows})]
        for i, (add, rows) in enumerate(((1.0, 1), (5.0, 3)))
    }
    server.aggregate(0, uploads)
    own = dict(server.put_in_fm().named_parameters())
    assert all(torch.allclose(own[n], v + 4.0) for n, v in start.items())


def test_a_middle_of_no_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FedbenchError, match="gradot: front 2 and back 2 leave no middle of 4 layers"):
        server_of(GradOT(front=2, back=2), tmp_path)
    with pytest.raises(FedbenchError, match="gradot: r is 30, but an FFN of the FM has 24 neurons"):
        server_of(GradOT(r=30), tmp_path)
