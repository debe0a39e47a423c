"""Closed forms of the methods: averages, saliency, distillation loss, APoZ, W_fro, plug-in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import context, public_rows, tiny_fm, train_rows

from fedbench.api import AdamW, LocalTask, Message
from fedbench.context import ClientContext
from fedbench.errors import FedbenchError, MessageError
from fedbench.files import load_tensors
from fedbench.gradient import gradient_error, gradients
from fedbench.methods import _distillation as d
from fedbench.methods.fedavg_lora import FedAvgLora, cross_entropy, weighted_mean
from fedbench.methods.fedot import FedOT, FedOTServer, uniform
from fedbench.methods.fedpft import FedPFT, FedPFTServer, highest, zeros
from fedbench.models import ModuleCache, Parts, frozen_state, get_tensors, tunable_names
from fedbench.rng import Streams
from fedbench.training import execute
from fedbench.transport import deserialise, serialise

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
    names = server.expected(0)["adapter"]
    uploads = {
        cid: [Message("adapter", {n: torch.full(s.shape, float(cid)) for n, s in names.items()}, {"num_examples": k})]
        for cid, k in ((9, 1), (2, 3))
    }
    server.aggregate(0, uploads)
    tuned = get_tensors(server.plug_in(), list(names))
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
    assert d.hidden_loss(teacher, student, mask).item() == pytest.approx(((1 + 4) / 2) / ((1 + 4) / 2))


def test_distillation_loss_has_the_gradient_of_finite_differences(tmp_path: Path) -> None:
    server = fedpft(tmp_path)
    server.full.double(), server.model.double()
    batch = public_rows().batch(np.arange(3), CPU)
    loss = server.loss(server.compressed, 0.01)
    with torch.no_grad():
        teacher, _ = d.layer_outputs(server.full, batch)
    name = f"{server.parts.ffn_in_path(1)}.weight"
    weight = dict(server.model.named_parameters())[name]
    weight.requires_grad_(True)

    def value() -> torch.Tensor:
        return loss(teacher, *d.layer_outputs(server.model, batch))

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
    d.weight_loss(teacher, student).backward()
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
    result = execute(task, CPU)
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
    proxy, fm = server.proxy(), server.plug_in()
    with torch.no_grad():
        assert torch.equal(proxy(**batch.inputs).logits, fm(**batch.inputs).logits)
    names = tunable_names(fm)
    parts = Parts(fm)
    mine, theirs = (gradients(m, names, train_rows(8), CPU) for m in (proxy, fm))
    block = gradient_error(mine, theirs, parts.layer_of, parts.is_head)
    assert block["zero_filled"]["error"] <= 1e-6 and block["restricted"]["cosine"] == pytest.approx(1.0)


def test_plug_in_of_an_untrained_adapter_leaves_the_logits_unchanged(tmp_path: Path) -> None:
    fm = tiny_fm()
    batch = train_rows(5).batch(np.arange(5), CPU)
    for server in (fedpft(tmp_path), FedOT(distil_steps=0).server(fm, public_rows(), context(tmp_path))):
        tuned = server.plug_in()
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
    assert residual["hidden"] < 0.7 * residual["hidden_before"]
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
    tuned = get_tensors(server.plug_in(), tunable_names(server.full))
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
