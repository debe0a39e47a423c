"""Variants of FedPFT and FedOT: what each departure of the released code does, the ablations, the matched budget."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import context, layer_outputs, public_rows, save_tiny, save_tiny_bert, smoke_request, tiny_fm, train_rows

from fedbench.api.context import ClientContext
from fedbench.api.local import LocalTask
from fedbench.api.messages import Message
from fedbench.api.sides import Method
from fedbench.data.examples import Examples
from fedbench.errors import FedbenchError
from fedbench.machine.device import Execution
from fedbench.methods import fedpft
from fedbench.methods.fedot import FedOT, FedOTServer
from fedbench.methods.fedpft import FedPFT, FedPFTServer, highest
from fedbench.methods.fedpft_b import FedPFTB
from fedbench.methods.fedpft_d import FedPFTD
from fedbench.methods.fedpft_n import FedPFTN
from fedbench.methods.fedpft_official import FedPFTOfficial, FedPFTOfficialServer
from fedbench.models.cache import ModuleCache
from fedbench.models.foundation import FoundationModel
from fedbench.models.parts import Parts
from fedbench.models.spec import ModelSpec
from fedbench.models.weights import frozen_state, get_tensors
from fedbench.models.zoo.load import load_fm
from fedbench.records.record import Record
from fedbench.registry import Registry
from fedbench.rng import Streams
from fedbench.run.prepare import make_method, prepare, scenario_settings
from fedbench.run.request import RunRequest
from fedbench.run.run import run
from fedbench.scenario.load import load_scenario
from fedbench.training.alone import execute

CPU = torch.device("cpu")
R = 5
OFF = {
    "detached_regulariser": False,
    "zero_rule": "non-positive",
    "count_padding": False,
    "shuffle_neurons": False,
    "last_client_student": False,
    "stale_teacher": False,
    "weighting": "samples",
    "lr_off_by_one": False,
    "cut_retained": False,
    "output_only": False,
}
"""The paper's side of every departure."""


@cache
def tiny_vit() -> FoundationModel:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return load_fm(str(save_tiny("vit", Path(folder) / "vit")), 3, Path(folder))


def image_rows(n: int = 12) -> Examples:
    rng = np.random.default_rng(3)
    pixels = torch.tensor(rng.normal(size=(n, 3, 8, 8)), dtype=torch.float32)
    return Examples(torch.tensor(rng.integers(0, 3, n)), pixels=pixels)


def official(tmp_path: Path, only: str = "", evaluate_every: int = 1, **settings: object) -> FedPFTOfficialServer:
    """A server with one departure on and all others off; with all as they are for `only` = ""."""
    switches = {name: value for name, value in OFF.items() if name != only} if only else {}
    method = FedPFTOfficial(**({"r": R, "distil_steps": 0, "t": 1, "align_steps": 2} | switches | settings))
    server = method.server(tiny_fm(), public_rows(), context(tmp_path, 6, evaluate_every))
    assert isinstance(server, FedPFTOfficialServer)
    return server


def upload(server: FedPFTServer, value: float, examples: int, zeros: torch.Tensor | None = None) -> list[Message]:
    """An upload whose tunables all hold `value`."""
    adapter = {name: torch.full(spec.shape, value) for name, spec in server.expected(0, 0)["adapter"].items()}
    widths = {i: server.spec.ffn_widths[i] for i in server.aligned}
    counts = {f"zeros.{i}": torch.zeros(w, dtype=torch.int64) if zeros is None else zeros for i, w in widths.items()}
    return [
        Message("adapter", adapter, {"num_examples": examples}),
        Message("statistics", counts, {"tokens": 10}),
    ]


def one_value(model: torch.nn.Module, names: list[str]) -> float:
    """The value that all the named parameters hold."""
    [value] = {v for t in get_tensors(model, names).values() for v in t.unique().tolist()}
    return float(value)


# ---------------------------------------------------------------- departures of the released code


def test_every_departure_has_a_switch_and_is_on_by_default() -> None:
    own = set(FedPFTOfficial.model_fields) - set(FedPFT.model_fields) | {"zero_rule"}
    assert own == set(OFF)
    assert all(getattr(FedPFTOfficial(), name) != value for name, value in OFF.items())


