"""Checkpoints: everything to go on with, tensors that stay the same written once, whole at any moment."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import clients_of, exposure_of, points_of, save_tiny_bert, scores_of, server_of, smoke_request

from fedbench.api.local import LocalResult
from fedbench.api.messages import Message, State
from fedbench.api.sides import Server
from fedbench.errors import DamagedFileError, FedbenchError
from fedbench.files import load_tensors, save_tensors, state_digest, write_text
from fedbench.measures.accuracy import Evaluation
from fedbench.measures.exposure import Exposure, Exposures
from fedbench.methods.fedavg_lora import AdapterClient, AdapterServer
from fedbench.models.weights import frozen_state
from fedbench.records.differences import comparable
from fedbench.run.checkpoint import INDEX, read_checkpoint
from fedbench.run.loop import Run
from fedbench.run.prepare import prepare
from fedbench.run.progress import Silent
from fedbench.run.record import finish
from fedbench.run.run import checkpoint_folder, run


def run_of(folder: Path, method: str = "fedpft") -> Run:
    request = smoke_request(folder, method, "tweets-noniid", save_tiny_bert(folder / "bert"), lr="1e-2", rounds="4")
    return Run(prepare(request), Silent())


def states(run: Run) -> list[torch.Tensor]:
    every = [server_of(run).state(), *(client.state() for _, client in sorted(clients_of(run).clients.items()))]
    return [state.tensors[name] for state in every for name in sorted(state.tensors)] + [
        *exposure_of(run).state().values()
    ]


@pytest.mark.parametrize("method", ["fedpft", "fedavg-lora"])
def test_a_resumed_run_has_the_same_state(tmp_path: Path, method: str) -> None:
    run, folder = run_of(tmp_path, method), tmp_path / "checkpoint"
    for rounds in (1, 2, 3):
        run.loop(folder, until=rounds)
        again = run_of(tmp_path, method)
        assert again.resume(folder)
        assert len(again.rounds) == rounds
        assert (again.step_flops, again.steps) == (run.step_flops, run.steps)
        for mine, theirs in zip(states(again), states(run), strict=True):
            assert torch.equal(mine, theirs)


def test_what_clients_keep_is_written_once_and_named_once(tmp_path: Path) -> None:
    run, folder = run_of(tmp_path, "fedavg-lora"), tmp_path / "checkpoint"
    run.loop(folder, until=3)
    assert {path.name for path in folder.glob("*.safetensors")} == {"round-1.safetensors", "round-3.safetensors"}
    index = json.loads((folder / INDEX).read_text())
    # Clients share the FM's tensors, so those sampled later refer to the first round's file as well.
    held = [name for line in journal(folder) for name in line["clients"].values()]
    assert len(held) > 2
    assert len(set(held)) == 1
    [block] = [b for line in journal(folder) for b in line["states"].values()]
    assert {file for file, _ in block["tensors"].values()} == {"round-1.safetensors"}
    assert {file for file, _ in index["parts"]["server"]["tensors"].values()} == {"round-3.safetensors"}


def journal(folder: Path) -> list[Any]:
    [path] = folder.glob("journal-*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_round_adds_to_the_journal_what_is_new_and_nothing_else(tmp_path: Path) -> None:
    run, folder = run_of(tmp_path), tmp_path / "checkpoint"
    sizes = []
    for rounds in (1, 2, 3):
        run.loop(folder, until=rounds)
        sizes.append(sum(path.stat().st_size for path in folder.glob("journal-*.jsonl")))
    lines = journal(folder)
    assert [entry["round"]["round"] for line in lines for entry in line["history"]] == [0, 1, 2]
    assert {e[0] for e in lines[2]["history"][0]["ledger"]} == {2}
    assert len((folder / INDEX).read_text()) < 20_000


def test_a_resumed_run_goes_on_as_one_that_was_never_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = AdapterClient.upload

    def upload(self: AdapterClient, round: int, result: LocalResult) -> Sequence[Message]:
        [message, *rest] = honest(self, round, result)
        if self.ctx.client == 1:  # whose uploads are refused
            message = replace(message, meta={"num_examples": 0})
        return [message, *rest]

    monkeypatch.setattr(AdapterClient, "upload", upload)
    whole, folder = run_of(tmp_path), tmp_path / "checkpoint"
    whole.loop(None)
    for rounds in (1, 2, 3):
        part = run_of(tmp_path)
        assert part.resume(folder) is (rounds > 1)
        part.loop(folder, until=rounds)
    last = run_of(tmp_path)
    assert last.resume(folder)
    last.loop(None)
    assert last.rounds == whole.rounds
    assert points_of(last) == points_of(whole)
    assert last.ledger == whole.ledger
    assert last.refused == whole.refused
    assert {client for _, client, _ in whole.refused} == {1}
    assert whole.refused[0][0] < 3, "one was refused before the last checkpoint"
    assert comparable(finish(last)) == comparable(finish(whole))


@pytest.mark.parametrize("what", ["index", "journal", "tensors"])
@pytest.mark.parametrize("how", ["cut", "flipped", "gone"])
def test_a_damaged_checkpoint_is_never_taken(tmp_path: Path, what: str, how: str) -> None:
    run, folder = run_of(tmp_path, "head-only"), tmp_path / "checkpoint"
    run.loop(folder, until=2)
    pattern = {"index": INDEX, "journal": "journal-*", "tensors": "round-2.safetensors"}[what]
    [path] = folder.glob(pattern)
    content = bytearray(path.read_bytes())
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "gone":
        path.unlink()
    else:
        content[-5] ^= 0x40
        path.write_bytes(content)
    if (what, how) == ("index", "gone"):
        assert not run_of(tmp_path, "head-only").resume(folder), "without an index there is no checkpoint"
        return
    with pytest.raises(DamagedFileError, match=path.name.split("-")[0]):
        run_of(tmp_path, "head-only").resume(folder)


def test_every_flipped_byte_of_a_checkpoint_is_noticed(tmp_path: Path) -> None:
    run, folder = run_of(tmp_path, "head-only"), tmp_path / "checkpoint"
    run.loop(folder, until=1)
    key = run.p.key
    rng = np.random.default_rng(0)
    for path in folder.iterdir():
        content = path.read_bytes()
        for place in {0, 8, len(content) - 2, *rng.integers(len(content) - 1, size=40).tolist()}:
            path.write_bytes(
                content[:place] + bytes([content[place] ^ (1 << int(rng.integers(7)))]) + content[place + 1 :]
            )
            with pytest.raises(DamagedFileError):
                assert read_checkpoint(folder, key) is None, f"{path.name} with byte {place} changed was taken"
        path.write_bytes(content)
    assert read_checkpoint(folder, key) is not None


def test_a_run_with_a_damaged_checkpoint_says_so_and_starts_anew(tmp_path: Path) -> None:
    request = smoke_request(tmp_path, "head-only", "tweets-noniid", save_tiny_bert(tmp_path / "bert"), rounds="3")
    prepared = prepare(request)
    whole = run(prepared)
    folder = checkpoint_folder(prepared)
    Run(prepared, Silent()).loop(folder, until=2)
    path = folder / "round-2.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    said: list[str] = []

    class Listening(Silent):
        def phase(self, name: str, total: int | None = None, detail: str = "") -> None:
            said.append(f"{name}: {detail}")

    again = run(prepared, Listening())
    assert comparable(again) == comparable(whole)
    assert any(text.startswith("starting anew: the checkpoint is damaged") and "round-2" in text for text in said)


def test_a_checkpoint_whose_files_were_deleted_meanwhile_is_written_in_full(tmp_path: Path) -> None:
    run, folder = run_of(tmp_path), tmp_path / "checkpoint"
    run.loop(folder, until=1)
    shutil.rmtree(folder)
    run.loop(folder, until=2)
    again = run_of(tmp_path)
    assert again.resume(folder)
    assert again.rounds == run.rounds
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(states(again), states(run), strict=True))


def test_a_state_that_another_version_of_the_method_wrote_is_not_taken(tmp_path: Path) -> None:
    run, folder = run_of(tmp_path, "head-only"), tmp_path / "checkpoint"
    run.loop(folder, until=1)
    other = run_of(tmp_path, "head-only")
    server_of(other).values["another"] = torch.zeros(1)
    with pytest.raises(DamagedFileError, match="does not fit this run: KeyError"):
        other.resume(folder)


def test_the_best_round_comes_back_with_its_own_plain_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.9, 0.8, 0.7, 0.6])

    class Counting(AdapterServer):
        """Says in its state how often it has aggregated, and scales its answer by that."""

        total = 0

        def aggregate(self, round: int, uploads: Any) -> None:
            super().aggregate(round, uploads)
            self.total += 1

        def state(self) -> State:
            state = super().state()
            return State(state.tensors, {**state.values, "total": self.total})

        def restore(self, state: State) -> None:
            super().restore(state)
            self.total = state.values["total"]

    monkeypatch.setattr("fedbench.methods.fedavg_lora.AdapterServer", Counting)
    settings = {"evaluation.selection": "best", "evaluation.every": "1", "rounds": "4", "split.clients": "4"}
    bert = save_tiny_bert(tmp_path / "bert")
    prepared = prepare(smoke_request(tmp_path, "head-only", "tweets-noniid", bert, **settings))
    one = Run(prepared, Silent())
    monkeypatch.setattr(
        scores_of(one),
        "evaluate",
        lambda model, rows, after: Evaluation(np.zeros(10, int), np.arange(10) >= 10 * next(scores), 1.0),
    )
    one.loop(tmp_path / "checkpoint", until=4)
    assert scores_of(one).best is not None
    assert (scores_of(one).best.round, scores_of(one).best.state.values["total"]) == (0, 1)
    again = Run(prepared, Silent())
    assert again.resume(tmp_path / "checkpoint")
    assert scores_of(again).best is not None
    best, before = scores_of(again).best, scores_of(one).best
    assert (best.score, best.round, best.state.values["total"]) == (before.score, 0, 1)
    again.loop(None)  # the last round is in no checkpoint
    finish(again)
    assert server_of(again).total == 1, "scored is the server of that round, not a mixture of two"


def test_what_changed_in_place_is_written_again(tmp_path: Path) -> None:
    run, folder = run_of(tmp_path), tmp_path / "checkpoint"
    run.loop(folder, until=1)
    mask = next(iter(exposure_of(run).state().values()))
    mask.logical_not_()
    run.loop(folder, until=2)
    again = run_of(tmp_path)
    again.resume(folder)
    assert torch.equal(next(iter(exposure_of(again).state().values())), mask)


def test_a_crash_before_the_index_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, folder = run_of(tmp_path), tmp_path / "checkpoint"
    run.loop(folder, until=1)

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fedbench.run.checkpoint.write_text", crash)
        with pytest.raises(KeyboardInterrupt):
            run.loop(folder, until=2)
    again = run_of(tmp_path)
    assert again.resume(folder)
    assert len(again.rounds) == 1


def test_a_checkpoint_of_another_run_is_not_taken(tmp_path: Path) -> None:
    run, folder = run_of(tmp_path), tmp_path / "checkpoint"
    assert not run.resume(folder)
    run.loop(folder, until=1)
    assert not run_of(tmp_path, "head-only").resume(folder)


def test_a_file_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "file.txt"
    write_text(path, "ä\n")
    assert path.read_bytes() == "ä\n".encode()
    with monkeypatch.context() as patch:
        patch.setattr("fedbench.files.os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(FedbenchError, match="file.txt: cannot be written: full"):
            write_text(path, "b")
    assert path.read_text() == "ä\n"
    assert [*path.parent.iterdir()] == [path]
    save_tensors(path.with_name("t.safetensors"), {"a": torch.arange(6).view(2, 3).T}, {"k": "v"})
    tensors, metadata = load_tensors(path.with_name("t.safetensors"))
    assert torch.equal(tensors["a"], torch.arange(6).view(2, 3).T)
    assert metadata == {"k": "v"}


def test_a_file_of_tensors_is_what_was_written_or_damaged(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    checksum = save_tensors(path, {"a": torch.arange(6.0)}, {"k": "v"})
    assert load_tensors(path, checksum)[1] == {"k": "v"}
    with pytest.raises(DamagedFileError, match=r"t\.safetensors: does not hold what was written"):
        load_tensors(path, "0" * 64)
    content = path.read_bytes()
    for damaged in (content[:-3], content[:20], b"", content.replace(b'"k":"v"', b'"k":"w"'), content[:-1] + b"\x01"):
        path.write_bytes(damaged)
        with pytest.raises(DamagedFileError):
            load_tensors(path)
    path.unlink()
    with pytest.raises(DamagedFileError):
        load_tensors(path)


def test_exposure_by_alignments_is_that_of_every_round_though_one_is_compared_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"t": "3", "r": "6", "rounds": "9", "lr": "1e-2", "split.clients": "12"}
    request = smoke_request(tmp_path, "fedpft", "tweets-noniid", save_tiny_bert(tmp_path / "bert"), **settings)
    run = Run(prepare(request), Silent())
    reference = Exposure(run.p.loaded.fm.state, run.p.loaded.fm.family.embeddings)
    sent: list[set[str]] = []
    compared: list[bool] = []
    sending, observed = Exposures.sent, Exposure.observe

    def in_every_round(self: Exposures, round: int, server: Server, messages: Sequence[Message]) -> None:
        sending(self, round, server, messages)
        for message in (m for m in messages if m.kind == "sub_fm"):
            observed(reference, message.tensors, server.fm_sources())
        if alignments := {state_digest(m.tensors) for m in messages if m.kind == "alignment"}:
            sent.append(alignments)
            observed(reference, frozen_state(server.put_in_proxy()), server.fm_sources())

    def counted(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        compared.append(True)  # the proxy's own tensors, not those of a message
        return frozen_state(model)

    monkeypatch.setattr(Exposures, "sent", in_every_round)
    monkeypatch.setattr("fedbench.measures.exposure.frozen_state", counted)
    run.loop(None)
    assert exposure_of(run).block() == reference.block()
    assert all(torch.equal(mask, exposure_of(run).state()[name]) for name, mask in reference.state().items())
    # Compared are the rounds in which some alignment is sent for the first time.
    assert sum(compared) == sum(not now <= set().union(*sent[:i]) for i, now in enumerate(sent)) < len(sent)
