"""A run over silos: the hub and the silos themselves, with threads in the place of FedML."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from helpers import save_tiny_bert, smoke_request

from fedbench.api.messages import ClientId
from fedbench.data.clients import ClientRows
from fedbench.errors import FedbenchError
from fedbench.records.differences import comparable, differences
from fedbench.records.record import Record
from fedbench.run.hosts.here import Here
from fedbench.run.hosts.hub import Hub
from fedbench.run.hosts.letters import seal, unseal
from fedbench.run.hosts.make import make_clients, make_server
from fedbench.run.hosts.side import ClientSide, Host, Outbox, Trained
from fedbench.run.hosts.silo import Memory, Silo, silo_of
from fedbench.run.loop import Run
from fedbench.run.prepare import Prepared, prepare
from fedbench.run.progress import Silent
from fedbench.run.record import finish
from fedbench.run.run import run
from fedbench.run.sides import server_part, silo_part

ALIGNED = {"t": "1", "r": "6", "distil_steps": "2", "align_steps": "2"}


class Threads:
    """Carries letters to silos in threads of this process. A silo that is killed answers nothing any more."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.refused: dict[int, str | None] = {}
        self.silos: dict[int, tuple[Silo, queue.Queue[bytes | None]]] = {}
        self.one_at_a_time = threading.Lock()
        self.letters: list[dict[str, Any]] = []
        self.kill_at: dict[int, Callable[[dict[str, Any]], bool]] = {}
        self.before_answer: Callable[[int], None] = lambda silo: None

    def start(self, silo: Silo, identity: Mapping[str, Any], silos: int) -> None:
        mailbox: queue.Queue[bytes | None] = queue.Queue()
        self.silos[silo.number] = silo, mailbox
        threading.Thread(target=self._answer, args=(silo, mailbox), daemon=True).start()
        self.hub.came(silo.number, seal({"session": silo.session, "identity": dict(identity), "silos": silos}))

    def _answer(self, silo: Silo, mailbox: queue.Queue[bytes | None]) -> None:
        while (letter := mailbox.get()) is not None:
            with self.one_at_a_time:  # building a model sets switches of the whole process
                answer = silo.answer(letter)
            self.before_answer(silo.number)
            if answer is not None and self.silos.get(silo.number, (None,))[0] is silo:
                self.hub.arrived(silo.number, answer)

    def send(self, silo: int, number: int, letter: bytes) -> None:
        about, _ = unseal(letter)
        self.letters.append(about)
        dies = self.kill_at.get(silo)
        if silo in self.silos and dies and dies(about):
            self.kill(silo)  # the letter was on its way
        elif silo in self.silos:
            self.silos[silo][1].put(letter)
        else:
            self.hub.unreachable(silo, number, "it cannot be reached")

    def welcome(self, silo: int, letter: bytes) -> None:
        self.refused[silo] = unseal(letter)[0]["refused"]

    def kill(self, silo: int) -> None:
        self.silos.pop(silo)[1].put(None)

    def bytes_carried(self) -> Mapping[str, Mapping[str, int]]:
        return {"down": {}, "up": {}}

    def close(self, silos: Sequence[int]) -> None:
        for silo in list(self.silos):
            self.kill(silo)


class Silos(Host):
    name: ClassVar[str] = "silos"
    one_process: ClassVar[bool] = False
    patience: ClassVar[float] = 60.0
    count: ClassVar[int] = 2

    def __init__(self, prepared: Prepared, rows: ClientRows, label_counts: Sequence[Sequence[int]]) -> None:
        p = self.p = prepared
        self.rows, self.said, self.sessions = rows, [], 0
        self.keeps = f"--host silos --silos {self.count}"
        self.server = make_server(
            p.brief, p.method, p.loaded.fm, p.loaded.public, p.held_out, label_counts, bytes_only=True
        )
        self.hub = self.clients = Hub(self.count, p.identity, self.patience, Threads, self.said.append)
        for silo in range(1, self.count + 1):
            self.start(silo)
        assert self.hub.gather(10) == []

    @property
    def threads(self) -> Threads:
        carrier = self.hub._carrier
        assert isinstance(carrier, Threads)
        return carrier

    def folder(self, silo: int) -> Path:
        return self.p.request.results / f"silo-{silo}"

    def start(self, number: int) -> None:
        own = self.rows.only([cid for cid in self.rows if silo_of(cid, self.count) == number])
        side = make_clients(self.p.brief, self.p.method, own)
        self.sessions += 1
        silo = Silo(number, side, Memory(self.folder(number), self.p.key), f"session {self.sessions}")
        self.threads.start(silo, self.p.identity, self.count)

    def account(self) -> dict[str, Any]:
        return self.hub.account()

    def close(self) -> None:
        self.hub.close()