def test_with_every_switch_off_official_is_fedpft(tmp_path: Path) -> None:
    fm = str(save_tiny_bert(tmp_path / "bert"))

    def made(method: str, settings: dict[str, str]) -> Record:
        request = RunRequest(method, "tweets-noniid", fm=fm, settings={"lr": "1e-2", "rounds": "4", **settings})
        changes = {"profile": "smoke", "device": "cpu", "results": tmp_path, "cache": tmp_path, "workers": 1}
        return run(prepare(RunRequest(**{**vars(request), **changes})))

    paper = made("fedpft", {})
    off = made("fedpft-official", {name: str(value).lower() for name, value in OFF.items()})
    on = made("fedpft-official", {})
    for block in ("rounds", "accuracy", "communication", "gradient_error", "distillation", "exposure"):
        assert getattr(off, block) == getattr(paper, block), block
    assert [r.loss for r in on.rounds] != [r.loss for r in paper.rounds]


@pytest.mark.parametrize("detached", [True, False])
def test_1_a_detached_regulariser_adds_no_gradient(tmp_path: Path, detached: bool) -> None:
    server = official(tmp_path, "detached_regulariser", detached_regulariser=detached)
    batch = public_rows().batch(np.arange(4))
    weight = server.parts.ffn_in(1).weight.requires_grad_(True)
    with torch.no_grad():
        teacher, _ = layer_outputs(server.full, batch)

    def gradient(mu: float) -> torch.Tensor:
        loss = server.loss(server.compressed, mu)(teacher, *layer_outputs(server.model, batch))
        return torch.autograd.grad(loss, [weight])[0]

    without, with_regulariser = gradient(0.0), gradient(1.0)
    assert without.abs().max() > 0
    assert torch.equal(without, with_regulariser) == detached


def test_2_exact_zeros_tie_nearly_all_neurons_where_the_papers_rule_tells_them_apart(tmp_path: Path) -> None:
    module, rows = tiny_fm().build(None, CPU), train_rows(12)
    path = Parts(module).ffn_activation_path(1)
    seen: list[torch.Tensor] = []
    handle = module.get_submodule(path).register_forward_hook(lambda _m, _i, out: seen.append(out.flatten(0, -2)))
    with torch.no_grad():
        module(**rows.batch(np.arange(12)).inputs)
    handle.remove()
    exact = fedpft.zeros(FedPFTOfficial().zero_rule, 0.0)(seen[0])
    paper = fedpft.zeros(FedPFT().zero_rule, 0.0)(seen[0])
    assert exact.eq(0).double().mean() > 0.9
    assert len(paper.unique()) > len(paper) / 2


@pytest.mark.parametrize("padding", [True, False])
def test_2_padding_is_counted(tmp_path: Path, padding: bool) -> None:
    server = official(tmp_path, "count_padding", count_padding=padding, zero_rule="non-positive")
    task = first_task(server, train_rows(6))
    assert len(set(task.data.lengths)) > 1
    result = execute(task, Execution())
    padded = sum(len(rows) * int(task.data.lengths[rows].max()) for rows in task.batches)
    assert result.observed_tokens == (padded if padding else int(task.data.lengths.sum()))
    # The observers' sums cover the same positions: a constant statistic counts them.
    task.observers = {path: lambda a: torch.ones_like(a).sum(0) for path in task.observers}
    assert {v for t in execute(task, Execution()).observed.values() for v in t.tolist()} == {result.observed_tokens}


def first_task(server: FedPFTServer, rows: Examples) -> LocalTask:
    """What client 1 declares in round 0, which is an alignment round."""
    client = server.method.client(ClientContext(1, Streams(0, "unit"), server.ctx.federation, ModuleCache(CPU)))
    return client.task(0, server.broadcast(0, [1])[1], rows)


@pytest.mark.parametrize("shuffle", [True, False])
def test_2_neurons_that_tie_are_chosen_at_random(tmp_path: Path, shuffle: bool) -> None:
    servers = [official(tmp_path / str(i), "shuffle_neurons", shuffle_neurons=shuffle, r=20) for i in range(2)]
    tied = torch.zeros(20)
    tied[19] = 1.0
    for server in servers:
        server.apoz = {1: tied}
    rounds = [servers[0].neurons(round, 1).tolist() for round in range(4)]
    assert rounds == [servers[1].neurons(round, 1).tolist() for round in range(4)], "by the seed, not by chance"
    assert all(len(chosen) == 10 and 19 in chosen and chosen == sorted(chosen) for chosen in rounds)
    assert (len(set(map(tuple, rounds))) > 1) == shuffle
    if not shuffle:
        assert rounds[0] == [*range(9), 19]


