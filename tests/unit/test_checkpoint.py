"""Checkpoints: everything to go on with, tensors that stay the same written once, whole at any moment."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import save_tiny_bert, smoke_request

from fedbench.api import Message
from fedbench.engine import INDEX, Run, Silent, prepare
from fedbench.exposure import Exposure
from fedbench.files import load_tensors, save_tensors, write_text
from fedbench.models import frozen_state, state_digest


def run_of(folder: Path, method: str = "fedpft") -> Run:
    request = smoke_request(folder, method, "tweets-noniid", save_tiny_bert(folder / "bert"), lr="1e-2", rounds="4")
    return Run(prepare(request), Silent())


def states(run: Run) -> list[torch.Tensor]:
    every = [run.server.state(), *(client.state() for _, client in sorted(run.clients.items()))]
    return [state.tensors[name] for state in every for name in sorted(state.tensors)] + [*run.exposure.state().values()]


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


def test_what_clients_keep_is_written_once(tmp_path: Path) -> None:
    run, folder = run_of(tmp_path, "fedavg-lora"), tmp_path / "checkpoint"
    run.loop(folder, until=3)
    assert {path.name for path in folder.glob("*.safetensors")} == {"round-1.safetensors", "round-3.safetensors"}
    index = json.loads((folder / INDEX).read_text())
    files = {part: {file for file, _ in block["tensors"].values()} for part, block in index["clients"].items()}
    # Clients share the FM's tensors, so those sampled later refer to the first round's file as well.
    assert len(files) > 2
    assert all(found == {"round-1.safetensors"} for found in files.values())
    assert {file for file, _ in index["server"]["tensors"].values()} == {"round-3.safetensors"}


def test_what_changed_in_place_is_written_again(tmp_path: Path) -> None:
    run, folder = run_of(tmp_path), tmp_path / "checkpoint"
    run.loop(folder, until=1)
    mask = next(iter(run.exposure.state().values()))
    mask.logical_not_()
    run.loop(folder, until=2)
    again = run_of(tmp_path)
    again.resume(folder)
    assert torch.equal(next(iter(again.exposure.state().values())), mask)


def test_a_crash_before_the_index_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, folder = run_of(tmp_path), tmp_path / "checkpoint"
    run.loop(folder, until=1)

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fedbench.engine.write_text", crash)
        with pytest.raises(KeyboardInterrupt):
            run.loop(folder, until=2)
    again = run_of(tmp_path)
    assert again.resume(folder)
    assert len(again.rounds) == 1


def test_a_checkpoint_of_another_run_is_not_taken(tmp_path: Path) -> None:
    run, folder = run_of(tmp_path), tmp_path / "checkpoint"
    assert not run.resume(folder)
    run.loop(folder, until=1)
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({**index, "key": "another"}))
    assert not run_of(tmp_path).resume(folder)


def test_a_file_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "file.txt"
    write_text(path, "ä\n")
    assert path.read_bytes() == "ä\n".encode()
    with monkeypatch.context() as patch:
        patch.setattr("fedbench.files.os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            write_text(path, "b")
    assert path.read_text() == "ä\n"
    assert [*path.parent.iterdir()] == [path]
    save_tensors(path.with_name("t.safetensors"), {"a": torch.arange(6).view(2, 3).T}, {"k": "v"})
    tensors, metadata = load_tensors(path.with_name("t.safetensors"))
    assert torch.equal(tensors["a"], torch.arange(6).view(2, 3).T)
    assert metadata == {"k": "v"}


def test_exposure_by_alignments_is_that_of_every_round_though_one_is_compared_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"t": "3", "r": "6", "rounds": "9", "lr": "1e-2", "split.clients": "12"}
    request = smoke_request(tmp_path, "fedpft", "tweets-noniid", save_tiny_bert(tmp_path / "bert"), **settings)
    run = Run(prepare(request), Silent())
    reference = Exposure(run.p.loaded.fm.state, run.p.loaded.fm.family.embeddings)
    sent: list[set[str]] = []
    compared: list[bool] = []
    observe, observed = Run._observe, Exposure.observe

    def in_every_round(self: Run, delivered: Sequence[tuple[int, Sequence[Message]]]) -> None:
        observe(self, delivered)
        messages = [m for _, inbox in delivered for m in inbox]
        for message in (m for m in messages if m.kind == "sub_fm"):
            observed(reference, message.tensors, self.server.fm_sources())
        if alignments := {state_digest(m.tensors) for m in messages if m.kind == "alignment"}:
            sent.append(alignments)
            observed(reference, frozen_state(self.server.proxy()), self.server.fm_sources())

    def counted(self: Exposure, *arguments: Any) -> None:
        compared.append(isinstance(arguments[0], dict))  # the proxy's own tensors, not those of a message
        observed(self, *arguments)

    monkeypatch.setattr(Run, "_observe", in_every_round)
    monkeypatch.setattr(Exposure, "observe", counted)
    run.loop(None)
    assert run.exposure.block() == reference.block()
    assert all(torch.equal(mask, run.exposure.state()[name]) for name, mask in reference.state().items())
    # Compared are the rounds in which some alignment is sent for the first time.
    assert sum(compared) == sum(not now <= set().union(*sent[:i]) for i, now in enumerate(sent)) < len(sent)