def prepared(folder: Path, method: str = "fedpft", **settings: str) -> Prepared:
    bert = save_tiny_bert(folder / "bert")
    chosen = {"lr": "1e-2", "rounds": "4", "evaluation.every": "2", "federation.fraction": "0.5", **settings}
    return prepare(replace(smoke_request(folder, method, "tweets-noniid", bert, **chosen), workers=1))


def same(a: Record, b: Record) -> None:
    assert comparable(a) == comparable(b), differences(a, b)


def of_silo(host: Silos, silo: int, clients: Sequence[int]) -> list[int]:
    return [cid for cid in clients if silo_of(cid, host.count) == silo]


@pytest.fixture
def asked(tmp_path: Path) -> Iterator[Prepared]:
    return prepared(tmp_path, **ALIGNED)


@pytest.mark.parametrize("method", ["fedpft", "fedavg-lora"])
def test_the_record_over_silos_is_the_one_of_one_process(tmp_path: Path, method: str) -> None:
    settings = ALIGNED if method == "fedpft" else {"federation.dropout": "0.3", "federation.max_update_norm": "0.05"}
    asked = prepared(tmp_path, method, **settings)
    over = run(replace(asked, host=Silos))
    same(run(asked), over)
    assert over.provenance.runtime["silos"] == 2
    assert over.provenance.runtime["lost"] == []
    assert over.provenance.runtime["down"]["payload_bytes"] <= over.communication.down.bytes


def test_silos_hold_the_rows_of_their_clients_alone_and_the_server_sends_a_model_once_to_each(asked: Prepared) -> None:
    this = Run(asked, Silent(), Silos)
    assert isinstance(this.host, Silos)
    with this.host:
        this.loop(None, until=1)
        held = [set(silo.side.rows) for silo, _ in this.host.threads.silos.values()]
        assert held[0].isdisjoint(held[1])
        assert held[0] | held[1] == set(range(len(this.rows)))
        first = [letter for letter in this.host.threads.letters if letter["what"] == "train"]
        places = [
            [place for parcels in letter["deliveries"][0]["outbox"].values() for *_, place in parcels]
            for letter in first
        ]
        assert all(set(each) == {0, 1} for each in places), "one sub-FM and one adapter, whoever gets them"


def dropping(silo: int, rounds: set[int]) -> type[Here]:
    """A host in one process whose clients of one silo are lost in some rounds, after they were sent their messages."""

    class Dropping(ClientSide):
        def train(
            self, round: int, outbox: Outbox, staying: Sequence[ClientId], report: Callable[[float], None]
        ) -> dict[ClientId, Trained]:
            stay = [cid for cid in staying if round not in rounds or silo_of(cid, 2) != silo]
            return super().train(round, outbox, stay, report)

    class Losing(Here):
        client_side = Dropping

    return Losing


class Impatient(Silos):
    patience: ClassVar[float] = 3.0


def test_a_round_whose_silo_is_away_ends_at_once(tmp_path: Path) -> None:
    """The other silo is there, so nobody has to be waited for."""
    this = Run(prepared(tmp_path, "head-only", **{"split.clients": "2"}), Silent(), Silos)
    host = this.host
    assert isinstance(host, Silos)
    with host:
        host.threads.kill(1)
        for round in range(2):
            outbox = host.server.broadcast(round, [0])
            started = time.monotonic()
            assert host.hub.train_all(round, outbox, [0]) == {}
            assert time.monotonic() - started < host.patience / 2
        assert [why for _, _, why in host.hub.lost] == ["it cannot be reached", "it is not there"]


def made(asked: Prepared, host: type[Host]) -> Record:
    """The record of a whole run on a host."""
    this = Run(asked, Silent(), host)
    with this.host:
        this.loop(None)
        return finish(this)


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_killed_silo_is_left_out_and_taken_up_again(asked: Prepared, comes_back: bool) -> None:
    rounds = asked.scenario.federation.rounds
    expected = made(asked, dropping(2, {1} if comes_back else set(range(1, rounds))))
    this = Run(asked, Silent(), Impatient)
    host = this.host
    assert isinstance(host, Silos)
    with host:
        this.loop(None, until=1)
        host.threads.kill_at[2] = lambda about: True
        this.loop(None, until=2)
        lost = this.rounds[1]["lost"]
        assert lost == of_silo(host, 2, this.rounds[1]["cohort"]) != []
        assert not set(lost) & set(this.rounds[1]["arrived"])
        assert host.said == ["round 2 goes on without silo 2: no answer within 3 s"]
        host.threads.kill_at.clear()
        if comes_back:
            host.start(2)
        this.loop(None)
        same(finish(this), expected)
    assert ("silo 2 is back" in host.said) == comes_back