@pytest.mark.parametrize("last", [True, False])
def test_4_the_student_has_the_last_clients_tunables(tmp_path: Path, last: bool) -> None:
    server = official(tmp_path, "last_client_student", last_client_student=last)
    server.aggregate(0, {3: upload(server, 1.0, 1), 8: upload(server, 5.0, 3)})
    names = list(server.values)
    assert one_value(server.student(), names) == (5.0 if last else 4.0)
    assert one_value(server.teacher(), names) == 4.0
    assert one_value(server.put_in_proxy(), names) == 4.0, "measured is the aggregate in either case"


@pytest.mark.parametrize("stale", [True, False])
def test_5_the_teacher_is_refreshed_on_evaluation_rounds(tmp_path: Path, stale: bool) -> None:
    server = official(tmp_path, "stale_teacher", evaluate_every=2, stale_teacher=stale)
    names, seen = list(server.values), []
    for round in range(4):
        server.aggregate(round, {1: upload(server, round + 1.0, 1)})
        lora = get_tensors(server.teacher(), names)
        seen.append(next(float(t.mean()) for n, t in lora.items() if ".lora_B." in n))
    assert seen == ([0.0, 2.0, 2.0, 4.0] if stale else [1.0, 2.0, 3.0, 4.0])
    again = official(tmp_path, "stale_teacher", evaluate_every=2, stale_teacher=stale)
    server.aggregate(4, {1: upload(server, 9.0, 1)})
    again.restore(server.state())
    assert one_value(again.teacher(), names) == (4.0 if stale else 9.0), "a resumed run has the same teacher"
    assert one_value(again.put_in_fm(), names) == 9.0


@pytest.mark.parametrize(("weighting", "mean"), [("uniform", {3.0}), ("samples", {4.0}), ("mispaired", {2.0, 4.0})])
def test_7_8_weights_of_the_mean(tmp_path: Path, weighting: str, mean: set[float]) -> None:
    server = official(tmp_path, "weighting", weighting=weighting)
    found = set()
    for round in range(8):
        server.aggregate(round, {1: upload(server, 1.0, 1), 2: upload(server, 5.0, 3)})
        found.add(one_value(server.put_in_fm(), list(server.values)))
    assert found == mean


@pytest.mark.parametrize(
    ("rounds", "off_by_one", "factors"),
    [
        (5, True, [1.0, 0.6, 0.4, 0.2, 0.2]),
        (5, False, [1.0, 0.8, 0.6, 0.4, 0.2]),
        (2, True, [1.0, 1.0]),
        (1, True, [1.0]),
    ],
)
def test_7_8_the_decay_is_off_by_one_and_never_reaches_0(rounds: int, off_by_one: bool, factors: list[float]) -> None:
    method = FedPFTOfficial(lr=1.0, lr_off_by_one=off_by_one)
    assert [method.learning_rate(round, rounds) for round in range(rounds)] == pytest.approx(factors)


