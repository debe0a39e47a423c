"""Closed forms of the methods: averages, saliency, distillation loss, APoZ, W_fro, plug-in."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import context, layer_outputs, public_rows, tiny_fm, train_rows

from fedbench.api.context import ClientContext
from fedbench.api.local import AdamW, LocalTask
from fedbench.api.messages import Message, TensorSpec
from fedbench.data.examples import Examples
from fedbench.errors import FedbenchError, MessageError
from fedbench.files import load_tensors
from fedbench.machine.device import Execution
from fedbench.measures.gradient import gradient_error, gradients
from fedbench.methods import _distillation as d
from fedbench.methods import _layerwise as layerwise
from fedbench.methods._layers import uniform
from fedbench.methods.fedavg_lora import FedAvgLora, count, weighted_mean
from fedbench.methods.fedot import FedOT, FedOTServer
from fedbench.methods.fedpft import FedPFT, FedPFTServer, highest, zeros
from fedbench.models.cache import ModuleCache
from fedbench.models.foundation import FoundationModel
from fedbench.models.parts import Parts
from fedbench.models.weights import frozen_state, get_tensors, tunable_names
from fedbench.objectives.classification import cross_entropy
from fedbench.objectives.named import CLASSIFICATION
from fedbench.rng import Streams
from fedbench.run.payloads import deserialise, serialise
from fedbench.training.alone import execute

CPU = torch.device("cpu")


def fedpft(tmp_path: Path, rounds: int = 4, **settings: object) -> FedPFTServer:
    defaults: dict[str, object] = {"r": 5, "distil_steps": 0, "t": 1, "align_steps": 2}
    server = FedPFT(**(defaults | settings)).server(tiny_fm(), public_rows(), context(tmp_path, rounds))
    assert isinstance(server, FedPFTServer)
    return server


def test_fedavg_is_the_mean_weighted_by_sample_count() -> None:
    a, b = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([4.0, -1.0])}
    assert torch.equal(weighted_mean([a, b], [1, 3])["w"], torch.tensor([3.25, -0.25]))
    # An average that kept only the first client, or swapped the weights, would differ in every entry.
    assert torch.equal(weighted_mean([b, a], [3, 1])["w"], torch.tensor([3.25, -0.25]))


def test_fedavg_weights_go_with_their_own_clients_upload(tmp_path: Path) -> None:
    server = FedAvgLora().server(tiny_fm(), None, context(tmp_path))
    names = server.expected(0, 0)["adapter"]
    uploads = {
        cid: [Message("adapter", {n: torch.full(s.shape, float(cid)) for n, s in names.items()}, {"num_examples": k})]
        for cid, k in ((9, 1), (2, 3))
    }
    server.aggregate(0, uploads)
    tuned = get_tensors(server.put_in_fm(), list(names))
    assert all(torch.equal(t, torch.full_like(t, (9 * 1 + 2 * 3) / 4)) for t in tuned.values())


@pytest.mark.parametrize("value", [None, 0, -1, True, 1.5, "9"])
def test_an_impossible_sample_count_is_refused(tmp_path: Path, value: object) -> None:
    server = FedAvgLora().server(tiny_fm(), None, context(tmp_path))
    meta = {} if value is None else {"num_examples": value}
    with pytest.raises(MessageError, match="num_examples"):
        server.accept(0, [Message("adapter", {}, meta)])  # type: ignore[arg-type]


@pytest.mark.parametrize(("counts", "tokens"), [([0, 5, 11], 10), ([-1, 0, 0], 10), ([0, 0, 0], 0)])
def test_impossible_zero_counts_are_refused(tmp_path: Path, counts: list[int], tokens: int) -> None:
    message = Message("statistics", {"zeros.1": torch.tensor(counts)}, {"tokens": tokens})
    with pytest.raises(MessageError, match="statistics"):
        fedpft(tmp_path).accept(0, [message])


def test_saliency_and_kept_neurons_of_a_hand_computed_ffn() -> None:
    w_in = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]])  # [d_ff 3, d 2]
    w_out = torch.tensor([[4.0, 0.0, 2.0], [0.0, 1.0, 2.0]])  # [d 2, d_ff 3]
    assert d.saliency(w_in, w_out).tolist() == pytest.approx([5.0, 2**0.5, 8**0.5])
    assert d.most_salient(w_in, w_out, 2).tolist() == [0, 2]
    assert d.most_salient(w_in.flip(0), w_out.flip(1), 2).tolist() == [0, 2], "original order, not by saliency"


def test_hidden_loss_by_hand_ignores_padding() -> None:
    teacher = torch.tensor([[[1.0, 2.0], [100.0, 100.0]]])
    student = torch.tensor([[[2.0, 4.0], [-7.0, 3.0]]])
    mask = torch.tensor([[1, 0]])
    assert layerwise.hidden_loss(teacher, student, mask).item() == pytest.approx(((1 + 4) / 2) / ((1 + 4) / 2))


def test_distillation_loss_has_the_gradient_of_finite_differences(tmp_path: Path) -> None:
    server = fedpft(tmp_path)
    server.full.double(), server.model.double()
    batch = public_rows().batch(np.arange(3), CPU)
    loss = server.loss(server.compressed, 0.01)
    with torch.no_grad():
        teacher, _ = layer_outputs(server.full, batch)
    name = f"{server.parts.ffn_in_path(1)}.weight"
    weight = dict(server.model.named_parameters())[name]
    weight.requires_grad_(True)

    def value() -> torch.Tensor:
        return loss(teacher, *layer_outputs(server.model, batch))

    [grad] = torch.autograd.grad(value(), [weight])
    weight.requires_grad_(False)
    for i, j in ((0, 0), (2, 3), (4, 7)):
        at = weight[i, j].item()
        sides = []
        for step in (1e-6, -1e-6):
            weight[i, j] = at + step
            sides.append(value().item())
        weight[i, j] = at
        assert grad[i, j].item() == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-4, abs=1e-9)


def test_the_weight_regulariser_has_a_gradient_of_its_own() -> None:
    teacher, student = torch.randn(3, 3), torch.randn(3, 3, requires_grad=True)
    layerwise.weight_loss(teacher, student).backward()
    expected = 2 * (student.detach() - teacher) / 9 / teacher.square().mean()
    assert student.grad is not None and torch.allclose(student.grad, expected)


@pytest.mark.parametrize(
    ("rule", "counts"), [("non-positive", [2, 1, 0]), ("exact-zero", [1, 0, 0]), ("abs-below-eps", [2, 0, 0])]
)
def test_zero_rules_on_a_hand_made_activation(rule: str, counts: list[int]) -> None:
    activation = torch.tensor([[0.0, -0.1, 1.0], [-1e-4, 2.0, 3.0]])
    assert zeros(rule, 1e-3)(activation).tolist() == counts  # type: ignore[arg-type]


def test_apoz_counts_real_tokens_only(tmp_path: Path) -> None:
    fm = tiny_fm()
    module, rows = fm.build(None, CPU), train_rows(6)
    parts = Parts(module)
    path = parts.ffn_activation_path(0)
    frozen = ModuleCache(CPU).get(fm.spec, fm.state)
    task = LocalTask(
        frozen=frozen,
        tunables=get_tensors(module, tunable_names(module)),
        data=rows,
        batches=[np.arange(6)],
        optimiser=AdamW(lr=1e-3),
        loss=cross_entropy,
        observers={path: zeros("non-positive", 0.0)},
    )
    result = execute(task, Execution())
    # Row by row there is no padding, so every position is a real token.
    activations: list[torch.Tensor] = []
    handle = module.get_submodule(path).register_forward_hook(
        lambda _m, _i, out: activations.append(out.flatten(0, -2))
    )
    with torch.no_grad():
        for i in range(6):
            module(**rows.batch(np.array([i]), CPU).inputs)
    handle.remove()
    alone = torch.cat(activations)
    assert result.observed_tokens == len(alone) == int(rows.lengths.sum())
    assert torch.equal(result.observed[path], (alone <= 0).sum(0))


def test_highest_apoz_is_the_least_active_share() -> None:
    assert highest(torch.tensor([0.1, 0.9, 0.5, 0.7]), 0.5).tolist() == [1, 3]
    assert highest(torch.tensor([0.5, 0.5, 0.5, 0.5]), 0.5).tolist() == [0, 1], "ties keep their order"


def test_a_full_width_sub_fm_is_the_fm_and_its_gradient_error_is_zero(tmp_path: Path) -> None:
    server = fedpft(tmp_path, r=tiny_fm().spec.ffn_widths[0])
    batch = train_rows(5).batch(np.arange(5), CPU)
    proxy, fm = server.put_in_proxy(), server.put_in_fm()
    with torch.no_grad():
        assert torch.equal(proxy(**batch.inputs).logits, fm(**batch.inputs).logits)
    names = tunable_names(fm)
    parts = Parts(fm)
    mine, theirs = (gradients(m, names, train_rows(8), Execution()) for m in (proxy, fm))
    block = gradient_error(mine, theirs, parts.layer_of, parts.is_head)
    assert block["zero_filled"]["error"] <= 1e-6 and block["restricted"]["cosine"] == pytest.approx(1.0)


def test_plug_in_of_an_untrained_adapter_leaves_the_logits_unchanged(tmp_path: Path) -> None:
    fm = tiny_fm()
    batch = train_rows(5).batch(np.arange(5), CPU)
    for server in (fedpft(tmp_path), FedOT(distil_steps=0).server(fm, public_rows(), context(tmp_path))):
        tuned = server.put_in_fm()
        plain = fm.build(None, CPU)
        head = {n: t for n, t in get_tensors(tuned, tunable_names(tuned)).items() if ".lora_" not in n}
        plain.load_state_dict(head, strict=False)
        with torch.no_grad():
            assert torch.allclose(tuned(**batch.inputs).logits, plain(**batch.inputs).logits, atol=1e-6)


def test_the_sub_fm_is_a_slice_of_the_fm(tmp_path: Path) -> None:
    server = fedpft(tmp_path)
    [layer] = server.compressed
    kept = server.kept[layer]
    full, sub = Parts(server.full), server.parts
    assert torch.equal(sub.ffn_in(layer).weight, full.ffn_in(layer).weight[kept])
    assert torch.equal(sub.ffn_in(layer).bias, full.ffn_in(layer).bias[kept])
    assert torch.equal(sub.ffn_out(layer).weight, full.ffn_out(layer).weight[:, kept])
    assert torch.equal(sub.ffn_in(0).weight, full.ffn_in(0).weight), "retained layers keep their whole FFN"


def test_distillation_lowers_the_residual_and_is_cached(tmp_path: Path) -> None:
    settings = {"distil_steps": 40, "distil_batch": 8, "distil_lr": 3e-3}
    first = fedpft(tmp_path, **settings)
    [residual] = first.residuals()
    assert set(residual) == {"layer", "hidden", "weight", "hidden_before", "weight_before", "curve"}
    assert residual["hidden"] < 0.7 * residual["hidden_before"]
    assert len(residual["curve"]) == 10
    assert residual["curve"][-1] < residual["curve"][0]
    [cached] = (tmp_path / "proxies").iterdir()
    stamp = cached.stat().st_mtime_ns
    again = fedpft(tmp_path, **settings)
    assert cached.stat().st_mtime_ns == stamp
    for name, tensor in frozen_state(first.model).items():
        assert torch.equal(tensor, frozen_state(again.model)[name])


def _align(server: FedPFTServer, round: int, apoz: torch.Tensor) -> torch.Tensor:
    [layer] = server.compressed
    server.apoz = {layer: apoz}
    server.align(round)
    return highest(apoz, server.method.p)


def test_alignment_changes_exactly_the_chosen_neurons(tmp_path: Path) -> None:
    server = fedpft(tmp_path, p=0.4)
    server.values = {n: t + 0.05 for n, t in server.values.items()}
    before = {n: t.clone() for n, t in frozen_state(server.model).items()}
    chosen = _align(server, 0, torch.tensor([0.1, 0.9, 0.2, 0.8, 0.3]))
    assert chosen.tolist() == [1, 3]
    after = frozen_state(server.model)
    [layer] = server.compressed
    up, down = server.parts.ffn_in_path(layer), server.parts.ffn_out_path(layer)
    norm = server.parts.ffn_norm_path(layer)
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed == {f"{up}.weight", f"{up}.bias", f"{down}.weight", f"{down}.bias", f"{norm}.weight", f"{norm}.bias"}
    rest = torch.tensor([0, 2, 4])
    assert torch.equal(before[f"{up}.weight"][rest], after[f"{up}.weight"][rest])
    assert torch.equal(before[f"{down}.weight"][:, rest], after[f"{down}.weight"][:, rest])
    moved = (before[f"{up}.weight"] - after[f"{up}.weight"]).abs().sum(1)
    assert moved[chosen].gt(0).all()


def test_a_patched_client_holds_the_servers_sub_fm_whenever_it_comes_back(tmp_path: Path) -> None:
    server = fedpft(tmp_path, rounds=10, p=0.4)
    streams = Streams(0, "unit")
    clients = {
        cid: server.method.client(ClientContext(cid, streams, server.ctx.federation, ModuleCache(CPU)))
        for cid in (1, 2)
    }

    def send(round: int, cohort: list[int]) -> dict[int, list[Message]]:
        return {c: [deserialise(serialise(m)) for m in ms] for c, ms in server.broadcast(round, cohort).items()}

    def held(cid: int) -> dict[str, torch.Tensor]:
        return clients[cid].frozen  # type: ignore[attr-defined]

    for cid, inbox in send(0, [1, 2]).items():
        assert [m.kind for m in inbox] == ["sub_fm", "adapter"]
        clients[cid].task(0, inbox, train_rows(6))
    _align(server, 0, torch.tensor([0.9, 0.8, 0.1, 0.1, 0.1]))
    [inbox] = send(1, [1]).values()
    assert [m.kind for m in inbox] == ["alignment", "adapter"]
    clients[1].task(1, inbox, train_rows(6))
    _align(server, 1, torch.tensor([0.9, 0.1, 0.8, 0.1, 0.1]))
    inboxes = send(2, [1, 2])
    [layer] = server.compressed
    assert inboxes[1][0].tensors[f"{layer}.index"].tolist() == [0, 2]
    assert inboxes[2][0].tensors[f"{layer}.index"].tolist() == [0, 1, 2], "the union of what client 2 missed"
    for cid, inbox in inboxes.items():
        clients[cid].task(2, inbox, train_rows(6))
        for name, tensor in frozen_state(server.model).items():
            assert torch.equal(held(cid)[name], tensor), name
    assert [m.kind for m in send(3, [1])[1]] == ["adapter"], "nothing is sent twice"


def test_alignment_message_is_the_size_of_w_fro(tmp_path: Path) -> None:
    server = fedpft(tmp_path, p=0.4)
    server.broadcast(0, [1])
    _align(server, 0, torch.tensor([0.9, 0.8, 0.1, 0.1, 0.1]))
    message = server.broadcast(1, [1])[1][0]
    width = Parts(server.full).ffn_in(0).in_features
    # Two neurons of index, W1 row, b1 and W2 column; the output bias and both tensors of the LayerNorm.
    assert sum(t.numel() for t in message.tensors.values()) == 2 * (1 + width + 1 + width) + 3 * width


def test_no_alignment_after_the_last_round(tmp_path: Path) -> None:
    server = fedpft(tmp_path, rounds=4, t=2)
    assert [server.aligns(round) for round in range(4)] == [False, True, False, False]


@pytest.mark.parametrize(("keep", "expected"), [(2, [1, 4]), (4, [1, 2, 3, 4]), (3, [1, 3, 4]), (1, [2])])
def test_the_emulator_is_a_uniform_subset(keep: int, expected: list[int]) -> None:
    assert uniform([1, 2, 3, 4], keep) == expected


def test_fedot_plugs_the_last_layers_adapter_into_the_fms_last_layer(tmp_path: Path) -> None:
    server = FedOT(emulator=1, distil_steps=0).server(tiny_fm(layers=4), public_rows(), context(tmp_path))
    assert isinstance(server, FedOTServer)
    assert server.origin == [0, 1, 3]
    names = server.fm_names()
    last, target = server.parts.layer_path(2), Parts(server.full).layer_path(3)
    assert {names[n].removeprefix(target) == n.removeprefix(last) for n in names if n.startswith(last)} == {True}
    assert not any(n.startswith(server.parts.layer_path(1)) for n in names), "the emulator is not tuned"
    server.values = {n: torch.full_like(t, 0.5) for n, t in server.values.items()}
    tuned = get_tensors(server.put_in_fm(), tunable_names(server.full))
    half = {n for n, t in tuned.items() if torch.equal(t, torch.full_like(t, 0.5))}
    assert half == set(names.values())


@pytest.mark.parametrize(
    ("settings", "says"), [({"r": 999}, "r is 999"), ({"layers_retained": (7,)}, "layer 7")], ids=["r", "layer"]
)
def test_fedpft_names_a_setting_that_does_not_fit(tmp_path: Path, settings: dict[str, object], says: str) -> None:
    with pytest.raises(FedbenchError, match=says):
        fedpft(tmp_path, **settings)


def test_a_damaged_file_of_the_cache_is_said_and_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"distil_steps": 2, "distil_batch": 8}
    first = fedpft(tmp_path, **settings)
    [cached] = (tmp_path / "proxies").iterdir()
    content, (made, said) = cached.read_bytes(), load_tensors(cached)
    made = {name: tensor.clone() for name, tensor in made.items()}  # what is loaded is a view of the file
    for damaged in (content[:1000], content[:-1] + bytes([content[-1] ^ 1])):
        cached.write_bytes(damaged)
        again = fedpft(tmp_path, **settings)
        tensors, values = load_tensors(cached)  # the order of a file's metadata varies, so bytes may differ
        assert values == said and all(torch.equal(tensors[n], t) for n, t in made.items())
        assert again.residuals() == first.residuals()
        assert f"a file of the cache is damaged and made anew: {cached}" in caplog.text
        caplog.clear()
    fedpft(tmp_path, **settings)
    assert not caplog.text


def test_a_distilled_proxy_is_taken_from_the_cache_only_where_all_that_made_it_is_the_same(tmp_path: Path) -> None:
    fm, rows, ctx, folder = tiny_fm(layers=4), public_rows(), context(tmp_path), tmp_path / "proxies"
    other = replace(fm, content_hash="0" * 64)
    few = {"distil_steps": 1, "distil_batch": 8}

    def files(method: FedPFT | FedOT, fm: FoundationModel = fm, public: Examples = rows, seed: int = 0) -> int:
        method.server(fm, public, replace(ctx, streams=Streams(seed, "unit")))
        return len(list(folder.iterdir()))

    for kind, settings in (
        (FedPFT, [{"mu": 0.5}, {"r": 3}, {"layers_retained": (0,)}]),
        (FedOT, [{"emulator": 2}, {"front": 2}]),
    ):
        before = len(list(folder.iterdir())) if folder.exists() else 0
        assert files(kind(**few)) == before + 1
        assert files(kind(**few, lr=0.5, lora_r=2)) == before + 1, "what does not enter distillation"
        assert files(kind(**few), other) == before + 2
        assert files(kind(**few), public=public_rows(24)) == before + 3
        assert files(kind(**few), seed=1) == before + 4
        more = [{"distil_steps": 2}, {"distil_batch": 4}, {"distil_lr": 1e-3}, *settings]
        for i, each in enumerate(more, start=5):
            assert files(kind(**(few | each))) == before + i, each


def test_the_schedule_of_distillation_by_hand() -> None:
    # 4.8% of 100 steps, rounded up, are 5: the rate rises to step 4, and falls to 1/95 in the last step.
    factors = [layerwise.Schedule(100, 8, 1.0).factor(step) for step in (0, 3, 4, 5, 6, 99)]
    assert factors == pytest.approx([1 / 5, 4 / 5, 1, 1, 94 / 95, 1 / 95])
    assert [layerwise.Schedule(2, 8, 1.0).factor(step) for step in (0, 1)] == [1, 1]
    assert layerwise.Schedule(1, 8, 1.0).factor(0) == 1


def test_public_batches_are_passes_over_permutations() -> None:
    found = layerwise.public_batches(10, layerwise.Schedule(5, 4, 1.0), np.random.default_rng(3))
    rng = np.random.default_rng(3)
    orders = [rng.permutation(10) for _ in range(3)]
    expected = [order[at : at + 4] for order in orders for at in (0, 4)][:5]
    assert [b.tolist() for b in found] == [b.tolist() for b in expected]
    [all_rows] = layerwise.public_batches(3, layerwise.Schedule(1, 4, 1.0), rng)
    assert sorted(all_rows.tolist()) == [0, 1, 2], "fewer rows than a batch has"


def test_residuals_are_means_over_the_first_128_rows(tmp_path: Path) -> None:
    server, rows = fedpft(tmp_path), public_rows(150)
    [layer] = server.compressed
    full, sub = Parts(server.full), server.parts
    for n, chunks in ((20, [(0, 20)]), (72, [(0, 36), (36, 72)]), (150, [(at, at + 32) for at in range(0, 128, 32)])):
        [found] = d.residuals(server.full, server.model, [(layer, layer)], rows.select(np.arange(n)), Execution())
        losses = []
        for first, last in chunks:
            batch = rows.batch(np.arange(first, last), CPU)
            with torch.no_grad():
                (theirs, mask), (ours, _) = (layer_outputs(m, batch) for m in (server.full, server.model))
            losses.append(layerwise.hidden_loss(theirs[layer], ours[layer], mask).item())
        assert found["layer"] == layer
        assert found["hidden"] == pytest.approx(float(np.mean(losses)), rel=1e-5)
        products = [(p.ffn_out(layer).weight @ p.ffn_in(layer).weight).double() for p in (full, sub)]
        weight = (products[1] - products[0]).square().mean() / products[0].square().mean()
        assert found["weight"] == pytest.approx(weight.item(), rel=1e-4)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("free", [None, [1, 4]], ids=["whole", "rows"])
def test_distillation_is_adamw_with_warm_up_and_clipped_gradients(
    tmp_path: Path, free: list[int] | None, workers: int
) -> None:
    server, rows = fedpft(tmp_path), public_rows()
    names = server._trainable(server.compressed)
    limited = f"{server.parts.ffn_in_path(1)}.weight"
    limits = None if free is None else {limited: (0, torch.tensor(free))}
    still = [i for i in range(5) if free is not None and i not in free]
    schedule = layerwise.Schedule(4, 8, 1e-2, warmup=0.5, clip_norm=1e-3)
    ours = deepcopy(server.model)
    theirs = dict(ours.named_parameters())

    def regulariser() -> torch.Tensor:
        return 0.1 * theirs[names[0]].square().sum()

    loss = layerwise.LayerLoss([(1, 1), (2, 1)], regulariser)
    optimiser = torch.optim.AdamW([theirs[n] for n in names], lr=1.0, weight_decay=0.01)
    for name in names:
        theirs[name].requires_grad_(True)
    batches = layerwise.public_batches(len(rows), schedule, np.random.default_rng(0))
    norms, losses = [], []
    for batch, rate in zip(batches, (0.5e-2, 1e-2, 1e-2, 0.5e-2), strict=True):
        optimiser.zero_grad()
        inputs = rows.batch(batch, CPU)
        with torch.no_grad():
            target, _ = layer_outputs(server.full, inputs)
        value = loss(target, *layer_outputs(ours, inputs))
        losses.append((value - regulariser()).item())
        value.backward()
        # What does not move has no part in the norm that is clipped.
        (theirs[limited].grad if free is not None else torch.zeros(5))[still] = 0.0  # type: ignore[index]
        before = theirs[limited].detach().clone()
        norms.append(torch.nn.utils.clip_grad_norm_([theirs[n] for n in names], 1e-3).item())
        optimiser.param_groups[0]["lr"] = rate
        optimiser.step()
        theirs[limited].data[still] = before[still]
    assert min(norms) > 1e-3, "or clipping would not be seen"
    server.model.train()
    mine = dict(server.model.named_parameters())
    loss = layerwise.LayerLoss(loss.pairs, lambda: 0.1 * mine[names[0]].square().sum())
    execution, rng = Execution(workers=workers), np.random.default_rng(0)
    found = layerwise.distil(server.full, server.model, names, loss, rows, schedule, rng, execution, limits)
    assert found.shape == (4, 2)
    assert found.mean(1) == pytest.approx(losses, rel=1e-5)
    for name in mine:
        assert torch.allclose(mine[name], theirs[name], atol=1e-5), name
        assert not mine[name].requires_grad or name not in names
        assert mine[name].grad is None
    assert not server.model.training and not server.full.training


def test_the_loss_of_a_layer_is_the_mean_over_layers_with_the_regulariser(tmp_path: Path) -> None:
    fm = tiny_fm(layers=4)
    server = FedPFT(r=5, distil_steps=0).server(fm, public_rows(), context(tmp_path))
    assert isinstance(server, FedPFTServer)
    assert server.compressed == [1, 2]
    teacher = [torch.full((1, 1, 2), float(i + 1)) for i in range(4)]
    student = [torch.full((1, 1, 2), 2.0 * (i + 1) + i) for i in range(4)]
    # Layer 1: (5 - 2)² / 2²; layer 2: (8 - 3)² / 3².
    hidden = (9 / 4 + 25 / 9) / 2
    assert server.loss([1, 2], 0.0)(teacher, student, None).item() == pytest.approx(hidden)
    product, full = layerwise.ffn_product, Parts(server.full)
    weights = [layerwise.weight_loss(product(full, i), product(server.parts, i)).item() for i in (1, 2)]
    assert server.loss([1, 2], 0.5)(teacher, student, None).item() == pytest.approx(hidden + 0.5 * sum(weights) / 2)


def test_layers_and_neurons_that_a_sub_fm_keeps() -> None:
    assert FedPFT().widths([8, 12, 16, 20]) == (8, 3, 4, 20)
    assert FedPFT(r=5).widths([8, 12, 16, 20]) == (8, 5, 5, 20)
    assert FedPFT(layers_retained=(-1, 1, 1)).retained(4) == (1, 3)
    assert FedPFT(layers_retained=(-4,)).retained(4) == (0,)
    assert FedPFT(r=8).narrow(8) == 8
    for layer in (4, -5):
        with pytest.raises(FedbenchError, match=f"layer {layer}, but the FM has layers 0 to 3"):
            FedPFT(layers_retained=(layer,)).retained(4)


def test_a_round_that_aligns_asks_for_statistics_and_averages_them_over_tokens(tmp_path: Path) -> None:
    server = fedpft(tmp_path, rounds=4, t=2)
    [layer] = server.compressed
    assert [sorted(server.expected(r, 0)) for r in range(3)] == [["adapter"], ["adapter", "statistics"], ["adapter"]]
    assert server.expected(1, 0)["statistics"] == {f"zeros.{layer}": TensorSpec((5,), torch.int64)}
    assert [server.adapter_meta(r)["count_zeros"] for r in range(3)] == ["", str(layer), ""]
    adapter = Message("adapter", server.values, {"num_examples": 2})

    def counted(zeros: list[int], tokens: int) -> list[Message]:
        return [adapter, Message("statistics", {f"zeros.{layer}": torch.tensor(zeros)}, {"tokens": tokens})]

    uploads = {1: counted([0, 1, 2, 3, 4], 4), 2: counted([6, 0, 0, 0, 3], 6)}
    for messages in uploads.values():
        server.accept(1, messages)  # none and all are possible
    server.aggregate(0, uploads)
    assert not server.apoz
    server.aggregate(1, uploads)
    assert server.apoz[layer].tolist() == [0.6, 0.1, 0.2, 0.3, 0.7]
    assert server.rank(1, layer).tolist() == server.apoz[layer].tolist()
    server.align(0)
    assert (server.version, bool(server.apoz)) == (0, True), "nothing is changed in a round that does not align"
    server.align(1)
    assert (server.version, bool(server.apoz)) == (1, False)
    server.align(1)
    assert server.version == 1, "without statistics there is nothing to go by"


def test_a_server_goes_on_from_its_state(tmp_path: Path) -> None:
    one, other = fedpft(tmp_path, rounds=10, p=0.4), fedpft(tmp_path, rounds=10, p=0.4)
    one.broadcast(0, [1, 2])
    one.values = {n: v + 1 for n, v in one.values.items()}
    _align(one, 0, torch.tensor([0.9, 0.8, 0.1, 0.1, 0.1]))
    one.broadcast(1, [1])
    other.restore(one.state())
    assert (other.held, other.version) == (one.held, one.version) == ({1: 1, 2: 0}, 1)
    for mine, theirs in ((other.values, one.values), (frozen_state(other.model), frozen_state(one.model))):
        assert all(torch.equal(mine[n], theirs[n]) for n in theirs)
    [a, b] = (server.broadcast(2, [2])[2][0] for server in (one, other))
    assert (a.kind, a.meta) == (b.kind, b.meta) == ("alignment", a.meta)
    assert all(torch.equal(a.tensors[n], b.tensors[n]) for n in a.tensors)


@pytest.mark.parametrize(("decay", "rates"), [("linear", [1.0, 0.75, 0.25]), ("none", [1.0, 1.0, 1.0])])
def test_the_learning_rate_of_a_round(tmp_path: Path, decay: str, rates: list[float]) -> None:
    method = FedAvgLora(lr=1.0, lr_decay=decay)  # type: ignore[arg-type]
    assert [method.learning_rate(round, 4) for round in (0, 1, 3)] == rates
    server = method.server(tiny_fm(), None, context(tmp_path, rounds=4))
    assert [server.broadcast(round, [0])[0][-1].meta["lr"] for round in (0, 1, 3)] == rates


@pytest.mark.parametrize(("name", "most"), [("num_examples", 2**31 - 1), ("tokens", 2**53)])
def test_a_count_is_a_whole_number_from_1_to_the_most_there_can_be(name: str, most: int) -> None:
    for value in (1, most):
        assert count(Message("adapter", {}, {name: value}), name) == value
    for value in (0, most + 1, True, 2.0):
        with pytest.raises(MessageError, match=f"adapter: {name} is not a whole number from 1 to {most}"):
            count(Message("adapter", {}, {name: value}), name)


def test_a_client_trains_what_it_was_sent_as_it_was_told(tmp_path: Path) -> None:
    method = FedAvgLora(lr=0.25, weight_decay=0.125, clip_norm=0.5)
    server = method.server(tiny_fm(), None, context(tmp_path))
    ctx = ClientContext(3, Streams(0, "unit"), server.ctx.federation, ModuleCache(CPU))  # type: ignore[attr-defined]
    client, rows = method.client(ctx), train_rows(6)
    sub_fm, adapter = server.broadcast(0, [3])[3]
    with pytest.raises(ValueError, match="client 3 was asked to train before it was sent a model and an adapter"):
        client.task(0, [adapter], rows)
    with pytest.raises(ValueError, match="client 3 was asked to train before"):
        client.task(0, [sub_fm], rows)
    with pytest.raises(ValueError, match="a client of fedavg-lora cannot read a message of kind 'statistics'"):
        client.task(0, [Message("statistics", {}), adapter], rows)
    task = client.task(1, [sub_fm, adapter], rows)
    assert (task.optimiser, task.clip_norm) == (AdamW(lr=0.25, weight_decay=0.125), 0.5)
    assert (task.loss, task.row_losses) == (None, CLASSIFICATION.losses)
    assert task.data is rows
    assert task.tunables is adapter.tensors
    assert (task.seed, [b.tolist() for b in task.batches]) == (ctx.seed(1), [b.tolist() for b in ctx.batches(1, 6)])
    result = execute(task, Execution())
    [message] = client.upload(1, result)
    assert (message.kind, message.meta, message.tensors) == ("adapter", {"num_examples": 6}, result.tunables)
    again = method.client(ctx)
    again.restore(client.state())
    assert again.task(2, [adapter], rows).frozen.module is task.frozen.module, "it keeps the model"
    fresh = method.client(ctx)
    fresh.restore(method.client(ctx).state())
    with pytest.raises(ValueError, match="before it was sent a model"):
        fresh.task(0, [adapter], rows)


def test_a_model_is_sent_once_and_again_only_to_those_who_lack_it(tmp_path: Path) -> None:
    server = FedAvgLora().server(tiny_fm(), None, context(tmp_path))
    kinds = [
        {c: [m.kind for m in messages] for c, messages in server.broadcast(round, cohort).items()}
        for round, cohort in enumerate(([1, 2], [2, 3]))
    ]
    assert kinds == [{1: ["fm", "adapter"], 2: ["fm", "adapter"]}, {2: ["adapter"], 3: ["fm", "adapter"]}]
    outbox = server.broadcast(2, [4, 5])
    assert outbox[4][0] is outbox[5][0], "one message for all"
    server.version = 1  # type: ignore[attr-defined]
    with pytest.raises(NotImplementedError, match="fedavg-lora changed its model but cannot say how"):
        server.broadcast(3, [1])


def test_fedots_emulator_is_distilled_towards_the_layers_it_stands_for(tmp_path: Path) -> None:
    fm, rows = tiny_fm(layers=4), public_rows()
    settings = {"distil_steps": 30, "distil_batch": 8, "distil_lr": 3e-3}
    server = FedOT(**settings).server(fm, rows, context(tmp_path))
    assert isinstance(server, FedOTServer)
    plain = FedOT(distil_steps=0).server(fm, rows, context(tmp_path))
    [residual] = server.residuals()
    # 1-1-1 of four layers: the emulator's output stands for that of the FM's layer 2.
    assert residual["layer"] == 2
    assert residual["hidden"] < 0.9 * residual["hidden_before"]
    [before] = plain.residuals()
    assert before["hidden"] == before["hidden_before"] == residual["hidden_before"]
    changed = {
        name.removeprefix(server.parts.layer_path(1))
        for name, tensor in frozen_state(server.model).items()
        if not torch.equal(tensor, frozen_state(plain.put_in_proxy())[name])  # type: ignore[arg-type]
    }
    assert changed
    assert all(name.startswith(".") for name in changed), "of the emulator alone"
    assert server.notes() == []


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"emulator": 3}, "fedot: 1-3-1 does not fit an FM of 4 layers; set emulator between 1 and 2, or front"),
        ({"front": 2, "back": 2}, "fedot: 2-1-2 does not fit an FM of 4 layers; set emulator between 1 and 1"),
        ({"front": 3, "back": 3, "emulator": "fedpft"}, "fedot: 3-1-3 does not fit an FM of 4 layers"),
    ],
)
def test_fedot_names_a_shape_that_does_not_fit(tmp_path: Path, settings: dict[str, object], says: str) -> None:
    with pytest.raises(FedbenchError, match=says):
        FedOT(distil_steps=0, **settings).server(tiny_fm(layers=4), public_rows(), context(tmp_path))


@pytest.mark.parametrize(("emulator", "origin"), [(None, [0, 1, 4, 5]), (4, [0, 1, 2, 3, 4, 5]), (1, [0, 2, 5])])
def test_half_the_middle_is_kept_unless_told(tmp_path: Path, emulator: int | None, origin: list[int]) -> None:
    server = FedOT(distil_steps=0, emulator=emulator).server(tiny_fm(layers=6), public_rows(), context(tmp_path))
    assert isinstance(server, FedOTServer)
    assert server.origin == origin


def test_a_proxy_method_without_public_rows_says_what_is_missing(tmp_path: Path) -> None:
    for method in (FedPFT(), FedOT()):
        with pytest.raises(
            FedbenchError, match=rf"{method.name} distils on public data; give the scenario a \[public\]"
        ):
            method.server(tiny_fm(), None, context(tmp_path))


def test_a_rows_loss_is_its_own() -> None:
    logits, labels = torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1])
    assert cross_entropy(logits, labels).tolist() == pytest.approx([np.log(2), np.log(1 + np.e)])


def test_statistics_of_several_layers_are_counted_asked_for_and_averaged(tmp_path: Path) -> None:
    server = FedPFT(r=5, distil_steps=0, t=1).server(tiny_fm(layers=4), public_rows(), context(tmp_path))
    assert isinstance(server, FedPFTServer)
    client = server.method.client(ClientContext(0, Streams(0, "unit"), server.ctx.federation, ModuleCache(CPU)))
    rows = train_rows(6)

    def sent(round: int) -> list[Message]:
        return [deserialise(serialise(message)) for message in server.broadcast(round, [0])[0]]

    task = client.task(0, sent(0), rows)
    parts = Parts(task.frozen.module)
    assert set(task.observers) == {parts.ffn_activation_path(i) for i in (1, 2)}
    result = execute(task, Execution())
    adapter, statistics = client.upload(0, result)
    assert (adapter.kind, adapter.tensors) == ("adapter", result.tunables)
    assert (statistics.kind, statistics.meta) == ("statistics", {"tokens": result.observed_tokens})
    assert {n: TensorSpec.of(t) for n, t in statistics.tensors.items()} == server.expected(0, 0)["statistics"]
    server.accept(0, [adapter, statistics])
    server.aggregate(0, {0: [adapter, statistics]})
    for layer in (1, 2):
        counted = result.observed[parts.ffn_activation_path(layer)]
        assert torch.equal(server.apoz[layer], counted.double() / result.observed_tokens)
    server.align(0)
    update = server.update_since(0)
    assert {n.partition(".")[0] for n in update.tensors} == {"1", "2"}
    again = client.task(1, sent(1), rows)
    for name, tensor in frozen_state(server.model).items():
        assert torch.equal(frozen_state(again.frozen.module)[name], tensor), name


@pytest.mark.parametrize("choice", ["highest", "lowest"])
def test_neurons_are_ranked_by_how_often_they_are_zero(tmp_path: Path, choice: str) -> None:
    server = fedpft(tmp_path, p=0.4, choice=choice)
    [layer] = server.compressed
    server.apoz = {layer: torch.tensor([0.1, 0.9, 0.2, 0.8, 0.3])}
    assert server.neurons(0, layer).tolist() == ([1, 3] if choice == "highest" else [0, 2])


def test_a_distillation_is_the_same_to_the_bit_with_any_number_of_workers(tmp_path: Path) -> None:
    found = []
    for workers in (1, 2, 5):
        ctx = replace(context(tmp_path / str(workers)), execution=Execution(workers=workers))
        server = FedPFT(r=5, mu=0.5, distil_steps=3, distil_batch=7).server(tiny_fm(), public_rows(), ctx)
        found.append((frozen_state(server.model), server.residuals()))
    for state, residuals in found[1:]:
        assert residuals == found[0][1]
        assert all(torch.equal(tensor, found[0][0][name]) for name, tensor in state.items())


def test_a_distillation_that_diverges_says_so(tmp_path: Path) -> None:
    with pytest.raises(FedbenchError, match=r"distillation diverged at step \d+ of 9; lower its rate"):
        fedpft(tmp_path, distil_steps=9, distil_lr=1e30)


def test_the_course_of_a_distillation_is_told_in_ten_means() -> None:
    assert d.curve(np.arange(25.0)) == pytest.approx([1, 4, 7, 10, 13, 15.5, 17.5, 19.5, 21.5, 23.5])
    assert d.curve(np.array([3.0, 1.0])) == [3, 1]
    assert d.curve(np.zeros(0)) == []


def test_batches_of_distillation_come_from_its_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[float] = []

    def draw(*arguments: Any) -> np.ndarray:
        drawn.append(arguments[6].random())
        return np.zeros((1, 1))

    monkeypatch.setattr(d, "distil", draw)
    for seed in (0, 1):
        ctx = replace(context(tmp_path), streams=Streams(seed, "unit"))
        FedPFT(r=5, distil_steps=1).server(tiny_fm(), public_rows(), ctx)
        FedPFT(r=5, distil_steps=0).server(tiny_fm(), public_rows(), ctx)
    assert drawn == [Streams(seed, "unit").numpy("distillation").random() for seed in (0, 1)]
    assert len(list((tmp_path / "proxies").iterdir())) == 3, "without a step there is nothing to draw"


def test_a_random_choice_is_another_one_in_every_layer_and_round(tmp_path: Path) -> None:
    server = FedPFT(r=5, distil_steps=0, choice="random").server(tiny_fm(layers=4), public_rows(), context(tmp_path))
    assert isinstance(server, FedPFTServer)
    server.apoz = {1: torch.zeros(5), 2: torch.zeros(5)}
    places = [(0, 1), (0, 2), (1, 1)]
    found = [server.rank(*place).tolist() for place in places]
    assert found == [Streams(0, "unit").numpy("alignment-choice", *place).random(5).tolist() for place in places]
    assert len({tuple(each) for each in found}) == 3


def test_the_emulator_nearest_to_fedpft_by_hand(tmp_path: Path) -> None:
    # A layer of width 16 has 1,960 parameters and, at rank 1, 128 of LoRA. fedpft's six layers of that, four of them
    # short of 18 neurons of 33, are 10,152; FedOT's two with LoRA and n without are 4,176 and 1,960 n: n is 3.
    method = FedOT(emulator="fedpft", lora_r=1, distil_steps=0)
    server = method.server(tiny_fm(layers=6), public_rows(), context(tmp_path))
    assert isinstance(server, FedOTServer)
    assert len(server.origin) == 1 + 3 + 1
    assert server.notes() == ["fedot 1-3-1: 0.01 M parameters in a client's layers with LoRA, fedpft's 0.01 M"]
