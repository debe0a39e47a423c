"""What a run is made of before its first round: device, precision, executor, settings, key; and its small parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import clients_of, points_of, save_tiny_bert, scores_of, server_of, smoke_request

from fedbench.api.context import ServerContext
from fedbench.api.local import LocalResult, LocalTask
from fedbench.api.messages import ClientId
from fedbench.errors import FedbenchError, MessageError
from fedbench.machine.device import Execution, choose_device, choose_executor, choose_precision
from fedbench.machine.paths import cache_folder
from fedbench.machine.stopwatch import Stopwatch
from fedbench.measures.accuracy import Evaluation, evaluate
from fedbench.measures.cost import most_tokens
from fedbench.methods.fedavg_lora import AdapterClient, AdapterServer, FedAvgLora
from fedbench.methods.fedpft import FedPFT
from fedbench.records.schema import RoundBytes, Selection, Validation
from fedbench.records.store import load_all
from fedbench.run import prepare as preparing
from fedbench.run.gate import Bounds, let_in
from fedbench.run.loop import Run
from fedbench.run.prepare import Prepared, make_method, parse_values, prepare, split_settings
from fedbench.run.progress import Silent
from fedbench.run.record import finish
from fedbench.run.request import RunRequest
from fedbench.run.run import checkpoint_folder, run

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes torch say that this machine has that many CUDA devices, with bf16 or without."""

    def say(count: int, bf16: bool = True) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: bf16)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Old {device}")

    return say


@pytest.mark.parametrize(
    ("count", "name", "device"),
    [
        (0, "auto", CPU),
        (1, "auto", CUDA),
        (1, "cpu", CPU),
        (1, "cuda", CUDA),
        (1, "cuda:0", torch.device("cuda:0")),
        (2, "cuda:1", torch.device("cuda:1")),
    ],
)
def test_a_device_by_name(gpus: Any, count: int, name: str, device: torch.device) -> None:
    gpus(count)
    assert choose_device(name) == device


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("gpu", "--device gpu: no such device; use auto, cpu, cuda or cuda:N"),
        ("meta", "--device meta: only cpu and cuda are supported"),
        ("cuda:1", "--device cuda:1: this machine has 1 CUDA devices; use --device cpu"),
    ],
)
def test_a_device_that_is_not_here_is_refused(gpus: Any, name: str, complaint: str) -> None:
    gpus(1)
    with pytest.raises(FedbenchError) as caught:
        choose_device(name)
    assert str(caught.value) == complaint


@pytest.mark.parametrize(
    ("name", "device", "bf16", "precision"),
    [
        ("auto", CPU, True, "fp32"),
        ("auto", CUDA, True, "bf16"),
        ("auto", CUDA, False, "fp32"),
        ("fp32", CUDA, True, "fp32"),
        ("bf16", CUDA, True, "bf16"),
        ("bf16", CPU, False, "bf16"),
    ],
)
def test_a_precision_by_name(gpus: Any, name: str, device: torch.device, bf16: bool, precision: str) -> None:
    gpus(1, bf16)
    assert choose_precision(name, device) == precision


def test_a_precision_that_is_not_here_is_refused(gpus: Any) -> None:
    gpus(1, bf16=False)
    with pytest.raises(FedbenchError, match="--precision bf16: Old cuda has no bf16; use fp32"):
        choose_precision("bf16", CUDA)
    with pytest.raises(FedbenchError, match="--precision fp16: no such precision; use auto, fp32 or bf16"):
        choose_precision("fp16", CPU)


def test_an_executor_by_name() -> None:
    assert [choose_executor("auto", device) for device in (CPU, CUDA)] == ["packed", "fused"]
    for name in ("packed", "fused", "reference"):
        assert {choose_executor(name, device) for device in (CPU, CUDA)} == {name}