@pytest.mark.parametrize("cut", [True, False])
def test_8_alignment_cuts_the_retained_layers(tmp_path: Path, cut: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    server = official(tmp_path, "cut_retained", cut_retained=cut)
    beyond: list[float] = []

    def watched(teacher: torch.nn.Module, student: torch.nn.Module, *rest: object) -> None:
        beyond.extend(float(Parts(student).ffn_out(i).weight[:, R:].abs().max()) for i in (0, 2))
        distil(teacher, student, *rest)  # type: ignore[arg-type]

    distil = fedpft.distil
    monkeypatch.setattr(fedpft, "distil", watched)
    before = {name: t.clone() for name, t in frozen_state(server.model).items()}
    server.broadcast(0, [1])
    server.aggregate(0, {1: upload(server, 0.1, 1)})
    server.align(0)
    assert (beyond == [0.0, 0.0]) == cut, "while it runs, an aligned layer has its first r neurons only"
    after = frozen_state(server.model)
    moved = {server.parts.layer_of(name) for name in before if not torch.equal(before[name], after[name])}
    assert moved == ({0, 1, 2} if cut else {1})
    for i in (0, 2):
        up, down = f"{server.parts.ffn_in_path(i)}.weight", f"{server.parts.ffn_out_path(i)}.weight"
        assert after[up].shape == before[up].shape
        assert torch.equal(after[up][R:], before[up][R:]) and torch.equal(after[down][:, R:], before[down][:, R:])
    message = server.broadcast(1, [1])[1][0]
    indices = {name: t for name, t in message.tensors.items() if name.endswith(".index")}
    assert set(indices) == ({"0.index", "1.index", "2.index"} if cut else {"1.index"})
    assert all(len(index) == round(R / 2) and int(index.max()) < R for index in indices.values())


@pytest.mark.parametrize("output_only", [True, False])
def test_9_a_vit_is_tuned_in_the_attention_output_only(tmp_path: Path, output_only: bool) -> None:
    method = FedPFTOfficial(**(OFF | {"output_only": output_only, "r": R, "distil_steps": 0}))
    for fm, public, projections in (
        (tiny_vit(), image_rows(), 1 if output_only else 4),
        (tiny_fm(), public_rows(), 4),
    ):
        server = method.server(fm, public, context(tmp_path))
        paths = {name.partition(".lora_")[0] for name in server.fm_names() if ".lora_" in name}
        assert len(paths) == projections * 3
        if projections == 1:
            assert paths == {Parts(fm.build(None, CPU)).attention_paths(i)[3] for i in range(3)}
        [setup, adapter] = server.broadcast(0, [1])[1]
        assert ModelSpec.from_json(str(setup.meta["spec"])) == server.spec  # type: ignore[attr-defined]
        assert set(adapter.tensors) == set(server.fm_names())


def test_an_images_tokens_are_its_patches_and_class_token(tmp_path: Path) -> None:
    fm = tiny_vit()
    for kind in (FedPFT, FedPFTOfficial):
        server = kind(r=R, distil_steps=0, t=1).server(fm, image_rows(), context(tmp_path))
        assert isinstance(server, FedPFTServer)
        task = first_task(server, image_rows())
        result = execute(task, Execution())
        assert result.observed_tokens == 12 * (4 + 1)
        counts = {f"zeros.{i}": result.observed[server.parts.ffn_activation_path(i)] for i in server.aligned}
        server.accept(0, [Message("statistics", counts, {"tokens": result.observed_tokens})])


# ---------------------------------------------------------------- ablations and the parameter study


@pytest.mark.parametrize(
    ("method", "before", "during"), [(FedPFT, 1, 1), (FedPFTN, 0, 0), (FedPFTB, 1, 0), (FedPFTD, 0, 1)]
)
def test_ablations_leave_out_what_they_say(tmp_path: Path, method: type[FedPFT], before: int, during: int) -> None:
    path, split = Registry(()).find_scenario("tweets-noniid")
    given = scenario_settings(method, load_scenario(path, split, "smoke"))
    server = method(**{name: value for name, (value, _) in given.items()}, r=R).server(
        tiny_fm(), public_rows(), context(tmp_path)
    )
    [residual] = server.residuals()
    assert (residual["hidden"] != residual["hidden_before"]) == bool(before)
    assert any(server.aligns(round) for round in range(4)) == bool(during)


@pytest.mark.parametrize(("method", "setting"), [("fedpft-n", "t"), ("fedpft-b", "t"), ("fedpft-d", "distil_steps")])
def test_an_ablation_cannot_be_set_to_what_it_leaves_out(method: str, setting: str) -> None:
    kind = Registry(()).load_method(method)
    with pytest.raises(FedbenchError, match=f"{setting!r} of {method}: input should be 0"):
        make_method(kind, {setting: 5}, RunRequest(method, "tweets-iid"))


def test_a_method_takes_the_scenarios_settings_of_what_it_extends(tmp_path: Path) -> None:
    file = tmp_path / "s.toml"
    original, split = Registry(()).find_scenario("tweets-noniid")
    text = original.read_text().replace(
        "[methods.fedpft]\n", '[methods.fedpft]\nlr = 0.5\nzero_rule = "non-positive"\n'
    )
    file.write_text(text + "\n[methods.fedpft-official]\nlr = 0.25\n")
    scenario = load_scenario(file, split)

    def settings(kind: type[Method]) -> dict[str, object]:
        return dict(scenario_settings(kind, scenario))

    paper = settings(FedPFT)
    assert paper["lr"] == (0.5, "fedpft") and paper["zero_rule"] == ("non-positive", "fedpft")
    assert settings(FedPFTB) == {name: value for name, value in paper.items() if name != "t"}
    assert settings(FedPFTN) == {name: value for name, value in paper.items() if name not in ("t", "distil_steps")}
    # What official declares anew, its zero rule, is not fedpft's to set; its own table comes first.
    assert settings(FedPFTOfficial) == {n: v for n, v in paper.items() if n != "zero_rule"} | {
        "lr": (0.25, "fedpft-official")
    }
    assert settings(FedOT) == {n: (v, "fedot") for n, v in scenario.methods["fedot"].items()}


@pytest.mark.parametrize(("choice", "expected"), [("highest", [[1, 3]]), ("lowest", [[0, 4]]), ("random", None)])
def test_neuron_choice(tmp_path: Path, choice: str, expected: list[list[int]] | None) -> None:
    method = FedPFT(r=R, distil_steps=0, p=0.4, choice=choice)  # type: ignore[arg-type]
    servers = [method.server(tiny_fm(), public_rows(), context(tmp_path)) for _ in range(2)]
    chosen = []
    for server in servers:
        assert isinstance(server, FedPFTServer)
        server.apoz = {1: torch.tensor([0.1, 0.9, 0.2, 0.8, 0.0])}
        chosen.append([server.neurons(round, 1).tolist() for round in range(8)])
    assert chosen[0] == chosen[1], "by the seed, not by chance"
    assert all(len(c) == 2 and c == sorted(c) for c in chosen[0])
    if expected is not None:
        assert all(c in expected for c in chosen[0])
    else:
        assert len(set(map(tuple, chosen[0]))) > 2


# ---------------------------------------------------------------- FedOT with FedPFT's budget


def held(server: FedPFTServer | FedOTServer) -> int:
    """Parameters in the transformer layers a client holds, adapters included."""
    parts = Parts(server.model)
    return sum(p.numel() for i in range(parts.count) for p in parts.layer(i).parameters())


@pytest.mark.parametrize(("layers", "front", "back"), [(6, 1, 1), (8, 2, 1), (8, 1, 3)])
def test_fedot_finds_the_emulator_nearest_to_fedpfts_parameters(
    tmp_path: Path, layers: int, front: int, back: int
) -> None:
    fm, ctx = tiny_fm(layers), context(tmp_path)
    paper = FedPFT(distil_steps=0).server(fm, public_rows(), ctx)
    assert isinstance(paper, FedPFTServer)

    def fedot(emulator: object) -> FedOTServer:
        method = FedOT(front=front, back=back, emulator=emulator, distil_steps=0)  # type: ignore[arg-type]
        server = method.server(fm, public_rows(), ctx)
        assert isinstance(server, FedOTServer)
        return server

    budgets = {n: held(fedot(n)) for n in range(1, layers - front - back + 1)}
    nearest = min(budgets, key=lambda n: abs(budgets[n] - held(paper)))
    found = fedot("fedpft")
    assert len(found.emulated) == nearest
    [note] = found.notes()
    assert f"{front}-{nearest}-{back}" in note and f"{budgets[nearest] / 1e6:.2f} M" in note
    assert f"{held(paper) / 1e6:.2f} M" in note
    assert not fedot(1).notes()


def test_the_matched_shape_is_said_in_the_record(tmp_path: Path) -> None:
    checkpoint = save_tiny_bert(tmp_path / "bert", 5)
    record = run(prepare(smoke_request(tmp_path, "fedot", "tweets-noniid", checkpoint, emulator="fedpft")))
    assert record.method.settings["emulator"] == "fedpft"
    assert sum(note.startswith("fedot 1-") for note in record.provenance.notes) == 1


@pytest.mark.parametrize("emulator", [0, -1, "half", 1.5])
def test_fedot_refuses_an_impossible_emulator(emulator: object) -> None:
    with pytest.raises(FedbenchError, match="emulator"):
        make_method(FedOT, {"emulator": emulator}, RunRequest("fedot", "tweets-iid"))


def test_highest_takes_at_least_one() -> None:
    assert highest(torch.tensor([0.1, 0.3]), 0.01).tolist() == [1]
