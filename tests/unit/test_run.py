"""A run holds its clients to what it knows of them, and never scores what is no answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import save_tiny, save_tiny_bert, server_of, smoke_request, tiny_fm, train_rows

from fedbench.api.local import AdamW, LocalResult, LocalTask
from fedbench.api.messages import Message
from fedbench.data.examples import Examples
from fedbench.errors import DivergedError, FedbenchError
from fedbench.machine.device import Execution
from fedbench.measures.accuracy import Evaluation, evaluate
from fedbench.measures.cost import most_tokens
from fedbench.methods.fedavg_lora import AdapterClient, FedAvgLora, LoraMethod
from fedbench.models.cache import Frozen
from fedbench.models.parts import Parts
from fedbench.models.spec import LoraSpec
from fedbench.objectives.classification import cross_entropy
from fedbench.records.schema import Selection
from fedbench.records.text import pack_correct
from fedbench.run.loop import Run
from fedbench.run.prepare import Prepared, prepare
from fedbench.run.progress import Silent
from fedbench.run.record import finish
from fedbench.run.run import run
from fedbench.training.alone import execute
from fedbench.training.cohort import execute_all

CPU = torch.device("cpu")


def prepared(folder: Path, method: str = "fedavg-lora", **settings: str) -> Prepared:
    settings = {"federation.fraction": "1.0", "rounds": "1", **settings}
    return prepare(smoke_request(folder, method, "tweets-noniid", save_tiny_bert(folder / "bert"), **settings))


def test_logits_that_are_not_finite_are_never_scored() -> None:
    model, rows = tiny_fm().build(None, CPU), train_rows(6)
    assert evaluate(model, rows, 4, Execution()).predicted.tolist() == [0] * 6, (
        "of equal logits the first is the largest"
    )
    with torch.no_grad():
        model.get_parameter("classifier.bias")[1] = float("nan")
    for workers in (1, 2):
        with pytest.raises(DivergedError, match="6 of 6 rows have logits that are not finite"):
            evaluate(model, rows, 4, Execution(workers=workers))


@pytest.mark.parametrize("method", ["fedavg-lora", "fedpft"])
def test_a_diverged_run_says_so_and_leaves_no_record(tmp_path: Path, method: str) -> None:
    asked = prepared(tmp_path, method, lr="1e30", **{"federation.max_steps": "1"})
    with pytest.raises(
        DivergedError, match=rf"{method} on tweets-noniid, seed 0, has diverged: .* not finite after round 1; lower lr"
    ):
        run(asked)
    assert not (asked.request.results / "records").exists()


@pytest.mark.parametrize("executor", ["fusd", "", "Packed"])
def test_an_executor_that_does_not_exist_is_refused(tmp_path: Path, executor: str) -> None:
    with pytest.raises(FedbenchError, match=rf"--executor {executor}: no such executor; use auto, packed, fused"):
        prepare(replace(prepared(tmp_path).request, executor=executor))


def test_with_dropout_the_executor_is_in_the_key_and_without_it_is_not(tmp_path: Path) -> None:
    plain = prepared(tmp_path).request
    dropping = prepared(tmp_path, lora_dropout="0.1").request
    for request, keys in ((plain, 1), (dropping, 3)):
        found = {prepare(replace(request, executor=e)).key for e in ("packed", "fused", "reference")}
        assert len(found) == keys


class Renamed(LoraMethod):
    """Calls the probability of dropout otherwise, and forgets to say it."""

    name = "renamed"
    version = 1
    drop: float = 0.1

    @property
    def dropout(self) -> float:
        return 0.0

    @property
    def lora(self) -> LoraSpec:
        return LoraSpec(r=2, alpha=4, dropout=self.drop)


def test_a_method_that_drops_without_saying_so_does_not_run(tmp_path: Path) -> None:
    asked = prepared(tmp_path)
    Run(replace(asked, method=Renamed(drop=0.0)), Silent()).loop(None)
    with pytest.raises(FedbenchError, match="renamed: its clients train with dropout, but its property `dropout` is 0"):
        Run(replace(asked, method=Renamed()), Silent()).loop(None)


def test_a_client_that_claims_more_rows_than_it_has_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = AdapterClient.upload

    def upload(self: AdapterClient, round: int, result: LocalResult) -> list[Message]:
        [message] = honest(self, round, result)
        return [replace(message, meta={"num_examples": self.rows + (self.ctx.client == 1)})]

    monkeypatch.setattr(AdapterClient, "upload", upload)
    this = Run(prepared(tmp_path), Silent())
    this.loop(None)
    assert this.rounds[0]["arrived"] == [0, 2, 3]
    n = len(this.rows[1])
    assert this.refused == [(0, 1, f"adapter: num_examples is {n + 1}, but the client has no more than {n}")]


def test_an_absurd_update_is_refused_where_a_largest_norm_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = AdapterClient.upload

    def upload(self: AdapterClient, round: int, result: LocalResult) -> Sequence[Message]:
        [message] = honest(self, round, result)
        scale = 1e30 if self.ctx.client == 2 else 1.0
        return [replace(message, tensors={n: t * scale for n, t in message.tensors.items()})]

    monkeypatch.setattr(AdapterClient, "upload", upload)
    settings = {"rounds": "2", "federation.max_update_norm": "10"}
    record = run(prepared(tmp_path, **settings))
    assert [r.arrived for r in record.rounds] == [[0, 1, 3]] * 2
    assert {why.partition(" has norm")[0] for _, _, why in record.communication.refused} == {"adapter: its update"}
    with pytest.raises(DivergedError, match="federation.max_update_norm|lower lr"):
        run(prepared(tmp_path / "open", rounds="2"))


def test_set_up_is_what_clients_were_sent_first_whatever_its_kind(tmp_path: Path) -> None:
    for method, kind in (("fedpft", "sub_fm"), ("fedot", "sub_fm"), ("fedavg-lora", "fm")):
        settings = {"emulator": "1"} if method == "fedot" else {}
        this = Run(prepared(tmp_path, method, **settings), Silent())
        this.loop(None)
        sent = [e.bytes for e in this.ledger.entries if e.kind == kind]
        assert len(sent) == 4, "one for each client"
        assert finish(this).communication.setup_bytes == sum(sent) > 4 * 10_000


def test_no_row_of_a_test_set_is_looked_at_before_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"rounds": "3", "evaluation.every": "1", "evaluation.selection": "best"}
    this = Run(prepared(tmp_path, "fedpft", **settings), Silent())
    loaded, scored = this.p.loaded, []

    def watched(model: torch.nn.Module, data: Examples, *rest: object) -> Evaluation:
        scored.append(data)
        return evaluate(model, data, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("fedbench.measures.scores.evaluate", watched)
    this.loop(None)
    assert {id(data) for data in scored} == {id(loaded.validation)}
    assert len(scored) == 2 * 3, "plug-in and proxy in every round"
    scored.clear()
    finish(this)
    assert {id(data) for data in scored} == {id(loaded.test)}
    assert loaded.validation.content_hash() != loaded.test.content_hash()
    assert {tuple(row) for row in this.p.held_out.probe.tokens or ()} <= {
        tuple(row) for row in loaded.validation.tokens or ()
    }


@pytest.mark.parametrize("method", ["fedpft", "fedavg-lora"])
def test_the_best_round_is_the_best_of_all_by_what_a_deployment_could_see(tmp_path: Path, method: str) -> None:
    settings = {"rounds": "5", "evaluation.every": "4", "evaluation.selection": "best", "lr": "5e-2"}
    this = Run(prepared(tmp_path, method, **settings), Silent())
    this.loop(None)
    seen = "plug_in_validation" if method == "fedavg-lora" else "proxy_validation"
    scores = [r[seen] for r in this.rounds]
    assert all(score is not None for score in scores), "every round is scored"
    assert len({round(score, 6) for score in scores}) > 1
    if method == "fedpft":
        whole = [r["round"] for r in this.rounds if "plug_in_validation" in r]
        assert whole == [3, 4], "the plug-in in rounds of evaluation and the last"
    record = finish(this)
    best = scores.index(max(scores))
    assert record.accuracy.selection == Selection(rule="best", round=best)
    chosen = record.accuracy.validation
    assert (chosen.proxy if method == "fedpft" else chosen.plug_in) == pytest.approx(max(scores))
    own = evaluate(server_of(this).put_in_fm(), this.p.loaded.validation, 64, Execution()).accuracy
    assert record.accuracy.validation.plug_in == pytest.approx(own)


def test_plug_in_and_proxy_are_scored_as_what_they_are(tmp_path: Path) -> None:
    this = Run(prepared(tmp_path, "fedot", emulator="1", lr="3e-2"), Silent())
    this.loop(None)
    record, rows = finish(this), this.p.loaded.test
    proxy = server_of(this).put_in_proxy()
    assert proxy is not None
    plug_in = evaluate(server_of(this).put_in_fm(), rows, 64, Execution())
    assert record.accuracy.plug_in.loss == pytest.approx(plug_in.loss, rel=1e-6)
    assert record.accuracy.plug_in.correct == pack_correct(plug_in.correct)
    assert record.accuracy.proxy.loss == pytest.approx(evaluate(proxy, rows, 64, Execution()).loss, rel=1e-6)
    assert record.accuracy.proxy.loss != pytest.approx(plug_in.loss, rel=1e-5)
    validation = [
        evaluate(m, this.p.loaded.validation, 64, Execution()).accuracy for m in (server_of(this).put_in_fm(), proxy)
    ]
    assert [this.rounds[0]["plug_in_validation"], this.rounds[0]["proxy_validation"]] == validation


def rows_of(family: str) -> Examples:
    if family == "bert":
        return train_rows(6)
    return Examples(labels=torch.zeros(6, dtype=torch.int64), pixels=torch.randn(6, 3, 8, 8))


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_what_observers_see_is_never_more_than_the_bound(family: str, tmp_path: Path) -> None:
    from fedbench.models.zoo.load import load_fm

    fm = tiny_fm() if family == "bert" else load_fm(str(save_tiny("vit", tmp_path / "vit")), 3, tmp_path)
    model, data = fm.build(LoraSpec(2, 4), CPU), rows_of(family)
    path = Parts(model).ffn_activation_path(0)
    task = LocalTask(
        Frozen("k", model),
        {n: p.detach() for n, p in model.named_parameters() if ".lora_" in n},
        data,
        [np.arange(4), np.arange(4, 6)],
        AdamW(1e-3),
        cross_entropy,
        observers={path: lambda a: a.sum(0)},
    )
    seen = execute(task, Execution()).observed_tokens
    padded = execute(replace(task, observe_padding=True), Execution()).observed_tokens
    # An image of 8 x 8 in patches of 4 x 4 has 4 patches and a class token.
    assert most_tokens(task) == (padded if family == "bert" else 6 * 5)
    assert seen <= padded == most_tokens(task)


def test_a_run_that_cannot_be_a_record_says_in_which_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedbench.measures.scores.per_client", lambda *_: {"mean": 2.0, "std": 0.0, "worst_tenth": 0.5})
    with pytest.raises(
        FedbenchError,
        match=r"fedavg-lora on tweets-noniid: what came out is no record: accuracy.per_client.mean: .* 2.0",
    ):
        run(prepared(tmp_path))


def test_fedavg_lora_says_its_dropout() -> None:
    assert FedAvgLora(lora_dropout=0.2).dropout == 0.2
    assert FedAvgLora().dropout == 0.0


@pytest.mark.parametrize("executor", ["packed", "fused", "reference"])
def test_clients_are_trained_as_the_record_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, executor: str) -> None:
    asked: list[tuple[bool, bool]] = []

    def watched(tasks: Sequence[LocalTask], execution: Execution) -> Iterator[tuple[int, LocalResult]]:
        asked.append((execution.fused, not execution.packed))
        return execute_all(tasks, execution)

    monkeypatch.setattr("fedbench.run.hosts.side.execute_all", watched)
    record = run(prepare(replace(prepared(tmp_path).request, executor=executor)))
    assert record.provenance.executor == executor
    assert asked == [(executor == "fused", executor == "reference")]
