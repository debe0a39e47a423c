"""The server's view of its silos: which are there, what each is owed, and the clients' side of a run made of them all.

A silo that gives no answer in time is left out, as if its clients had dropped out of the round: the round ends with the
others. When it is back, it is first delivered what its clients were sent meanwhile.
"""

from __future__ import annotations

import queue
import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fedbench.api.messages import ClientId, State
from fedbench.data.examples import Examples
from fedbench.errors import FedbenchError, MessageError
from fedbench.machine.stopwatch import Stopwatch
from fedbench.run.checkpoint import Held
from fedbench.run.hosts.letters import Packing, seal, unseal
from fedbench.run.hosts.side import Outbox, Trained
from fedbench.run.hosts.silo import NEVER, read_trained, silo_of
from fedbench.run.payloads import Parcel


class Carrier(Protocol):
    """Carries letters to silos; what comes from them it hands to `Hub.arrived`."""

    def send(self, silo: int, number: int, letter: bytes) -> None:
        """Send question `number`, without waiting for it to arrive; one that cannot is told to `Hub.unreachable`."""

    def welcome(self, silo: int, letter: bytes) -> None:
        """Send the answer to a silo that has said it is there; whether it arrives matters to nobody else."""

    def bytes_carried(self) -> Mapping[str, Mapping[str, int]]:
        """Messages and their bytes, `down` and `up`, with all that the runtime puts around letters."""

    def close(self, silos: Sequence[int]) -> None:
        """Tell these silos that the run is complete, and end."""


@dataclass
class Seat:
    """What the server knows of a silo.

    session: of the silo's process; empty before one has come. here: it answers. fresh: it has not been asked anything
    since it came. confirmed: the last round that it answered. until: the round that a resumed run goes on from, until
    the silo has answered once. owed: what its clients were sent in rounds that it has not confirmed.
    """

    silo: int
    session: str = ""
    here: bool = False
    fresh: bool = True
    confirmed: int = NEVER
    until: int | None = None
    owed: dict[int, dict[ClientId, Sequence[Parcel]]] = field(default_factory=dict)

    def confirm(self, round: int) -> None:
        """It has answered, and has taken in all it was sent up to `round`."""
        self.confirmed, self.until = max(self.confirmed, round), None
        self.owed = {r: sent for r, sent in self.owed.items() if r > round}


