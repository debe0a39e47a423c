"""A silo: the clients' side of a run for some of the clients, which answers the letters of a server.

What its clients keep between rounds stays in the silo: it writes it down after every round, before it answers, so that
it can go on after its process was killed, and after the server's was.
"""

from __future__ import annotations

import shutil
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedbench.api.messages import ClientId
from fedbench.errors import DamagedFileError, FedbenchError, MessageError
from fedbench.run.checkpoint import Checkpoint, read_checkpoint
from fedbench.run.hosts.letters import Packing, Unpacking, seal, unseal
from fedbench.run.hosts.side import ClientSide, Trained

NEVER = -1
"""The round before the first."""


def silo_of(client: ClientId, silos: int) -> int:
    """The silo, from 1 on, that holds a client: they are dealt out in turn."""
    return client % silos + 1


class Memory:
    """What the clients of a silo keep, as it was after the last two rounds that any of them took part in.

    Two, because a server that is stopped in the middle of a round goes on from the end of the one before.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key, self.run = folder, key, ""
        self._forget()

    def _forget(self) -> None:
        self._slots = [Checkpoint(self.folder / name, self.key) for name in ("a", "b")]
        self._changed: list[set[ClientId]] = [set(), set()]
        self._next = 0

    def clear(self) -> None:
        """Keep nothing any more: the run is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def write(self, side: ClientSide, round: int, changed: set[ClientId]) -> None:
        """Keep what the clients hold after `round`, in place of the older of the two. `changed`: who took part."""
        for each in self._changed:
            each |= changed
        # An entry for each round so far: the number of entries is what its files are called after.
        self._slots[self._next].write(
            {},
            side.states(),
            self._changed[self._next],
            lambda start: [None] * (round + 1 - start),
            {"run": self.run},
        )
        self._changed[self._next] = set()
        self._next = 1 - self._next

    def take_up(self, side: ClientSide, run: str, until: int) -> int:
        """Make the clients what they were after a round of `run` no later than `until`; which round, or `NEVER`."""
        self.run = run
        self._forget()
        side.clients.clear()
        found = []
        for index, slot in enumerate(self._slots):
            try:
                saved = read_checkpoint(slot.folder, self.key)
            except DamagedFileError:
                saved = None  # its process ended in the middle of writing it; there is the other one
            if saved is not None and saved.values["run"] == run and len(saved.history) - 1 <= until:
                found.append((len(saved.history) - 1, index, saved))
            else:  # of another run, or of a round that is to be made again
                shutil.rmtree(slot.folder, ignore_errors=True)
        if not found:
            return NEVER
        round, index, saved = max(found, key=lambda each: each[0])
        side.restore(saved.clients)
        self._next = 1 - index
        return round


class Silo:
    """Answers the letters of a server about the clients of one silo."""

    def __init__(self, number: int, side: ClientSide, memory: Memory, session: str) -> None:
        """session: of this process; a letter to the one before it, which was under way, is not answered."""
        self.number, self.side, self.memory, self.session = number, side, memory, session
        self.done = NEVER
        self.lost: str | None = None  # why it can be of no further use

    def answer(self, letter: bytes) -> bytes | None:
        """The answer to a letter, None for one that is not for this process; what goes wrong is said in it.

        Raises MessageError for bytes that are no letter.
        """
        about, payloads = unseal(letter)
        if about.get("session") != self.session:
            return None
        packing = Packing()
        said: dict[str, Any]
        try:
            if "begin" in about:
                self._begin(*about["begin"])
            if about["what"] == "train":
                trained = self._train(about["deliveries"], Unpacking(payloads))
                said = {"trained": {str(cid): _written(result, packing) for cid, result in trained.items()}}
            else:
                said = {"value": self.side.report() if about["what"] == "report" else self.side.step_flops()}
        except LostError as error:
            self.lost = str(error)
            said = {"lost": self.lost}
        except FedbenchError as error:
            said = {"error": str(error)}
        except Exception as error:  # a method may raise anything
            said = {"fault": f"{type(error).__name__}: {error}\n{traceback.format_exc(limit=-3)}"}
        return seal({"number": about["number"], "done": self.done, **said}, packing.payloads)

    def _begin(self, run: str, until: int, confirmed: int) -> None:
        """Be as after a round of `run` no later than `until`. confirmed: the last one that the server knows of."""
        self.done = self.memory.take_up(self.side, run, until)
        if self.done < confirmed:
            have = "nothing of this run" if self.done == NEVER else f"them as after round {self.done + 1}"
            raise LostError(
                f"silo {self.number} has lost what its clients keep: they are needed as after round {confirmed + 1}, "
                f"and {self.memory.folder} holds {have}; bring that folder back, or start the run anew"
            )

    def _train(self, deliveries: Sequence[Mapping[str, Any]], unpacking: Unpacking) -> dict[ClientId, Trained]:
        """Take in what was sent in each round; train those who stay in the last."""
        trained: dict[ClientId, Trained] = {}
        for each in deliveries:
            if each["round"] <= self.done:
                continue
            outbox = {int(cid): [unpacking.parcel(p) for p in parcels] for cid, parcels in each["outbox"].items()}
            trained = self.side.train_all(each["round"], outbox, each["staying"])
            self.memory.write(self.side, each["round"], set(outbox))
            self.done = each["round"]
        return trained


class LostError(FedbenchError):
    """A silo no longer has what its clients keep."""


def _written(trained: Trained, packing: Packing) -> dict[str, Any]:
    return {
        "steps": trained.steps,
        "loss": trained.loss,
        "most": dict(trained.most),
        "upload": [packing.add(parcel) for parcel in trained.upload],
        "refused": trained.refused,
        "flops": trained.flops,
    }


def read_trained(silo: int, said: Any, payloads: Sequence[bytes]) -> dict[ClientId, Trained]:
    """What each client sent back, out of a silo's answer. Raises FedbenchError for one that does not say so."""
    unpacking = Unpacking(payloads)
    found = {}
    try:
        for cid, each in said.items():
            upload = [unpacking.parcel(parcel) for parcel in each["upload"]]
            most = {str(name): int(value) for name, value in each["most"].items()}
            steps, flops = int(each["steps"]), each["flops"]
            flops = None if flops is None else int(flops)
            found[int(cid)] = Trained(steps, float(each["loss"]), most, upload, each["refused"], flops)
    except (MessageError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise FedbenchError(f"silo {silo}: its answer cannot be read: {type(error).__name__}: {error}") from None
    return found
