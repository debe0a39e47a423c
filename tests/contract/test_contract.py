"""The contract suite on every built-in method, with a small random BERT; and runs killed in the middle."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import save_tiny_bert

from fedbench.api.local import LocalResult
from fedbench.api.messages import Message
from fedbench.check.suite import check_method
from fedbench.methods.fedavg_lora import AdapterClient
from fedbench.records.differences import comparable
from fedbench.records.record import Record
from fedbench.records.schema import Selection
from fedbench.records.store import load, record_path
from fedbench.registry import Registry
from fedbench.run.loop import Run
from fedbench.run.prepare import Prepared, prepare
from fedbench.run.progress import Silent
from fedbench.run.request import RunRequest
from fedbench.run.run import run

METHODS = sorted(Registry(()).methods)
SETTINGS = {"fedpft": {"t": "1", "r": "6"}, "fedot": {"emulator": "1"}}


@pytest.fixture(scope="module")
def fm(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_bert(tmp_path_factory.mktemp("fm") / "bert"))


def request(fm: str, results: Path, method: str = "fedpft", **changes: object) -> RunRequest:
    asked = RunRequest(
        method=method,
        scenario="tweets-noniid",
        fm=fm,
        profile="smoke",
        settings=SETTINGS.get(method, {}),
        device="cpu",
        results=results,
    )
    return replace(asked, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_the_contract(method: str, fm: str) -> None:
    results = check_method(method, fm=fm, settings=SETTINGS.get(method))
    assert all(r.ok for r in results), [f"{r.name}: {r.detail}" for r in results if not r.ok]
    if method != "zero-shot":  # which has no rounds
        assert results[-1].name == "server and clients in separate processes"


def prepared(fm: str, tmp_path: Path, method: str = "fedpft", **settings: str) -> Prepared:
    return prepare(request(fm, tmp_path, method, settings={**SETTINGS.get(method, {}), **settings}))


def test_a_record_has_all_its_blocks(fm: str, tmp_path: Path) -> None:
    record = run(prepared(fm, tmp_path))
    assert record.status == "complete"
    up, down = record.communication.up.by_kind, record.communication.down.by_kind
    assert set(up) == {"adapter", "statistics"}
    assert set(down) == {"sub_fm", "adapter", "alignment"}
    assert {p.phase for p in record.gradient_error.points} == {
        "start",
        "before_alignment",
        "after_alignment",
        "round",
    }
    assert record.communication.up.bytes == sum(r.bytes_up for r in record.rounds)
    assert 0 < record.exposure.verbatim.all < 1
    assert record.accuracy.gap == pytest.approx(record.accuracy.plug_in.accuracy - record.accuracy.proxy.accuracy)
    [entry] = record.distillation
    assert entry.hidden > 0


def test_setup_is_charged_once_to_each_client_when_first_sampled(fm: str, tmp_path: Path) -> None:
    this = Run(prepared(fm, tmp_path, "fedavg-lora"), Silent())
    this.loop(None)
    first = {}
    for r in this.rounds:
        for cid in r["cohort"]:
            first.setdefault(cid, r["round"])
    charged = {e.client: e.round for e in this.ledger.entries if e.kind == "fm"}
    assert charged == first
    assert sum(e.kind == "fm" for e in this.ledger.entries) == len(first)


def test_every_method_faces_the_same_partition_and_cohorts(fm: str, tmp_path: Path) -> None:
    runs = [Run(prepared(fm, tmp_path, m), Silent()) for m in ("fedpft", "fedot", "fedavg-lora", "head-only")]
    assert len({r.partition.hash() for r in runs}) == 1
    assert len({json.dumps([r.cohort(i) for i in range(3)]) for r in runs}) == 1


def test_clients_that_drop_out_are_charged_for_what_they_were_sent(fm: str, tmp_path: Path) -> None:
    this = Run(prepared(fm, tmp_path, **{"federation.dropout": "0.6", "federation.fraction": "1.0"}), Silent())
    this.loop(None)
    sampled = sum(len(r["cohort"]) for r in this.rounds)
    arrived = sum(len(r["arrived"]) for r in this.rounds)
    assert 0 < arrived < sampled
    sent = [e for e in this.ledger.entries if (e.direction, e.kind) == ("down", "adapter")]
    got = [e for e in this.ledger.entries if (e.direction, e.kind) == ("up", "adapter")]
    assert (len(sent), len(got)) == (sampled, arrived)


def test_a_bad_upload_is_refused_and_the_round_goes_on(
    fm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = AdapterClient.upload

    def upload(self: AdapterClient, round: int, result: LocalResult) -> list[Message]:
        [message] = honest(self, round, result)
        if self.ctx.client != 1:
            return [message]
        return [replace(message, tensors={n: t * float("nan") for n, t in message.tensors.items()})]

    monkeypatch.setattr(AdapterClient, "upload", upload)
    record = run(prepared(fm, tmp_path, "fedavg-lora", **{"federation.fraction": "1.0"}))
    for entry in record.rounds:
        assert entry.arrived == [0, 2, 3]
        assert [r.client for r in entry.refused] == [1]
    assert "not finite" in record.communication.refused[0][2]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: replace(m, kind="statistics"), "statistics: not expected in this round"),
        (lambda m: replace(m, tensors=dict(list(m.tensors.items())[1:])), "is missing"),
        (lambda m: replace(m, tensors={**m.tensors, "more": torch.zeros(1)}), "'more' was not asked for"),
        (lambda m: replace(m, tensors={n: t.double() for n, t in m.tensors.items()}), "torch.float64"),
        (lambda m: replace(m, tensors={n: t[None] for n, t in m.tensors.items()}), "expected ["),
        (lambda m: replace(m, meta={}), "num_examples is not a whole number from 1"),
        (lambda m: replace(m, meta={"num_examples": -3}), "num_examples is not a whole number from 1"),
        (lambda m: replace(m, meta={"num_examples": "many"}), "num_examples is not a whole number from 1"),
    ],
    ids=["kind", "missing", "more", "dtype", "shape", "no-count", "negative-count", "text-count"],
)
def test_an_upload_that_looks_different_is_refused_and_the_round_goes_on(
    fm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Message], Message], reason: str
) -> None:
    honest = AdapterClient.upload

    def upload(self: AdapterClient, round: int, result: LocalResult) -> list[Message]:
        [message] = honest(self, round, result)
        return [change(message) if self.ctx.client == 1 else message]

    monkeypatch.setattr(AdapterClient, "upload", upload)
    this = Run(prepared(fm, tmp_path, "head-only", **{"federation.fraction": "1.0", "rounds": "2"}), Silent())
    this.loop(None)
    for entry in this.rounds:
        assert entry["arrived"] == [0, 2, 3]
        assert [r["client"] for r in entry["refused"]] == [1]
        assert reason in entry["refused"][0]["reason"]


def test_best_selects_on_the_proxys_validation_score_and_never_on_test(fm: str, tmp_path: Path) -> None:
    settings = {"evaluation.selection": "best", "evaluation.every": "1", "lr": "0.05"}
    record = run(prepared(fm, tmp_path, **settings))
    scores = [r.proxy_validation for r in record.rounds]
    assert record.accuracy.selection == Selection(rule="best", round=scores.index(max(scores)))


def test_packed_and_reference_executor_agree_and_share_a_key(fm: str, tmp_path: Path) -> None:
    packed, reference = (prepare(request(fm, tmp_path / e, executor=e)) for e in ("packed", "reference"))
    assert packed.key == reference.key
    a, b = run(packed), run(reference)
    assert a.provenance.executor != b.provenance.executor
    for x, y in zip(a.rounds, b.rounds, strict=True):
        assert x.loss == pytest.approx(y.loss, rel=1e-4)
    assert a.partition == b.partition


FOUR_ROUNDS = {"t": "1", "r": "6", "rounds": "4"}


@pytest.fixture(scope="module")
def undisturbed(fm: str, tmp_path_factory: pytest.TempPathFactory) -> Record:
    return run(prepare(request(fm, tmp_path_factory.mktemp("whole"), settings=FOUR_ROUNDS)))


def die(fm: str, results: Path, after: int) -> None:
    """A run that is killed as its round number `after` begins."""
    original = Run.round

    def dying(self: Run, round: int) -> None:
        if round == after:
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, round)

    Run.round = dying  # type: ignore[method-assign]
    run(prepare(request(fm, results, settings=FOUR_ROUNDS)))


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_run_killed_with_sigkill_resumes_to_the_identical_record(
    fm: str, tmp_path: Path, after: int, undisturbed: Record
) -> None:
    died = multiprocessing.get_context("fork").Process(target=die, args=(fm, tmp_path, after))
    died.start()
    died.join()
    assert died.exitcode == -signal.SIGKILL
    again = prepare(request(fm, tmp_path, settings=FOUR_ROUNDS))
    path = record_path(tmp_path / "records", "tweets-noniid", "fedpft", 0, again.key)
    assert not path.exists()
    assert comparable(run(again)) == comparable(undisturbed)
    assert not list((tmp_path / "checkpoints").iterdir())
    assert comparable(load(path)) == comparable(undisturbed)


def test_a_run_killed_at_any_moment_resumes_to_the_identical_record(fm: str, tmp_path: Path) -> None:
    """Not between rounds but wherever it happens to be, through the command line."""
    command = [sys.executable, "-m", "fedbench.cli.app", "run", "--method", "fedpft", "--scenario", "tweets-noniid"]
    command += ["--fm", fm, "--profile", "smoke", "--set", "t=1", "--set", "r=6", "--rounds", "16", "--device", "cpu"]
    command += ["--results", str(tmp_path / "killed")]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ)
    limit = time.monotonic() + 60
    while not list((tmp_path / "killed").glob("checkpoints/*/checkpoint.json")):
        assert time.monotonic() < limit, "no checkpoint was ever written"
        assert running.poll() is None, "the run ended before it wrote a checkpoint"
        time.sleep(0.01)
    running.kill()
    running.wait()
    settings = {"t": "1", "r": "6", "rounds": "16"}
    resumed = run(prepare(request(fm, tmp_path / "killed", settings=settings)))
    whole = run(prepare(request(fm, tmp_path / "whole", settings=settings)))
    assert comparable(resumed) == comparable(whole)
