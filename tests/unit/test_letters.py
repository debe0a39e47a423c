"""Letters between a server and its silos, and the file of where these listen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedbench.api.messages import Message
from fedbench.errors import FedbenchError, MessageError
from fedbench.run.hosts.addresses import Address, loopback, read_addresses, try_to_listen, write_addresses
from fedbench.run.hosts.letters import Joiner, Packing, Unpacking, cut, seal, unseal
from fedbench.run.payloads import Parcel


def test_a_letter_arrives_as_it_was_sent() -> None:
    about = {"what": "train", "loss": 0.1 + 0.2, "outbox": {"3": [1, None]}}
    letter = seal(about, [b"", b"\x00\xff" * 3, b"fedbench"])
    assert unseal(letter) == (about, [b"", b"\x00\xff" * 3, b"fedbench"])
    assert unseal(seal({})) == ({}, [])


def test_bytes_that_are_no_letter_are_refused() -> None:
    letter = seal({"what": "report"}, [b"abc"])
    broken = letter.replace(b'"about"', b'"above"')
    for bad in (
        b"",
        b"\x80\x05pickled",
        letter[:-1],
        letter + b"x",
        letter[:20],
        broken,
        letter.replace(b"[3]", b"[9]"),
    ):
        with pytest.raises(MessageError, match="not a letter"):
            unseal(bad)


def test_a_long_letter_is_carried_in_pieces() -> None:
    letter = bytes(range(100))
    pieces = list(cut(letter, 30))
    assert len(pieces) == 4
    assert max(map(len, pieces)) <= 30 + 16
    joiner = Joiner()
    assert [joiner.add(piece) for piece in pieces] == [None, None, None, letter]
    assert [joiner.add(piece) for piece in cut(b"short")] == [b"short"]


def test_a_letter_that_was_broken_off_is_forgotten() -> None:
    first, second = list(cut(b"a" * 50, 20)), list(cut(b"b" * 50, 20))
    joiner = Joiner()
    joiner.add(first[0])
    for piece in second[:-1]:
        assert joiner.add(piece) is None
    assert joiner.add(second[-1]) == b"b" * 50
    for wrong in (first[1], b"", b"too short"):
        with pytest.raises(MessageError):
            joiner.add(wrong)


def test_recipients_of_one_parcel_cost_its_payload_once() -> None:
    sent = Parcel.of(Message("adapter", {"w": torch.arange(6.0).reshape(2, 3)}, {"lr": 0.1}))
    other = Parcel.of(Message("adapter", {"w": torch.zeros(1)}))
    packing = Packing()
    said = [packing.add(parcel) for parcel in (sent, sent, other)]
    assert packing.payloads == [sent.payload, other.payload]
    unpacking = Unpacking(packing.payloads)
    a, b, c = map(unpacking.parcel, said)
    assert a is b
    assert (a.kind, a.size, a.elements, a.payload) == (sent.kind, sent.size, sent.elements, sent.payload)
    assert torch.equal(a.open().tensors["w"], torch.arange(6.0).reshape(2, 3))
    assert c.size == other.size
    for bad in (
        ["adapter", 6, 2],
        ["adapter", 6, -1],
        ["adapter", -6, 0],
        ["adapter", True, 0],
        [0, 6, 0],
        "adapter",
        None,
    ):
        with pytest.raises(MessageError):
            unpacking.parcel(bad)


def test_addresses_are_read_as_they_were_written(tmp_path: Path) -> None:
    addresses = [Address(0, "10.0.0.1", 8890), Address(1, "10.0.0.2", 8890), Address(2, "silo2.lan", 8891)]
    write_addresses(tmp_path / "a.csv", addresses)
    assert read_addresses(tmp_path / "a.csv") == addresses
    assert (tmp_path / "a.csv").read_text().startswith("eid,rank,grpc_server_ip,grpc_server_port\n0,0,10.0.0.1,8890\n")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "has ranks none; it needs 0"),
        ("0,0,10.0.0.1,8890", "has ranks 0; it needs 0, the server, and silos"),
        ("0,0,10.0.0.1,8890\n2,2,10.0.0.2,8890", "has ranks 0, 2"),
        ("0,0,10.0.0.1,8890\n1,1,10.0.0.2,port", "line 3: not an address"),
        ("0,0,10.0.0.1,8890\n1,1", "line 3: not an address"),
        ("0,0,10.0.0.1,8890\n1,1,10.0.0.2,70000", "line 3: eid and rank"),
        ("0,0,10.0.0.1,8890\n7,1,10.0.0.2,8890", "line 3: eid and rank"),
        ("0,0,10.0.0.1,8890\n1,1,a,1\n1,1,b,1", "line 4: rank 1 is there twice"),
        ("0,0,10.0.0.1,8890\n1,1,10.0.0.1,8890", "two of them listen on one port"),
    ],
)
def test_a_bad_file_of_addresses_is_said_by_its_line(tmp_path: Path, lines: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(f"eid,rank,grpc_server_ip,grpc_server_port\n{lines}\n")
    with pytest.raises(FedbenchError, match=message):
        read_addresses(tmp_path / "a.csv")


def test_ports_on_loopback_are_free_and_a_taken_one_is_said() -> None:
    import socket

    addresses = loopback(3)
    assert [a.rank for a in addresses] == [0, 1, 2, 3]
    assert len({a.port for a in addresses}) == 4
    try_to_listen(addresses[1])
    with socket.socket() as taken:
        taken.bind((addresses[2].ip, addresses[2].port))
        taken.listen()
        with pytest.raises(FedbenchError, match=r"silo 2 cannot listen at 127\.0\.0\.1:\d+: .*is it running already"):
            try_to_listen(addresses[2])
    with pytest.raises(FedbenchError, match="the server cannot listen at 192.0.2.1"):
        try_to_listen(Address(0, "192.0.2.1", 8890))