class Hub:
    """The clients' side of a run, spread over silos.

    carrier: made with this hub. identity: everything that decides the run's result, in which the silos have to agree.
    patience: seconds that a silo is given for an answer. say: tells the user of a silo that is lost or back.
    """

    def __init__(
        self,
        silos: int,
        identity: Mapping[str, Any],
        patience: float,
        carrier: Callable[[Hub], Carrier],
        say: Callable[[str], None],
    ) -> None:
        self.identity, self.patience, self.say = identity, patience, say
        self.seats = {silo: Seat(silo) for silo in range(1, silos + 1)}
        self.time = Stopwatch()
        self._run = secrets.token_hex(8)  # what the silos keep is of this run, not of an earlier one of the same key
        self.lost: list[list[Any]] = []  # round, silo, why
        self.payload_bytes = {"down": 0, "up": 0}
        self._round = NEVER
        self._known: set[ClientId] = set()
        self._order: list[int] = []  # silos by who trained first in the last round
        self._number, self._complete = 0, False
        self._tensors: dict[int, tuple[Parcel, Tensor]] = {}
        # The silo; its letter, or the question it could not be sent and why; whether the letter is a hello.
        self._events: queue.Queue[tuple[int, bytes | tuple[int, str], bool]] = queue.Queue()
        self._carrier = carrier(self)

    # What a carrier tells, from threads of its own.

    def arrived(self, silo: int, letter: bytes) -> None:
        """A silo has sent an answer."""
        self._events.put((silo, letter, False))

    def came(self, silo: int, letter: bytes) -> None:
        """A silo says that it is there."""
        self._events.put((silo, letter, True))

    def unreachable(self, silo: int, number: int, why: str) -> None:
        """A silo could not be sent question `number`."""
        self._events.put((silo, (number, why), False))

    # Asking.

    def gather(self, seconds: float) -> list[int]:
        """Wait until all silos are there, or for so many seconds; those that are missing."""
        end = time.monotonic() + seconds
        while missing := [seat.silo for seat in self.seats.values() if not seat.here]:
            left = end - time.monotonic()
            if left <= 0:
                return missing
            self._ask({}, left, lambda: all(seat.here for seat in self.seats.values()))
        return []

    def _ask(
        self,
        questions: Mapping[int, tuple[dict[str, Any], Sequence[bytes]]],
        seconds: float,
        enough: Callable[[], bool] = lambda: False,
    ) -> dict[int, tuple[dict[str, Any], list[bytes]]]:
        """Ask silos, and wait for the answers of those that give one. Raises what a silo's method raised.

        Without questions it waits until `enough` says so, or for the time.
        """
        waiting: dict[int, int] = {}
        for silo, (about, payloads) in questions.items():
            seat = self.seats[silo]
            if seat.fresh:
                until = self._round if seat.until is None else seat.until
                about, seat.fresh = about | {"begin": [self._run, until, seat.confirmed]}, False
            self._number += 1
            waiting[silo] = self._number
            letter = seal(about | {"number": self._number, "session": seat.session}, payloads)
            self._carrier.send(silo, self._number, letter)
        answers: dict[int, tuple[dict[str, Any], list[bytes]]] = {}
        end = time.monotonic() + seconds
        while (waiting or not questions) and not enough():
            try:
                silo, event, hello = self._events.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                for silo in waiting:
                    self._left(silo, f"no answer within {seconds:g} s")
                break
            try:
                if silo not in self.seats:
                    continue
                if isinstance(event, tuple):
                    number, why = event
                    if number == waiting.get(silo):
                        del waiting[silo]
                        self._left(silo, why)
                    continue
                about, payloads = unseal(event)
                if hello:
                    if self._greet(silo, about) and waiting.pop(silo, 0):
                        self._note(silo, "its process was started anew")
                    continue
                seat, done = self.seats[silo], int(about["done"])
                if about["number"] == waiting.get(silo):
                    del waiting[silo]
                    if "lost" in about:
                        self._left(silo, str(about["lost"]))
                        continue
                    answers[silo] = about, payloads
                elif not seat.fresh and not seat.here:
                    self._back(seat)  # too late for what it was asked, but it is there
                if not seat.fresh:
                    seat.confirm(done)
            except (MessageError, KeyError, TypeError, ValueError) as error:
                self.say(f"a letter of silo {silo} cannot be read: {error}")
        for silo, (about, _) in sorted(answers.items()):
            if "error" in about:
                raise FedbenchError(f"silo {silo}: {about['error']}")
            if "fault" in about:
                raise RuntimeError(f"silo {silo}: {about['fault']}")
        return answers

    def _greet(self, silo: int, about: Mapping[str, Any]) -> bool:
        """Answer a silo that says it is there; whether another process of it was there before."""
        seat, session = self.seats[silo], str(about["session"])
        why = None
        if unlike := sorted(differing(self.identity, about["identity"])):
            why = (
                f"the server's run differs from the silo's in {', '.join(unlike)}; give both sides the same options, "
                "data and FM"
            )
        elif about["silos"] != len(self.seats):
            why = f"the server counts on {len(self.seats)} silos, not {about['silos']}; give both one address file"
        self._carrier.welcome(silo, seal({"session": session, "refused": why}))
        if why is not None:
            self.say(f"silo {silo} is refused: {why}")
            return False
        other = seat.session not in ("", session)
        if session != seat.session:
            seat.fresh = True
        if not seat.here:
            self._back(seat)
        seat.session = session
        return other

    def _back(self, seat: Seat) -> None:
        if seat.session and self._round > NEVER:
            self.say(f"silo {seat.silo} is back")
        seat.here = True

    def _left(self, silo: int, why: str) -> None:
        self.seats[silo].here = False
        self._note(silo, why)

    def _note(self, silo: int, why: str) -> None:
        self.lost.append([self._round, silo, why])
        self.say(f"round {self._round + 1} goes on without silo {silo}: {why}")

    # The clients' side, as the loop sees it.

    def train(
        self, round: int, outbox: Outbox, staying: Sequence[ClientId], report: Callable[[float], None]
    ) -> dict[ClientId, Trained]:
        self._round = round
        self._known |= set(outbox)
        for cid, parcels in outbox.items():
            self.seats[self._silo(cid)].owed.setdefault(round, {})[cid] = parcels
        self._ask({}, 0)  # who has come meanwhile
        if not any(seat.here for seat in self.seats.values()):
            self._ask({}, self.patience, lambda: any(seat.here for seat in self.seats.values()))
        questions = {}
        for silo in sorted({self._silo(cid) for cid in outbox}):
            if self.seats[silo].here:
                questions[silo] = self._deliveries(self.seats[silo], round, staying)
            else:
                self._note(silo, "it is not there")
        with self.time("local"):
            answers = self._ask(questions, self.patience) if questions else {}
        if not any(seat.here for seat in self.seats.values()):
            whys = dict(sorted((silo, why) for _, silo, why in self.lost))
            raise FedbenchError(
                f"no silo is left in round {round + 1}: {'; '.join(f'silo {s}: {why}' for s, why in whys.items())}; "
                "start them and give the same command again, which goes on after the last finished round"
            )
        found: dict[ClientId, Trained] = {}
        for silo, (about, payloads) in answers.items():
            trained = read_trained(silo, about.get("trained"), payloads)
            if set(trained) != {cid for cid in staying if self._silo(cid) == silo}:
                raise FedbenchError(f"silo {silo}: answered for other clients than it was asked for")
            self.payload_bytes["up"] += sum(map(len, payloads))
            found |= trained
        self._order = list(dict.fromkeys(self._silo(cid) for cid in staying if cid in found))
        ordered = {cid: found[cid] for cid in staying if cid in found}
        for each in ordered.values():
            report(each.loss)
        return ordered

    def train_all(self, round: int, outbox: Outbox, staying: Sequence[ClientId]) -> dict[ClientId, Trained]:
        """`train` for whoever cannot be told of each client as it is done."""
        return self.train(round, outbox, staying, lambda loss: None)

    def _silo(self, client: ClientId) -> int:
        return silo_of(client, len(self.seats))

    def _deliveries(
        self, seat: Seat, round: int, staying: Sequence[ClientId]
    ) -> tuple[dict[str, Any], Sequence[bytes]]:
        """All that a silo is owed, and who of it is to train in this round."""
        packing = Packing()
        deliveries = [
            {
                "round": r,
                "outbox": {str(cid): [packing.add(parcel) for parcel in parcels] for cid, parcels in sent.items()},
                "staying": [cid for cid in staying if cid in sent] if r == round else [],
            }
            for r, sent in sorted(seat.owed.items())
        ]
        self.payload_bytes["down"] += sum(map(len, packing.payloads))
        return {"what": "train", "deliveries": deliveries}, packing.payloads

    def step_flops(self) -> int | None:
        for silo in self._order:
            if self.seats[silo].here:
                for about, _ in self._ask({silo: ({"what": "step_flops"}, ())}, self.patience).values():
                    return None if about.get("value") is None else int(about["value"])
        return None

    def personal(self, outbox: Outbox, tests: Mapping[ClientId, Examples], size: int) -> dict[ClientId, float]:
        raise FedbenchError("clients' own models are not scored here: no test rows lie at a silo")

    def report(self) -> dict[str, Any]:
        here = {seat.silo: ({"what": "report"}, ()) for seat in self.seats.values() if seat.here}
        answers = self._ask(here, self.patience).values() if here else ()
        held = [about["value"]["resident_parameters"] or 0 for about, _ in answers if about.get("value")]
        return {"resident_parameters": max(held, default=0) or None}

    def seconds(self) -> dict[str, float]:
        return dict(self.time.seconds)

    # Checkpoints: what clients keep stays in their silo; here is kept what the silos have yet to be sent.

    def known(self) -> list[ClientId]:
        """The clients that were sampled so far."""
        return sorted(self._known)

    def state_of(self, cid: ClientId) -> State:
        """Which round its silo has confirmed, and what the client has yet to be sent."""
        seat = self.seats[self._silo(cid)]
        tensors: dict[str, Tensor] = {}
        owed = []
        for round, sent in sorted(seat.owed.items()):
            for parcel in sent.get(cid, ()):
                name = f"payload.{len(tensors)}"
                tensors[name] = self._as_tensor(parcel)
                owed.append([round, parcel.kind, parcel.elements, name])
        return State(tensors, {"run": self._run, "round": self._round, "confirmed": seat.confirmed, "owed": owed})

    def _as_tensor(self, parcel: Parcel) -> Tensor:
        """The payload as a tensor, one and the same for all who are owed it, so that it is written once."""
        if id(parcel) not in self._tensors:
            assert parcel.payload is not None
            self._tensors[id(parcel)] = parcel, torch.frombuffer(bytearray(parcel.payload), dtype=torch.uint8)
        return self._tensors[id(parcel)][1]

    def states(self) -> Mapping[ClientId, Held]:
        owed = [parcels for seat in self.seats.values() for sent in seat.owed.values() for parcels in sent.values()]
        needed = {id(parcel) for parcels in owed for parcel in parcels}
        self._tensors = {each: kept for each, kept in self._tensors.items() if each in needed}
        return _States(self)

    def restore(self, states: Mapping[ClientId, State]) -> None:
        parcels: dict[int, Parcel] = {}
        for cid, state in states.items():
            seat = self.seats[self._silo(cid)]
            self._known.add(cid)
            self._run = state.values["run"]
            self._round = max(self._round, state.values["round"])
            seat.confirmed = max(seat.confirmed, state.values["confirmed"])
            for round, kind, elements, name in state.values["owed"]:
                tensor = state.tensors[name]
                payload = tensor.numpy().tobytes()
                parcel = parcels.setdefault(id(tensor), Parcel(kind, len(payload), elements, payload))
                seat.owed.setdefault(round, {}).setdefault(cid, [])
                seat.owed[round][cid] = [*seat.owed[round][cid], parcel]
        for seat in self.seats.values():
            seat.confirm(seat.confirmed)
            seat.fresh, seat.until = True, self._round

    def account(self) -> dict[str, Any]:
        """What the silos and the way to them cost beside the messages of the ledger, since this process began.

        To be asked once, when the run is complete.
        """
        carried: Mapping[str, Mapping[str, int]] = self._carrier.bytes_carried()
        account: dict[str, dict[str, int]] = defaultdict(dict)
        for way, found in carried.items():
            account[way] = {**found, "payload_bytes": self.payload_bytes[way]}
        self._complete = True
        return {"silos": len(self.seats), **account, "lost": self.lost}

    def close(self) -> None:
        """End the run in all silos that are there, if it is complete; else they wait for a server that goes on."""
        self._carrier.close([seat.silo for seat in self.seats.values() if seat.here and self._complete])


def differing(mine: Mapping[str, Any], theirs: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Dotted names in which two identities of runs differ; a silo that has no weights knows no hash of them."""
    for name in mine.keys() | theirs.keys():
        a, b, below = mine.get(name), theirs.get(name), f"{path}.{name}" if path else name
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from differing(a, b, below)
        elif a != b and (below, b) != ("fm_hash", ""):
            yield below


class _States(Mapping[ClientId, Held]):
    """The states of clients, made when they are asked for."""

    def __init__(self, hub: Hub) -> None:
        self._hub, self._known = hub, frozenset(hub.known())

    def __getitem__(self, client: ClientId) -> Held:
        if client not in self._known:
            raise KeyError(client)
        return _Client(self._hub, client)

    def __iter__(self) -> Iterator[ClientId]:
        return iter(sorted(self._known))

    def __len__(self) -> int:
        return len(self._known)


@dataclass(frozen=True)
class _Client:
    hub: Hub
    client: ClientId

    def state(self) -> State:
        return self.hub.state_of(self.client)
