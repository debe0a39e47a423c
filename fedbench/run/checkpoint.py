"""Checkpoints: what a run needs to go on after a round, whole at any moment, checked before it is used.

A folder holds an index, a journal, and files of tensors. The journal has what a round adds (what crossed, what came of
the round, states of clients that are new, whose they are, the checksum of a new file); the files have tensors, each
written once for as long as it stays the same. So what is written in all grows with the number of rounds, not with its
square, however large the population and however many of it were sampled so far. The index is written last, and has the
checksum of the journal: what the two do not name is not part of the checkpoint, and what does not agree is damage.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from fedbench.api.messages import ClientId, State
from fedbench.compat import writes
from fedbench.errors import DamagedFileError
from fedbench.files import append_text, load_tensors, save_tensors, write_text
from fedbench.run.journal import INDEX, checksum, read_journal, text

Block = dict[str, Any]


class Held(Protocol):
    """Whatever has a state that can be asked for."""

    def state(self) -> State: ...


@dataclass(frozen=True)
class Saved:
    """A checkpoint as it was written.

    parts: states by name. clients: states of those who were sampled so far. history: one entry a round. values: plain
    values as they were after the last round.
    """

    parts: Mapping[str, State]
    clients: Mapping[ClientId, State]
    history: list[Any]
    values: Mapping[str, Any]


@dataclass(frozen=True)
class _Place:
    """Where a file holds a tensor as it was at `version`. The tensor is kept, so that its id stays its own."""

    tensor: Tensor
    version: int
    file: str
    name: str


@dataclass(frozen=True)
class _Kept:
    """A state that is in the journal: what stands there, and the places of its tensors by id."""

    block: Block
    places: Mapping[int, _Place]


class Checkpoint:
    """Writes the checkpoints of one run into one folder, which is the run's alone."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key
        self._forget()

    def _forget(self) -> None:
        """Take nothing for written."""
        self._files: dict[str, str] = {}  # name -> checksum
        self._places: dict[int, _Place] = {}
        self._states: dict[str, _Kept] = {}
        self._held: dict[ClientId, str] = {}
        self._holders: Counter[str] = Counter()  # clients by state
        self._rounds = 0
        self._journal, self._length, self._digest = "", 0, hashlib.sha256()

    def _whole(self) -> bool:
        """Whether all that was written is still there."""
        journal = self.folder / self._journal
        return (
            (self.folder / INDEX).is_file()
            and journal.is_file()
            and journal.stat().st_size >= self._length
            and all((self.folder / name).is_file() for name in self._files)
        )

    def write(
        self,
        parts: Mapping[str, State],
        clients: Mapping[ClientId, Held],
        changed: Set[ClientId],
        history: Callable[[int], list[Any]],
        values: Mapping[str, Any],
    ) -> None:
        """Write the checkpoint after a round; until it is done, the one before stays.

        changed: the clients whose state may be another than at the last checkpoint. history: gives the entries of all
        rounds from one on; an entry never changes. Raises FedbenchError where the folder cannot be written.
        """
        if self._rounds and not self._whole():
            self._forget()
        added = history(self._rounds)
        rounds = self._rounds + len(added)
        # Files of names of their own: what the index names is not touched before the next index is there.
        file = f"round-{rounds}.safetensors"
        self._journal = self._journal or f"journal-{rounds}.jsonl"
        new: dict[str, Tensor] = {}
        places: dict[int, _Place] = {}

        def put(state: State) -> _Kept:
            names: dict[str, list[str]] = {}
            own: dict[int, _Place] = {}
            for name, tensor in state.tensors.items():
                place = places.get(id(tensor)) or self._places.get(id(tensor))
                if place is None or place.version != writes(tensor):
                    place = _Place(tensor, writes(tensor), file, f"t{len(new)}")
                    new[place.name] = tensor.detach().clone()  # two names may share a storage, which files cannot
                own[id(tensor)] = places[id(tensor)] = place
                names[name] = [place.file, place.name]
            return _Kept({"tensors": names, "values": dict(state.values)}, own)

        blocks = {name: put(state).block for name, state in parts.items()}
        states: dict[str, Block] = {}
        whose: dict[str, str] = {}
        for cid in clients if self._rounds == 0 else sorted(changed & clients.keys()):
            kept = put(clients[cid].state())
            # Clients that hold the same have one state between them.
            name = hashlib.sha256(text(kept.block).encode()).hexdigest()[:16]
            if name not in self._states:
                self._states[name], states[name] = kept, kept.block
            if (before := self._held.get(cid)) != name:
                self._holders[name] += 1
                if before is not None:
                    self._holders[before] -= 1
                self._held[cid] = whose[str(cid)] = name
        for name in [name for name in self._states if not self._holders[name]]:
            del self._states[name], self._holders[name]
        for kept in self._states.values():
            places.update(kept.places)
        files = {place.file: self._files.get(place.file, "") for place in places.values()}
        if new:
            files[file] = save_tensors(self.folder / file, new, {})
        sums = {file: files[file]} if new else {}
        line = text({"history": added, "states": states, "clients": whose, "files": sums}) + "\n"
        append_text(self.folder / self._journal, line, self._length)
        self._length += len(line.encode())
        self._digest.update(line.encode())
        index = {
            "key": self.key,
            "rounds": rounds,
            "journal": [self._journal, self._length, self._digest.hexdigest()],
            "parts": blocks,
            "values": dict(values),
        }
        write_text(self.folder / INDEX, text(index | {"checksum": checksum(index)}))
        self._files, self._places, self._rounds = files, places, rounds
        for path in (*self.folder.glob("round-*.safetensors"), *self.folder.glob("journal-*.jsonl")):
            if path.name not in files and path.name != self._journal:
                path.unlink()


def read_checkpoint(folder: Path, key: str) -> Saved | None:
    """The checkpoint of the run of `key` in `folder`; None where there is none.

    Raises DamagedFileError, naming the file, for one that is not what was written.
    """
    found = read_journal(folder, key)
    if found is None:
        return None
    index, lines = found
    try:
        held = {int(cid): name for line in lines for cid, name in line["clients"].items()}
        blocks = {name: block for line in lines for name, block in line["states"].items()}
        states = {name: blocks[name] for name in sorted(set(held.values()))}
        sums = {name: digest for line in lines for name, digest in line["files"].items()}
        wanted = {f for block in (*index["parts"].values(), *states.values()) for f, _ in block["tensors"].values()}
    except KeyError as error:  # written by another version
        raise DamagedFileError(f"{folder / INDEX}: not a whole checkpoint: no {error}; delete its folder") from None
    files = {name: load_tensors(folder / name, sums[name])[0] for name in sorted(wanted)}

    def get(block: Mapping[str, Any]) -> State:
        return State({name: files[file][place] for name, (file, place) in block["tensors"].items()}, block["values"])

    known = {name: get(block) for name, block in states.items()}
    return Saved(
        {name: get(block) for name, block in index["parts"].items()},
        {cid: known[held[cid]] for cid in sorted(held)},
        [entry for line in lines for entry in line["history"]],
        index["values"],
    )
