"""What a checkpoint's files hold after each round, on states small enough to write down."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from fedbench.api.messages import ClientId, State
from fedbench.api.sides import Client
from fedbench.errors import DamagedFileError
from fedbench.run.checkpoint import INDEX, Checkpoint, Saved, read_checkpoint

KEY = "k" * 64


class Holding:
    """A client of which only the state is asked for."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        self.held = State(tensors, {"rows": len(tensors)})

    def state(self) -> State:
        return self.held


class Writer:
    """A run of rounds: what it has done, and its checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.checkpoint = Checkpoint(folder, KEY)
        self.parts: dict[str, State] = {}
        self.clients: dict[ClientId, Holding] = {}
        self.rounds: list[Any] = []

    def write(self, *changed: ClientId, **values: Any) -> Saved:
        self.rounds.append({"round": len(self.rounds)})
        clients = cast(Mapping[ClientId, Client], self.clients)
        self.checkpoint.write(self.parts, clients, set(changed), lambda start: self.rounds[start:], values)
        saved = read_checkpoint(self.checkpoint.folder, KEY)
        assert saved is not None
        assert saved.history == self.rounds
        assert saved.values == values
        assert same(saved.parts, self.parts)
        return saved


def same(a: Mapping[Any, State], b: Mapping[Any, State]) -> bool:
    """Whether the same names hold equal tensors and values."""
    return a.keys() == b.keys() and all(
        a[n].values == b[n].values
        and a[n].tensors.keys() == b[n].tensors.keys()
        and all(torch.equal(t, b[n].tensors[m]) and t.dtype == b[n].tensors[m].dtype for m, t in a[n].tensors.items())
        for n in a
    )


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def index(folder: Path) -> Any:
    return json.loads((folder / INDEX).read_text())


def journal(folder: Path) -> list[Any]:
    [path] = folder.glob("journal-*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def writer(tmp_path: Path) -> Writer:
    return Writer(tmp_path / "run")


def test_every_part_and_client_comes_back(writer: Writer) -> None:
    shared = torch.arange(4.0)
    writer.parts = {
        "server": State({"w": shared, "half": torch.ones(2, dtype=torch.float16)}, {"held": {"1": 0}}),
        "exposure": State({"mask": torch.tensor([True, False])}),
    }
    writer.clients = {3: Holding(w=shared), 1: Holding(w=shared), 2: Holding(v=torch.zeros(1))}
    saved = writer.write(1, 2, 3, steps=4, best=None)
    assert same(saved.clients, {cid: client.held for cid, client in writer.clients.items()})
    assert files(writer.checkpoint.folder) == {INDEX, "round-1.safetensors", "journal-1.jsonl"}
    # One state between the two who hold the same, and one tensor for all three who hold it.
    [line] = journal(writer.checkpoint.folder)
    assert len(set(line["clients"].values())) == 2
    assert list(line["files"]) == ["round-1.safetensors"]


def test_a_tensor_is_written_once_for_as_long_as_it_stays_the_same(writer: Writer) -> None:
    folder = writer.checkpoint.folder
    still, moving = torch.zeros(3), torch.ones(3)
    writer.parts = {"server": State({"still": still, "moving": moving})}
    writer.write()
    writer.write()
    assert files(folder) == {INDEX, "round-1.safetensors", "journal-1.jsonl"}, "nothing new, so no new file"
    moving.add_(1)
    writer.write()
    assert files(folder) == {INDEX, "round-1.safetensors", "round-3.safetensors", "journal-1.jsonl"}
    assert index(folder)["parts"]["server"]["tensors"] == {
        "still": ["round-1.safetensors", "t0"],
        "moving": ["round-3.safetensors", "t0"],
    }
    writer.parts = {"server": State({"still": torch.zeros(3), "moving": moving})}
    writer.write()
    assert files(folder) == {INDEX, "round-3.safetensors", "round-4.safetensors", "journal-1.jsonl"}


def test_what_is_written_in_a_round_grows_with_its_cohort_and_not_with_those_before(writer: Writer) -> None:
    folder, shared = writer.checkpoint.folder, torch.zeros(2)
    sizes = []
    for round in range(30):
        cohort = range(10 + 2 * round, 12 + 2 * round)
        # One of the two keeps what it had from the server, the other a tensor of its own.
        writer.clients |= {cohort[0]: Holding(w=shared), cohort[1]: Holding(w=torch.zeros(2))}
        writer.write(*cohort)
        line = json.dumps(journal(folder)[-1])
        new = folder / f"round-{round + 1}.safetensors"
        sizes.append((len((folder / INDEX).read_text()), len(line), new.stat().st_size))
    for size in zip(*sizes[1:], strict=True):
        assert max(size) <= min(size) + 10, "a number of rounds or bytes may have a digit more"
    assert len(writer.write().clients) == 60


def test_two_names_for_one_tensor_and_views_of_one_storage_are_kept(writer: Writer) -> None:
    base = torch.arange(6.0)
    writer.parts = {"server": State({"a": base, "b": base, "c": base[:3], "d": base.view(2, 3).T})}
    writer.write()


def test_a_client_is_written_again_where_its_state_may_have_changed(writer: Writer) -> None:
    folder = writer.checkpoint.folder
    old, new = torch.zeros(2), torch.ones(2)
    writer.clients = {cid: Holding(w=old) for cid in (1, 2, 3)}
    writer.write(1, 2, 3)
    writer.clients[1] = Holding(w=new)
    writer.clients[2] = Holding(w=new)
    saved = writer.write(1, 9)  # 2 has not taken part, so nobody asks what it holds; 9 is unknown
    assert [saved.clients[cid].tensors["w"].tolist() for cid in (1, 2, 3)] == [[1, 1], [0, 0], [0, 0]]
    saved = writer.write(2)
    assert [saved.clients[cid].tensors["w"].tolist() for cid in (1, 2, 3)] == [[1, 1], [1, 1], [0, 0]]
    assert [len(line["states"]) for line in journal(folder)] == [1, 1, 0], "a state is written once"
    assert [sorted(line["clients"]) for line in journal(folder)] == [["1", "2", "3"], ["1"], ["2"]]
    writer.clients[3] = Holding(w=new)
    saved = writer.write(3)
    assert files(folder) == {INDEX, "round-2.safetensors", "journal-1.jsonl"}, "nobody holds what the first file has"
    writer.clients[3] = Holding(w=old)
    saved = writer.write(3)
    assert saved.clients[3].tensors["w"].tolist() == [0, 0], "what was let go is written anew"


def test_clients_who_join_later_are_kept(writer: Writer) -> None:
    writer.clients = {7: Holding(w=torch.zeros(1))}
    writer.write(7)
    writer.clients[12] = Holding(w=torch.ones(1))
    saved = writer.write(12)
    assert set(saved.clients) == {7, 12}
    assert same(saved.clients, {cid: client.held for cid, client in writer.clients.items()})


@pytest.mark.parametrize("gone", [INDEX, "journal-1.jsonl", "round-1.safetensors", "cut journal"])
def test_where_a_file_is_gone_everything_is_written_anew(writer: Writer, gone: str) -> None:
    folder = writer.checkpoint.folder
    writer.parts = {"server": State({"w": torch.zeros(3)})}
    writer.clients = {1: Holding(v=torch.ones(2))}
    writer.write(1)
    if gone == "cut journal":
        (folder / "journal-1.jsonl").write_bytes((folder / "journal-1.jsonl").read_bytes()[:-1])
    else:
        (folder / gone).unlink()
    saved = writer.write()
    assert same(saved.clients, {1: writer.clients[1].held})
    assert files(folder) == {INDEX, "round-2.safetensors", "journal-2.jsonl"}
    assert len((folder / "journal-2.jsonl").read_text().splitlines()) == 1


def test_what_a_crash_left_behind_the_journal_is_dropped(writer: Writer) -> None:
    folder = writer.checkpoint.folder
    writer.write()
    with (folder / "journal-1.jsonl").open("a") as journal:
        journal.write('{"history": [1], "states": {}}\n')
    assert read_checkpoint(folder, KEY) is not None
    writer.write()
    assert len((folder / "journal-1.jsonl").read_text().splitlines()) == 2


def test_files_of_others_are_left_alone(writer: Writer) -> None:
    writer.write()
    for name in ("notes.txt", "round-9.safetensors", "journal-9.jsonl"):
        (writer.checkpoint.folder / name).write_text("x")
    writer.write()
    assert files(writer.checkpoint.folder) == {INDEX, "journal-1.jsonl", "notes.txt"}


def test_an_index_says_what_there_is(writer: Writer) -> None:
    folder = writer.checkpoint.folder
    writer.clients = {10: Holding(), 2: Holding()}
    writer.write(2, 10, steps=1)
    found = index(folder)
    assert set(found) == {"key", "rounds", "journal", "parts", "values", "checksum"}
    assert (found["key"], found["rounds"], found["values"]) == (KEY, 1, {"steps": 1})
    assert found["journal"][:2] == ["journal-1.jsonl", (folder / "journal-1.jsonl").stat().st_size]
    assert " " not in (folder / INDEX).read_text(), "as short as it can be"


def test_there_is_none_for_another_key_or_an_empty_folder(writer: Writer, tmp_path: Path) -> None:
    assert read_checkpoint(tmp_path / "nothing", KEY) is None
    writer.write()
    assert read_checkpoint(writer.checkpoint.folder, "other") is None


@pytest.mark.parametrize("text", ["", "{", "[]", "1", "{}", '{"key": 1}', "[" * 100_000])
def test_what_is_no_index_is_damage(writer: Writer, text: str) -> None:
    writer.write()
    path = writer.checkpoint.folder / INDEX
    path.write_text(text)
    with pytest.raises(DamagedFileError) as caught:
        read_checkpoint(writer.checkpoint.folder, KEY)
    assert str(caught.value).startswith(f"{path}: not a whole checkpoint: ")
    assert str(caught.value).endswith("; delete its folder")


@pytest.mark.parametrize(("field", "value"), [("rounds", 7), ("values", {"steps": 9}), ("parts", {"server": {}})])
def test_a_changed_index_is_damage(writer: Writer, field: str, value: object) -> None:
    writer.write()
    folder = writer.checkpoint.folder
    (folder / INDEX).write_text(json.dumps(index(folder) | {field: value}))
    with pytest.raises(DamagedFileError, match="its checksum is another"):
        read_checkpoint(folder, KEY)


def test_a_changed_or_cut_journal_is_damage(writer: Writer) -> None:
    writer.write()
    path = writer.checkpoint.folder / "journal-1.jsonl"
    content = path.read_text()
    for damaged in (content.replace('"round":0', '"round":1'), content[:-1]):
        path.write_text(damaged)
        with pytest.raises(DamagedFileError, match="journal-1.jsonl is not what was written"):
            read_checkpoint(writer.checkpoint.folder, KEY)


def test_tensors_of_another_checkpoint_are_damage(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for i, folder in enumerate(folders):
        writer = Writer(folder)
        writer.parts = {"server": State({"w": torch.full((3,), float(i))})}
        writer.write()
    (folders[0] / "round-1.safetensors").replace(folders[1] / "round-1.safetensors")
    with pytest.raises(DamagedFileError, match="round-1.safetensors: does not hold what was written"):
        read_checkpoint(folders[1], KEY)
