"""Proxies of fewer layers: FedBiOT, CRaSh and FedSODA."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import PACKED, PADDED, context, logits, public_rows, random_values, tiny_fm, train_rows
from torch import Tensor

from fedbench.api.context import ClientContext
from fedbench.api.messages import Message
from fedbench.forward.feed import Forward, forward
from fedbench.methods._groups import centre, grouped, layer_states, similarities
from fedbench.methods._layers import uniform
from fedbench.methods._layerwise import LayerLoss, _Steps, answer_loss, hidden_loss
from fedbench.methods.crash import CRaSh
from fedbench.methods.fedbiot import FedBiOT, extracted
from fedbench.methods.fedbiot_official import FedBiOTOfficial
from fedbench.methods.fedsoda import FedSODA
from fedbench.models.build import build
from fedbench.models.cache import ModuleCache
from fedbench.models.parts import why_it_cannot_write
from fedbench.models.spec import LoraSpec, ModelSpec
from fedbench.models.weights import checkpoint_name, frozen_state, load_frozen, set_tensors, tunable_names
from fedbench.rng import Streams
from fedbench.training.alone import execute

CPU = torch.device("cpu")
FEW: dict[str, Any] = {"distil_steps": 2, "distil_batch": 8, "align_steps": 2, "lora_r": 2}
A, B = "x.lora_A.default.weight", "x.lora_B.default.weight"


def sides(method: Any, tmp_path: Path, layers: int = 5, clients: int = 2) -> tuple[Any, list[Any]]:
    ctx, modules = context(tmp_path), ModuleCache(CPU)
    made = [method.client(ClientContext(i, Streams(0, "unit"), ctx.federation, modules)) for i in range(clients)]
    return method.server(tiny_fm(layers), public_rows(), ctx), made


def upload(values: dict[str, Tensor], rows: int) -> list[Message]:
    return [Message("adapter", values, {"num_examples": rows})]


def aggregated(server: Any, round: int) -> None:
    """Two clients of 1 and 3 rows, who moved everything by 1 and by 5: by 4 on average."""
    start = server.values
    server.aggregate(
        round,
        {i: upload({n: v + add for n, v in start.items()}, rows) for i, (add, rows) in enumerate(((1.0, 1), (5.0, 3)))},
    )


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(t, b[n]) for n, t in a.items())


def copies(tensors: Any) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in tensors.items()}


# ---------------------------------------------------------------- which layers, and what they are compared by


def test_fedbiot_extracts_layers_at_the_stride_of_its_code() -> None:
    assert extracted(range(10), 4) == [0, 3, 6, 9]
    assert (extracted(range(8), 4), uniform(range(8), 4)) == ([0, 2, 4, 7], [0, 2, 5, 7])
    assert extracted(range(3, 9), 1) == [3]


def test_cka_of_hand_made_representations() -> None:
    x, y = torch.tensor([[1.0], [-1.0], [0.0]]), torch.tensor([[1.0], [0.0], [-1.0]])
    found = similarities([x, y, 3 * x + 7])
    # X'Y = 1, X'X = Y'Y = 2, of columns whose mean is 0.
    assert torch.allclose(found, torch.tensor([[1, 0.25, 1], [0.25, 1, 0.25], [1, 0.25, 1]], dtype=torch.float64))
    wide = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
    turned = wide @ torch.tensor([[0.6, 0.8], [-0.8, 0.6]])
    assert float(similarities([wide, turned])[0, 1]) == pytest.approx(1.0), "a rotation changes nothing"


def test_neighbours_are_grouped_by_mean_similarity_and_the_centre_stays() -> None:
    alike = torch.tensor([[1, 0.9, 0.2, 0.9], [0.9, 1, 0.3, 0.1], [0.2, 0.3, 1, 0.8], [0.9, 0.1, 0.8, 1]])
    assert grouped(alike, 4) == [[0], [1], [2], [3]]
    assert grouped(alike, 3) == [[0, 1], [2], [3]], "0 and 3 are alike, but no neighbours"
    assert grouped(alike, 2) == [[0, 1], [2, 3]]
    assert centre(alike, [0, 1, 2]) == 1
    assert centre(alike, [2, 3]) == 2, "of equals the earliest"


# ---------------------------------------------------------------- the loss of answers


def test_the_divergence_of_answers_is_summed_over_rows() -> None:
    teacher, student = torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    p, q = teacher.softmax(1), student.softmax(1)
    assert float(answer_loss(teacher, student)) == pytest.approx(float((p * (p / q).log()).sum()))
    assert float(answer_loss(teacher, teacher)) == 0.0


@pytest.mark.parametrize("execution", [PACKED, PADDED])
def test_one_pass_gives_layers_and_answers(execution: Any) -> None:
    model = tiny_fm().build(LoraSpec(2, 4), CPU)
    set_tensors(model, random_values(model))
    batch = train_rows(6).batch(np.arange(6), CPU)
    with torch.no_grad(), forward(model, execution) as passing:
        (states, mask), (again, same_mask, answers) = (
            passing.layer_outputs(batch),
            passing.layer_outputs_and_logits(batch),
        )
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(states, again, strict=True))
        assert mask is not None and same_mask is not None and torch.equal(mask, same_mask)
        assert torch.allclose(answers, passing.logits(batch), atol=1e-6)


def test_a_step_of_distillation_follows_hidden_states_and_answers() -> None:
    teacher, student = (tiny_fm().build(LoraSpec(2, 4), CPU) for _ in range(2))
    set_tensors(teacher, random_values(teacher))
    set_tensors(student, {n: 0.5 * t for n, t in random_values(student).items()})
    names = [n for n in tunable_names(student) if ".layer.0." in n]
    parameters = [student.get_parameter(n).requires_grad_() for n in names]
    public, pieces = public_rows(), [[np.array([0, 1, 2]), np.array([3, 4])]]
    steps = _Steps(parameters, LayerLoss([(1, 1)], answers=0.9), public, pieces, PACKED)
    with forward(teacher, PACKED) as theirs, forward(student, PACKED, gradients=True) as ours:
        work = steps.work(theirs, ours)
        for step in (-1, 0):
            work(0, step)
    steps.put_gradients()
    found = [p.grad.clone() for p in parameters if p.grad is not None]
    batch = public.batch(np.arange(5), CPU)
    with torch.no_grad():
        target, mask, answers = Forward(teacher, False).layer_outputs_and_logits(batch)
    states, _, mine = Forward(student, False).layer_outputs_and_logits(batch)
    loss = hidden_loss(target[1], states[1], mask) + 0.9 * answer_loss(answers, mine) / 5
    expected = torch.autograd.grad(loss, parameters)
    assert all(torch.allclose(a, b, atol=1e-5, rtol=1e-3) for a, b in zip(found, expected, strict=True))
    assert float(steps.hidden.sum()) == pytest.approx(float(hidden_loss(target[1], states[1], mask)), rel=1e-4)


# ---------------------------------------------------------------- FedBiOT


def test_the_pull_is_of_what_adapters_add_to_their_weights() -> None:
    method = FedBiOT(mu=0.5, lora_r=2, lora_alpha=4)
    now = {A: torch.tensor([[1.0, -1.0]]), B: torch.tensor([[1.0], [2.0], [0.0]]).requires_grad_()}
    then = {A: torch.tensor([[2.0, 0.0]]), B: torch.tensor([[0.0], [1.0], [1.0]])}
    # B A - B0 A0 = [[1, -1], [0, -2], [-2, 0]]; its squares sum to 10, the scale 4 / 2 is squared.
    pull = method.pull(now, then)
    assert float(pull) == 0.5 * 4 * 10
    [grad] = torch.autograd.grad(pull, [now[B]])
    # 2 mu s² (B A - B0 A0) A'
    assert torch.equal(grad, 4 * torch.tensor([[2.0], [2.0], [-2.0]]))


def test_the_released_codes_pull_has_a_value_and_no_gradient(tmp_path: Path) -> None:
    official = FedBiOTOfficial(mu=0.5, lora_r=2, lora_alpha=4)
    now, then = (
        {A: torch.ones(1, 2), B: torch.ones(3, 1).requires_grad_()},
        {A: torch.zeros(1, 2), B: torch.zeros(3, 1)},
    )
    assert float(official.pull(now, then)) == 0.5 * 4 * 6 and not official.pull(now, then).requires_grad
    assert FedBiOTOfficial(mu=0.5, lora_r=2, lora_alpha=4, inert_pull=False).pull(now, then).requires_grad

    def trained(method: FedBiOT) -> dict[str, Tensor]:
        server, (client, _) = sides(method, tmp_path)
        server.values = {n: v + 0.1 for n, v in server.values.items()}
        task = client.task(0, server.broadcast(0, [0])[0], train_rows(12))
        return dict(execute(task, PACKED).tunables)

    without = trained(FedBiOT(mu=0, **FEW))
    assert same(trained(FedBiOTOfficial(mu=30, **FEW)), without)
    held = trained(FedBiOTOfficial(mu=30, inert_pull=False, **FEW))
    assert not same(held, without)
    assert same(held, trained(FedBiOT(mu=30, **FEW)))


def test_fedbiots_adapter_is_the_last_layers_and_goes_back_there(tmp_path: Path) -> None:
    server, _ = sides(FedBiOT(emulator=2, **FEW), tmp_path)
    assert (server.origin, list(server.emulated)) == ([0, 2, 3, 4], [0, 1])
    assert server.pairs() == [(2, 1)]
    assert sides(FedBiOT(emulator=2, layerwise=True, **FEW), tmp_path)[0].pairs() == [(1, 0), (2, 1)]
    start = dict(server.values)
    assert {n.split(".")[3] for n in start if "layer" in n} == {"2", "3"}
    aggregated(server, 0)
    own = dict(server.put_in_fm().named_parameters())
    for name, value in start.items():
        theirs = name.replace("layer.2.", "layer.3.") if "layer.2." in name else name.replace("layer.3.", "layer.4.")
        assert torch.allclose(own[theirs], value + 4.0), name
    assert not any(
        bool(own[n].count_nonzero()) for n in own if ".lora_B." in n and any(f"layer.{i}." in n for i in (0, 1, 2))
    )


def test_an_alignment_moves_the_emulators_lora_alone_and_clients_are_sent_it(tmp_path: Path) -> None:
    server, (early, late) = sides(FedBiOT(emulator=2, **FEW), tmp_path)
    early.task(0, server.broadcast(0, [0])[0], train_rows(8))
    aggregated(server, 0)
    frozen, fixed, values = copies(frozen_state(server.model)), copies(server.fixed), copies(server.values)
    assert set(fixed) == {
        n for n in tunable_names(server.model) if ".lora_" in n and any(f"layer.{i}." in n for i in (0, 1))
    }
    assert server.aligns(0) and not server.aligns(3), "after the last round it could help nobody"
    server.align(0)
    assert same(copies(frozen_state(server.model)), frozen) and same(copies(server.values), values)
    assert not any(torch.equal(t, fixed[n]) for n, t in server.fixed.items())
    inbox, whole = (server.broadcast(1, [i])[i] for i in (0, 1))
    assert ([m.kind for m in inbox], [m.kind for m in whole]) == (["alignment", "adapter"], ["sub_fm", "adapter"])
    for client, messages in ((early, inbox), (late, whole)):
        task = client.task(1, messages, train_rows(8))
        assert same(dict(task.fixed), server.fixed) and set(task.tunables) == set(server.values)
    again, (restored, _) = sides(FedBiOT(emulator=2, **FEW), tmp_path)
    again.restore(server.state())
    batch = train_rows(5).batch(np.arange(5), CPU)
    assert torch.equal(logits(again.put_in_proxy(), batch), logits(server.put_in_proxy(), batch))
    restored.restore(early.state())
    assert same(restored.fixed, server.fixed)


# ---------------------------------------------------------------- CRaSh


@pytest.mark.parametrize("packed", [True, False])
def test_a_layer_that_is_run_again_is_a_deeper_model_of_its_copies(packed: bool) -> None:
    spec = tiny_fm().spec.with_lora(LoraSpec(2, 4, layers=(0, 2)))
    shared = replace(spec, repeats=(1, 3, 1))
    assert ModelSpec.from_json(shared.to_json()) == shared and "repeats" not in spec.to_json()
    model = tiny_fm().tuned(shared, CPU)
    values = random_values(model)
    set_tensors(model, values)
    deep_spec = tiny_fm().spec.with_layers([0, 1, 1, 1, 2]).with_lora(LoraSpec(2, 4, layers=(0, 4)))
    deep = build(deep_spec)
    place = {0: 0, 1: 1, 2: 1, 3: 1, 4: 2}

    def source(name: str) -> str:
        for mine, theirs in place.items():
            if f".layer.{mine}." in name:
                return name.replace(f".layer.{mine}.", f".layer.{theirs}.")
        return name

    load_frozen(deep, {n: tiny_fm().state[source(n)] for n in frozen_state(deep)})
    set_tensors(deep, {n: values[source(n)] for n in tunable_names(deep)})
    batch = train_rows(6).batch(np.arange(6), CPU)
    with torch.no_grad(), forward(model, PACKED if packed else PADDED) as passing:
        assert torch.allclose(passing.logits(batch), logits(deep, batch, packed=False), atol=1e-5)
        states = passing.layer_outputs(batch)[0]
        assert len(states) == 3, "a layer that is run again is one layer, and its output that of the last time"
    assert why_it_cannot_write(model) == "it runs layers again" and why_it_cannot_write(deep) is None
    once = tiny_fm().tuned(spec, CPU)
    set_tensors(once, values)
    assert not torch.allclose(logits(once, batch), logits(deep, batch), atol=1e-2)


def test_crash_shares_the_layers_that_stay_and_trains_nothing(tmp_path: Path) -> None:
    server, (client, _) = sides(CRaSh(emulator=2, lora_r=2), tmp_path, layers=6)
    alike = similarities(layer_states(server.full, range(1, 5), public_rows(), PACKED))
    groups = [[i + 1 for i in group] for group in grouped(alike, 2)]
    assert server.groups == groups and [i for group in groups for i in group] == [1, 2, 3, 4]
    assert (
        server.origin[0] == 0
        and server.origin[-1] == 5
        and all(i in g for i, g in zip(server.origin[1:3], groups, strict=True))
    )
    assert server.spec.repeats == (1, len(groups[0]), len(groups[1]), 1)
    whole, sources = frozen_state(server.full), server.fm_sources()
    assert all(torch.equal(t, whole[sources[n].name]) for n, t in frozen_state(server.model).items())
    assert server.stands_for(server.emulated[-1]) == 4
    assert sides(CRaSh(emulator=2, share=False), tmp_path, layers=6)[0].spec.repeats is None
    inbox = server.broadcast(0, [0])[0]
    task = client.task(0, inbox, train_rows(8))
    assert ModelSpec.from_json(str(inbox[0].meta["spec"])).repeats == server.spec.repeats
    batch = train_rows(5).batch(np.arange(5), CPU)
    set_tensors(task.frozen.module, task.tunables)
    assert torch.allclose(logits(task.frozen.module, batch), logits(server.put_in_proxy(), batch), atol=1e-6)


# ---------------------------------------------------------------- FedSODA


def test_fedsoda_tunes_all_layers_that_stay_and_puts_them_back_where_they_were(tmp_path: Path) -> None:
    server, _ = sides(FedSODA(emulator=2, **FEW), tmp_path, layers=6)
    start = dict(server.values)
    assert {n.split(".")[3] for n in start if "layer" in n} == {"0", "1", "2", "3"}
    aggregated(server, 0)
    own = dict(server.put_in_fm().named_parameters())
    for name, value in start.items():
        layer = server.parts.layer_of(name)
        theirs = name if layer is None else name.replace(f".layer.{layer}.", f".layer.{server.origin[layer]}.")
        assert torch.allclose(own[theirs], value + 4.0), name


def test_fedsoda_aligns_the_ffns_that_stand_for_several_and_sends_them(tmp_path: Path) -> None:
    server, (early, late) = sides(FedSODA(emulator=2, t=2, **FEW), tmp_path, layers=6)
    assert server.several, "four layers in two groups"
    assert server.pairs() == [(server.groups[i - 1][-1], i) for i in server.several]
    early.task(0, server.broadcast(0, [0])[0], train_rows(8))
    aggregated(server, 0)
    assert [server.aligns(round) for round in range(4)] == [False, True, False, False]
    before = copies(frozen_state(server.model))
    server.align(1)
    changed = {n for n, t in frozen_state(server.model).items() if not torch.equal(t, before[n])}
    parts = ("intermediate.dense.", ".output.dense.", ".output.LayerNorm.")
    expected = {
        n
        for n in before
        if any(f".layer.{i}." in n for i in server.several) and ".attention." not in n and any(p in n for p in parts)
    }
    assert changed == expected == set(server.update_since(0).tensors)
    for client, i in ((early, 0), (late, 1)):
        client.task(2, server.broadcast(2, [i])[i], train_rows(8))
        assert same(client.frozen, copies(frozen_state(server.model)))
    again, _ = sides(FedSODA(emulator=2, t=2, **FEW), tmp_path, layers=6)
    again.restore(server.state())
    assert same(copies(frozen_state(again.model)), copies(frozen_state(server.model)))


@pytest.mark.parametrize("method", [FedBiOT(**FEW), CRaSh(lora_r=2), FedSODA(**FEW)])
def test_by_default_a_client_holds_about_what_it_does_in_fedpft(method: Any, tmp_path: Path) -> None:
    server, _ = sides(method, tmp_path, layers=6)
    [note] = server.notes()
    assert (
        note.startswith(f"{method.name} {method.front}-{len(server.emulated)}-{method.back}: ") and "fedpft's" in note
    )


def test_fedsodas_alignment_is_of_the_same_weights_where_ffns_have_adapters_too(tmp_path: Path) -> None:
    plain, adapted = (
        sides(FedSODA(emulator=2, lora_targets=targets, **FEW), tmp_path, layers=6)[0]
        for targets in ("attention", "all")
    )
    assert [checkpoint_name(n) for n in adapted.trained()] == [checkpoint_name(n) for n in plain.trained()]
    assert any(".base_layer." in n for n in adapted.trained())