def test_settings_go_to_the_method_or_to_the_scenario() -> None:
    given = {
        "lr": "1", "method.clip-norm": "2", "methods.fedpft.mu": "3", "rounds": "4", "split.clients": "5",
        "methods.fedot.lr": "6",
    }  # fmt: skip
    mine, rest = split_settings(given, ["lr", "clip_norm", "mu"], "fedpft")
    assert mine == {"lr": "1", "clip_norm": "2", "mu": "3"}
    assert rest == {"federation.rounds": "4", "split.clients": "5", "methods.fedot.lr": "6"}
    with pytest.raises(FedbenchError, match="--set method.x: fedpft has no such hyper-parameter; known: lr, mu"):
        split_settings({"lr": "1", "method.x": "1"}, ["mu", "lr"], "fedpft")


def test_values_of_settings_are_toml_or_text() -> None:
    given = {"a": "1e-3", "b": "none", "c": "NULL", "d": "highest", "e": "[0, -1]", "f": "true", "g": "7"}
    assert parse_values(given) == {
        "a": 1e-3, "b": None, "c": None, "d": "highest", "e": [0, -1], "f": True, "g": 7
    }  # fmt: skip


def test_a_bad_hyper_parameter_is_named_with_those_there_are() -> None:
    request = RunRequest("fedavg-lora", "tweets-iid")
    fields = list(FedAvgLora.model_fields)
    for settings, named, known in (
        ({"lr": -1}, "'lr'", f"; it takes {', '.join(fields)}"),
        ({"lora_r": 8, "width": 3}, "'width'", f"; known: {', '.join(sorted(fields))}"),
    ):
        with pytest.raises(FedbenchError) as caught:
            make_method(FedAvgLora, settings, request)
        assert str(caught.value).startswith(f"tweets-iid: hyper-parameter {named} of fedavg-lora: ")
        assert str(caught.value).endswith(known)
    assert make_method(FedAvgLora, {"lr": 0.5}, request) == FedAvgLora(lr=0.5)


def test_a_stopwatch_adds_up_by_phase_whatever_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 11.5, 20.0, 20.25, 30.0, 34.0])
    monkeypatch.setattr("fedbench.machine.stopwatch.time.perf_counter", lambda: next(times))
    watch = Stopwatch({"local": 1.0})
    with watch("local"):
        pass
    with watch("test"):
        pass
    with pytest.raises(KeyboardInterrupt), watch("local"):
        raise KeyboardInterrupt
    assert dict(watch.seconds) == {"local": 6.5, "test": 0.25}