def test_a_silo_that_is_only_late_is_asked_again_and_its_late_answer_is_not_counted(asked: Prepared) -> None:
    expected = made(asked, dropping(2, {1}))
    this = Run(asked, Silent(), Impatient)
    host = this.host
    assert isinstance(host, Silos)
    let_go, answered = threading.Event(), threading.Event()

    def late(silo: int) -> None:
        if silo == 2:
            let_go.wait()
            answered.set()

    with host:
        this.loop(None, until=1)
        host.threads.before_answer = late
        this.loop(None, until=2)
        assert this.rounds[1]["lost"]
        let_go.set()
        assert answered.wait(10)
        while host.hub._events.empty():
            pass
        this.loop(None)
        same(finish(this), expected)


def test_a_run_whose_silos_are_all_gone_stops_in_a_line_and_goes_on_later(asked: Prepared, tmp_path: Path) -> None:
    whole = run(asked)
    this = Run(asked, Silent(), Impatient)
    host = this.host
    assert isinstance(host, Silos)
    with host:
        this.loop(tmp_path / "kept", until=2)
        for silo in (1, 2):
            host.threads.kill_at[silo] = lambda about: True
        with pytest.raises(FedbenchError, match="no silo is left in round 3: silo 1: no answer .* the same command"):
            this.loop(tmp_path / "kept")
    again = Run(asked, Silent(), Silos)
    with again.host:
        assert again.resume(tmp_path / "kept")
        again.loop(None)
        same(finish(again), whole)


def test_a_server_that_is_stopped_in_a_round_goes_on_from_the_one_before(asked: Prepared, tmp_path: Path) -> None:
    """The silos have made the round that the server forgets, and make it again; one was lost when it stopped."""
    expected = made(asked, dropping(2, {1}))
    this = Run(asked, Silent(), Impatient)
    host = this.host
    assert isinstance(host, Silos)
    with host:
        this.loop(tmp_path / "kept", until=1)
        host.threads.kill_at[2] = lambda about: True
        this.loop(tmp_path / "kept", until=2)
        cohort, staying = this.cohort(2)
        host.hub.train_all(2, host.server.broadcast(2, cohort), staying)
    again = Run(asked, Silent(), Silos)
    with again.host:
        assert again.resume(tmp_path / "kept")
        again.loop(None)
        same(finish(again), expected)


def test_a_silo_without_what_its_clients_keep_is_left_out(asked: Prepared) -> None:
    this = Run(asked, Silent(), Impatient)
    host = this.host
    assert isinstance(host, Silos)
    with host:
        this.loop(None, until=2)
        host.threads.kill(2)
        Memory(host.folder(2), asked.key).clear()
        host.start(2)
        this.loop(None, until=3)
        assert "silo 2 has lost what its clients keep: they are needed as after round 2" in host.said[-1]
        assert this.rounds[2]["lost"]
        assert this.rounds[2]["arrived"]


def test_what_an_earlier_run_of_the_same_key_left_in_a_silo_is_not_taken_up(asked: Prepared) -> None:
    stopped = Run(asked, Silent(), Silos)
    with stopped.host:
        stopped.loop(None, until=1)
    again = Run(asked, Silent(), Silos)
    with again.host:
        again.loop(None)
        same(finish(again), run(asked))


def test_a_checkpoint_is_resumed_where_its_silos_are(asked: Prepared, tmp_path: Path) -> None:
    this = Run(asked, Silent(), Silos)
    with this.host:
        this.loop(tmp_path / "kept", until=1)
    here = Run(asked, Silent(), Here)
    with pytest.raises(
        FedbenchError, match="was begun with --host silos --silos 2, and what its clients keep lies there"
    ):
        here.resume(tmp_path / "kept")


def test_a_silo_of_another_run_is_refused_and_told_why(asked: Prepared) -> None:
    this = Run(asked, Silent(), Silos)
    host = this.host
    assert isinstance(host, Silos)
    with host:
        settings = {**asked.identity["method"]["settings"], "lr": 0.5}
        other = {**asked.identity, "seed": 7, "method": {**asked.identity["method"], "settings": settings}}
        hello = {"session": "x", "identity": other | {"fm_hash": ""}, "silos": 2}
        host.hub.came(2, seal(hello))
        host.hub.came(1, seal(hello | {"identity": {**asked.identity, "fm_hash": ""}, "silos": 3}))
        host.hub.gather(0)
        host.hub._ask({}, 0)
        why = host.threads.refused[2]
        assert why is not None
        assert why.startswith("the server's run differs from the silo's in method.settings.lr, seed; give both sides")
        assert host.threads.refused[1] == "the server counts on 2 silos, not 3; give both one address file"


def test_what_goes_wrong_in_a_silo_is_said_by_the_server(asked: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    this = Run(asked, Silent(), Silos)
    assert isinstance(this.host, Silos)

    def fail(*_: object) -> None:
        raise ZeroDivisionError("a client's own fault")

    with this.host:
        for silo, _ in this.host.threads.silos.values():
            monkeypatch.setattr(silo.side, "train_all", fail)
        with pytest.raises(RuntimeError, match="silo 1: ZeroDivisionError: a client's own fault"):
            this.loop(None)


@pytest.mark.parametrize(
    ("trained", "message"),
    [
        (None, "silo 1: its answer cannot be read: AttributeError"),
        ({}, "silo 1: answered for other clients than it was asked for"),
        ({"0": {"steps": 1}}, "silo 1: its answer cannot be read: KeyError: 'upload'"),
        ({"0": {"upload": [["adapter", 6, 0]]}}, "silo 1: its answer cannot be read: MessageError"),
    ],
)
def test_an_answer_that_says_nothing_of_the_clients_is_an_error(
    asked: Prepared, monkeypatch: pytest.MonkeyPatch, trained: Any, message: str
) -> None:
    this = Run(asked, Silent(), Silos)
    host = this.host
    assert isinstance(host, Silos)
    with host:
        for silo, _ in host.threads.silos.values():
            said = {"done": 0, "trained": trained}
            monkeypatch.setattr(
                silo, "answer", lambda letter, said=said: seal(said | {"number": unseal(letter)[0]["number"]})
            )
        with pytest.raises(FedbenchError, match=message):
            host.hub.train_all(0, host.server.broadcast(0, [0, 2]), [0, 2])


def test_a_letter_to_the_process_before_it_is_not_answered_by_a_silo(asked: Prepared) -> None:
    """It may have been under way when that process ended, and would be taken for the first of a run."""
    this = Run(asked, Silent(), Silos)
    host = this.host
    assert isinstance(host, Silos)
    with host:
        this.loop(None, until=1)
        silo, _ = host.threads.silos[2]
        question = seal({"what": "report", "number": 9, "session": "session 2"})
        assert silo.answer(question) is not None
        host.threads.kill(2)
        host.start(2)
        again, _ = host.threads.silos[2]
        assert again.answer(question) is None
        host.hub.unreachable(2, 1, "it cannot be reached")  # of a question long since given up
        this.loop(None)
        assert not any("lost" in entry for entry in this.rounds)
        same(finish(this), run(asked))


def test_a_letter_that_cannot_be_read_changes_nothing(asked: Prepared) -> None:
    this = Run(asked, Silent(), Silos)
    host = this.host
    assert isinstance(host, Silos)
    with host:
        for bad in (b"", b"\x80\x04.", seal({}), seal({"number": 1, "done": "x"}), seal({"number": 99, "done": 99})):
            host.hub.arrived(1, bad)
        host.hub.came(1, b"hello")
        host.hub.arrived(7, seal({}))
        this.loop(None)
        same(finish(this), run(asked))


def test_a_server_s_part_holds_no_client_s_rows_and_the_same_division(asked: Prepared) -> None:
    part = server_part(asked.request)
    assert part.key == asked.key
    assert len(part.loaded.train) == len(part.loaded.data.train) == 0
    assert not part.rows()
    assert part.division.partition.hash() == asked.division.partition.hash()
    assert (part.division.label_counts, part.division.skew) == (asked.division.label_counts, asked.division.skew)


def test_a_silo_s_part_needs_no_weights_of_the_fm(asked: Prepared, tmp_path: Path) -> None:
    for weights in (tmp_path / "bert").glob("*.safetensors"):
        weights.unlink()
    parts = [silo_part(asked.request, silo, 2) for silo in (1, 2)]
    assert sorted(cid for part in parts for cid in part.rows) == list(range(len(asked.rows())))
    for part in parts:
        assert {**part.identity, "fm_hash": ""} == {**asked.identity, "fm_hash": ""}
        assert part.identity["fm_hash"] == ""
        for cid, rows in part.rows.items():
            assert rows.content_hash() == asked.rows()[cid].content_hash()
    with pytest.raises(FedbenchError, match="11 silos for 4 clients; use at most as many silos as clients"):
        silo_part(asked.request, 1, 11)


def test_without_fedml_its_host_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedbench.run.hosts.fedml.find_spec", lambda name: None)
    request = smoke_request(tmp_path, "fedpft", "tweets-noniid", tmp_path / "no-such-fm")
    with pytest.raises(FedbenchError, match="FedML is not installed here; .* docs/federation.md"):
        prepare(replace(request, host="fedml", silos=2))