def test_where_the_cache_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDBENCH_CACHE", str(tmp_path / "b"))
    assert cache_folder(tmp_path / "a") == tmp_path / "a"
    assert cache_folder() == tmp_path / "b"
    monkeypatch.delenv("FEDBENCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
    assert cache_folder().name == "fedbench"
    assert cache_folder().is_absolute()


@pytest.fixture(scope="module")
def request_of(tmp_path_factory: pytest.TempPathFactory) -> RunRequest:
    folder = tmp_path_factory.mktemp("engine")
    return smoke_request(folder, "fedavg-lora", "tweets-noniid", save_tiny_bert(folder / "bert"), rounds="1")


def changed(request: RunRequest, **settings: str) -> Prepared:
    return prepare(replace(request, settings={**request.settings, **settings}))


def test_what_decides_the_result_is_in_the_key_and_nothing_else(request_of: RunRequest, tmp_path: Path) -> None:
    one = prepare(request_of)
    same = [
        replace(request_of, workers=2),
        replace(request_of, executor="reference"),
        replace(request_of, results=tmp_path / "runs", cache=tmp_path / "cache"),
        replace(request_of, precision="fp32", device="cpu"),
        replace(request_of, settings={**request_of.settings, "lr": str(one.method.model_dump()["lr"])}),
    ]
    assert {prepare(request).key for request in same} == {one.key}
    others = [
        replace(request_of, seed=1),
        replace(request_of, precision="bf16"),
        replace(request_of, method="head-only"),
        replace(request_of, scenario="tweets-iid"),
        replace(request_of, fm=str(save_tiny_bert(tmp_path / "bert", seed=1))),
        *(
            replace(request_of, settings={**request_of.settings, name: value})
            for name, value in {
                "lr": "0.5", "lora_alpha": "8", "rounds": "2", "split.clients": "5", "dataset.max_length": "8",
                "evaluation.selection": "best", "evaluation.every": "1",
            }.items()
        ),
    ]  # fmt: skip
    keys = [prepare(request).key for request in others]
    assert len({one.key, *keys}) == len(others) + 1
    assert len(one.key) == 64


def test_the_key_holds_the_contents_of_data_and_fm_and_the_methods_version(
    request_of: RunRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = prepare(request_of)
    monkeypatch.setattr(FedAvgLora, "version", 99)
    assert prepare(request_of).key != one.key
    monkeypatch.undo()
    for part in ("data", "fm"):
        real = getattr(one.loaded, part)
        other = replace(real, content_hash="0" * 64)
        with monkeypatch.context() as patch:
            patch.setattr(preparing, "_load", lambda *_, p=part, o=other: replace(one.loaded, **{p: o}))
            assert prepare(request_of).key != one.key, part


def test_what_a_method_plans_is_named(request_of: RunRequest) -> None:
    assert prepare(request_of).planned == ()
    planned = prepare(replace(request_of, method="centralised-lora"))
    assert set(planned.planned) <= {f"split.{n}" for n in type(planned.scenario.split).model_fields} | {
        f"federation.{n}" for n in type(planned.scenario.federation).model_fields
    }
    assert "split.clients" in planned.planned
    assert planned.scenario.split.clients == 1
    assert "federation.fraction" not in planned.planned or planned.scenario.federation.fraction == 1.0


def test_notes_say_where_the_fm_is_from(request_of: RunRequest) -> None:
    one = prepare(request_of)
    data, fm = tuple(one.loaded.data.notes), f"FM: {one.loaded.fm.name} ({one.loaded.fm.provenance['source']})"
    assert one.notes == (*data, fm, *one.loaded.notes)


def test_a_checkpoint_lies_in_a_folder_of_its_key(request_of: RunRequest) -> None:
    one = prepare(request_of)
    assert checkpoint_folder(one) == request_of.results / "checkpoints" / one.key[:12]


def test_a_cohort_is_drawn_by_its_round_and_who_drops_out_by_another_stream(request_of: RunRequest) -> None:
    one = Run(changed(request_of, **{"split.clients": "10", "federation.dropout": "0.4"}), Silent())
    federation = one.p.scenario.federation
    for round in range(5):
        cohort, staying = one.cohort(round)
        drawn = one.streams.numpy("cohort", round).choice(10, federation.cohort_size(10), replace=False)
        assert cohort == sorted(drawn.tolist())
        stays = one.streams.numpy("client-dropout", round).random(len(cohort)) >= 0.4
        assert staying == [c for c, stay in zip(cohort, stays.tolist(), strict=True) if stay]


def test_the_server_is_told_the_federation_and_where_it_may_keep_files(
    request_of: RunRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[ServerContext] = []
    server = FedAvgLora.server

    def watched(self: FedAvgLora, fm: Any, public: Any, ctx: ServerContext) -> Any:
        seen.append(ctx)
        return server(self, fm, public, ctx)

    monkeypatch.setattr(FedAvgLora, "server", watched)
    one = Run(changed(request_of, **{"evaluation.every": "2"}), Silent())
    [ctx] = seen
    assert (ctx.federation, ctx.device, ctx.cache) == (one.p.scenario.federation, CPU, request_of.cache)
    assert ctx.evaluate_every == 2


def test_a_client_that_drops_out_is_sent_everything_and_sends_nothing(request_of: RunRequest) -> None:
    settings = {"split.clients": "6", "federation.fraction": "1.0", "federation.dropout": "0.5", "rounds": "2"}
    one = Run(changed(request_of, **settings), Silent())
    one.loop(None)
    for round, entry in enumerate(one.rounds):
        cohort, staying = one.cohort(round)
        crossed = [e for e in one.ledger.entries if e.round == round]
        assert 0 < len(staying) < len(cohort) == 6
        assert entry["cohort"] == cohort
        assert entry["arrived"] == sorted({e.client for e in crossed if e.direction == "up"}) == staying
        assert {e.client for e in crossed if e.direction == "down"} == set(cohort)
        assert entry["bytes_down"] == sum(e.bytes for e in crossed if e.direction == "down")
        assert entry["bytes_up"] == sum(e.bytes for e in crossed if e.direction == "up")


def test_bounds_are_what_the_client_has_and_what_it_was_sent(
    request_of: RunRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Run(changed(request_of, **{"federation.max_update_norm": "7"}), Silent())
    held_to: list[Bounds] = []
    monkeypatch.setattr("fedbench.run.hosts.side.let_in", lambda *a: held_to.append(a[2]) or let_in(*a))
    outbox = one.host.server.broadcast(0, [2])
    inbox = [parcel.open() for parcel in outbox[2]]
    task = clients_of(one).client(2).task(0, inbox, one.rows[2])
    [result] = one.host.clients.train(0, outbox, [2], lambda loss: None).values()
    assert one.host.server.receive(0, 2, result.upload, result.most) is None
    [bounds] = held_to
    assert bounds.most == {"num_examples": len(one.rows[2]), "tokens": most_tokens(task)}
    assert set(bounds.sent) == set(task.tunables)
    assert bounds.max_update_norm == 7


def test_the_probe_is_drawn_from_the_validation_rows_and_alike_for_every_method(request_of: RunRequest) -> None:
    runs = [Run(prepare(replace(request_of, method=name)), Silent()) for name in ("fedavg-lora", "fedpft")]
    one, rows = runs[0], runs[0].p.loaded.validation
    size = min(one.evaluation.probe_size, len(rows))
    order = one.streams.numpy("probe").permutation(len(rows))[:size]
    assert {run.p.held_out.probe.content_hash() for run in runs} == {rows.select(order).content_hash()}
    assert len(one.p.held_out.probe) == size > 0


def test_progress_counts_every_client_of_every_round(request_of: RunRequest) -> None:
    phases: list[tuple[str, int | None]] = []
    steps: list[int] = []

    class Counting(Silent):
        def phase(self, name: str, total: int | None = None, detail: str = "") -> None:
            phases.append((name, total))

        def advance(self, n: int = 1, **values: float | str) -> None:
            steps.append(n)

    settings = {"split.clients": "6", "federation.fraction": "0.5", "federation.dropout": "0.5", "rounds": "4"}
    one = Run(changed(request_of, **settings), Counting())
    one.loop(None, until=1)
    one.loop(None)
    assert sum(steps) == 4 * 3, "those that drop out count too"
    assert phases == [("set-up", None), ("federated rounds", 4 * 3), ("federated rounds", 3 * 3)]


def test_an_alignment_is_measured_before_and_after_it(request_of: RunRequest) -> None:
    settings = {"t": "2", "rounds": "5", "align_steps": "2", "distil_steps": "2", "evaluation.every": "1"}
    one = Run(prepare(replace(request_of, method="fedpft", settings={**request_of.settings, **settings})), Silent())
    assert isinstance(one.p.method, FedPFT)
    one.loop(None)
    assert [(p["round"], p["phase"]) for p in points_of(one)] == [
        (-1, "start"), (0, "round"), (1, "before_alignment"), (1, "after_alignment"), (2, "round"),
        (3, "before_alignment"), (3, "after_alignment"), (4, "round"),
    ]  # fmt: skip
    before, after = points_of(one)[2:4]
    assert before["zero_filled"] != after["zero_filled"]
    assert [r["plug_in_validation"] is not None for r in one.rounds] == [True] * 5


def test_a_record_says_what_was_run_and_what_it_took(request_of: RunRequest) -> None:
    settings = {"rounds": "3", "evaluation.every": "2", "split.clients": "6", "federation.dropout": "0.5"}
    one = Run(changed(request_of, **settings), Silent())
    seen: list[LocalResult] = []
    train = clients_of(one).results

    def watched(round: int, tasks: Mapping[ClientId, LocalTask]) -> Iterator[tuple[ClientId, LocalResult]]:
        for cid, result in train(round, tasks):
            seen.append(result)
            yield cid, result

    clients_of(one).results = watched  # type: ignore[method-assign]
    one.loop(None)
    record, p = finish(one), one.p
    identity = {
        "key": p.key,
        "method": "fedavg-lora",
        "method_version": FedAvgLora.version,
        "scenario": "tweets-noniid",
        "seed": 0,
        "fm": p.loaded.fm.name,
        "data_hash": p.loaded.data.content_hash,
        "fm_hash": p.loaded.fm.content_hash,
        "precision": "fp32",
    }
    assert identity.items() <= record.identity.to_json().items()
    assert record.scenario.title == p.scenario.title
    assert record.compute.local_steps == sum(result.steps for result in seen) > 0
    assert record.compute.trainable_parameters == sum(
        tensor.numel() for tensor in server_of(one).state().tensors.values()
    )
    assert set(record.compute.seconds) >= {"setup", "broadcast", "local", "upload", "aggregate", "evaluate", "test"}
    # Scored are every second round and the last.
    assert ["plug_in_validation" in entry for entry in one.rounds] == [False, True, True]
    assert record.accuracy.selection == Selection(rule=one.evaluation.selection, round=2)
    assert record.accuracy.validation == Validation(plug_in=one.rounds[2]["plug_in_validation"], proxy=None)
    assert record.partition.sizes == [len(rows) for rows in one.rows.values()]
    assert record.provenance.executor == p.execution.executor
    assert record.provenance.notes[: len(p.notes)] == list(p.notes)
    assert record.communication.per_round == [
        RoundBytes(round=r, up=e["bytes_up"], down=e["bytes_down"]) for r, e in enumerate(one.rounds)
    ]


def test_every_model_is_scored_on_every_test_set(request_of: RunRequest) -> None:
    asked = prepare(replace(request_of, method="fedpft", settings={"rounds": "1", "distil_steps": "0"}))
    head = {
        name: torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
        for name, p in asked.loaded.fm.build(None, CPU).named_parameters()
        if name.startswith("classifier")
    }
    loaded = replace(
        asked.loaded,
        fm=replace(asked.loaded.fm, trained_head=head),
        data=replace(asked.loaded.data, test_name="matched"),
        extra_tests={"mismatched": asked.loaded.validation},
    )
    one = Run(replace(asked, loaded=loaded), Silent())
    one.loop(None)
    found, proxy = finish(one).accuracy, server_of(one).put_in_proxy()
    assert proxy is not None
    untouched = loaded.fm.build(None, CPU)
    untouched.load_state_dict(head, strict=False)
    size = one.evaluation.batch_size
    for block, model, rows in (
        (found.plug_in, server_of(one).put_in_fm(), loaded.test),
        (found.proxy, proxy, loaded.test),
        (found.untouched, untouched, loaded.test),
        (found.extra_tests["mismatched"].plug_in, server_of(one).put_in_fm(), loaded.validation),
        (found.extra_tests["mismatched"].proxy, proxy, loaded.validation),
    ):
        score = evaluate(model, rows, size, Execution())
        assert (block.rows, block.accuracy) == (len(rows), pytest.approx(score.accuracy))
        assert block.loss == pytest.approx(score.loss, rel=1e-5)
    assert found.test_name == "matched"
    assert found.gap == pytest.approx(found.plug_in.accuracy - found.proxy.accuracy)
    assert found.validation.proxy == one.rounds[0]["proxy_validation"]


def test_of_rounds_with_equal_scores_the_first_is_kept(request_of: RunRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Run(changed(request_of, **{"evaluation.selection": "best", "evaluation.every": "1", "rounds": "4"}), Silent())
    scores = iter([0.5, 0.7, 0.7, 0.6])
    monkeypatch.setattr(
        scores_of(one), "evaluate", lambda *_: Evaluation(np.zeros(10, int), np.arange(10) >= 10 * next(scores), 1.0)
    )
    one.loop(None)
    assert scores_of(one).best is not None
    assert (scores_of(one).best.round, scores_of(one).best.score) == (1, 0.7)


def test_a_client_with_a_training_of_its_own_runs_it_here(
    request_of: RunRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Run(changed(request_of), Silent())
    whole.loop(None)
    fitted: list[ClientId] = []

    def fit(self: AdapterClient, task: LocalTask, run: Callable[[LocalTask], LocalResult]) -> LocalResult:
        fitted.append(self.ctx.client)
        assert torch.get_num_threads() == 1
        return run(task)

    monkeypatch.setattr(AdapterClient, "fit", fit)
    one = Run(changed(request_of), Silent())
    one.loop(None)
    assert fitted == one.rounds[0]["cohort"] == one.rounds[0]["arrived"]
    assert one.rounds[0]["loss"] == pytest.approx(whole.rounds[0]["loss"], rel=1e-4)


def test_a_servers_own_check_is_asked(request_of: RunRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def accept(self: AdapterServer, round: int, messages: object) -> None:
        raise MessageError("not today")

    monkeypatch.setattr(AdapterServer, "accept", accept)
    one = Run(changed(request_of), Silent())
    one.loop(None)
    assert one.rounds[0]["arrived"] == []
    assert one.rounds[0]["refused"] == [{"client": c, "reason": "not today"} for c in one.rounds[0]["cohort"]]
    assert finish(one).communication.refused == [[0, c, "not today"] for c in one.rounds[0]["cohort"]]


def test_no_checkpoint_is_written_after_the_last_round(request_of: RunRequest, tmp_path: Path) -> None:
    Run(changed(request_of), Silent()).loop(tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_a_run_leaves_its_record_and_says_what_it_goes_on_from(request_of: RunRequest, tmp_path: Path) -> None:
    asked = prepare(replace(request_of, results=tmp_path, settings={**request_of.settings, "rounds": "2"}))
    said: list[tuple[str, str]] = []

    class Listening(Silent):
        def phase(self, name: str, total: int | None = None, detail: str = "") -> None:
            said.append((name, detail))

    Run(asked, Silent()).loop(checkpoint_folder(asked), until=1)
    record = run(asked, Listening())
    assert ("resume", "after round 1") in said
    assert [name for name, _ in said] == ["set-up", "resume", "federated rounds", "test"]
    assert load_all(tmp_path / "records") == [record]
    assert not checkpoint_folder(asked).exists()
    said.clear()
    run(asked, Listening())
    assert [name for name, _ in said] == ["set-up", "federated rounds", "test"]


def test_a_method_that_cannot_run_leaves_a_record_that_says_why(request_of: RunRequest, tmp_path: Path) -> None:
    asked = prepare(replace(request_of, method="zero-shot", results=tmp_path, settings={}))
    why = f"{asked.loaded.fm.name} has no head trained for this task"
    assert asked.unavailable == why
    record = run(asked)
    assert record.accuracy.to_json() == {"plug_in": None, "proxy": None, "unavailable": why}
    assert record.compute.trainable_parameters is None
