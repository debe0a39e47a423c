"""The boundary: payload sizes to the byte, checks on arrival, no aliasing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from fedbench.api.messages import Message, TensorSpec
from fedbench.errors import MessageError
from fedbench.run.gate import Bounds, let_in, reason, size_limit, update_norm
from fedbench.run.ledger import Ledger
from fedbench.run.payloads import Parcel, deserialise, header_length, serialise
from fedbench.run.post import Lent, Post


@dataclass
class Transport:
    """Both sides of the boundary, as the sides of a run use them."""

    ledger: Ledger = field(default_factory=Ledger)
    refused: list[tuple[int, int, str]] = field(default_factory=list)
    post: Post = field(default_factory=Post)
    lent: Lent = field(default_factory=Lent)

    def download(self, round: int, outbox: Mapping[int, Sequence[Message]]) -> Iterator[tuple[int, list[Message]]]:
        for client, parcels in self.post.pack(outbox).items():
            self.ledger.charge(round, "down", client, parcels)
            yield client, [self.lent.lend(parcel.open()) for parcel in parcels]

    def upload(
        self,
        round: int,
        client: int,
        messages: Sequence[Message],
        expected: Mapping[str, Mapping[str, TensorSpec]],
        accept: Callable[[int, Sequence[Message]], None] | None = None,
        bounds: Bounds | None = None,
    ) -> list[Message] | None:
        parcels = []
        try:
            for message in messages:
                parcels.append(Parcel.of(message))
                self.ledger.charge(round, "up", client, parcels[-1:])
            return let_in(parcels, expected, bounds, None if accept is None else lambda m: accept(round, m))
        except MessageError as error:
            self.refused.append((round, client, reason(error)))
            return None

    def close_round(self) -> None:
        self.lent.close()


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
plain = st.one_of(
    st.integers(-(2**31), 2**31), st.text(max_size=8), st.booleans(), st.floats(allow_nan=False, allow_infinity=False)
)


@st.composite
def messages(draw: st.DrawFn) -> Message:
    names = draw(st.lists(st.text(st.characters(codec="ascii", min_codepoint=33), min_size=1), max_size=4, unique=True))
    tensors = {}
    for name in names:
        if name == "__metadata__":
            continue
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        tensors[name] = torch.randint(0, 2, shape).to(draw(st.sampled_from(DTYPES)))
    kind = draw(st.sampled_from(["fm", "sub_fm", "adapter", "alignment", "statistics"]))
    return Message(kind, tensors, draw(st.dictionaries(st.text(max_size=5), plain, max_size=3)))


@given(messages())
@settings(deadline=None, max_examples=60)
def test_a_message_survives_the_wire_and_its_size_is_header_plus_elements(message: Message) -> None:
    payload = serialise(message)
    decoded = deserialise(payload)
    assert decoded.kind == message.kind and dict(decoded.meta) == dict(message.meta)
    assert set(decoded.tensors) == set(message.tensors)
    for name, tensor in message.tensors.items():
        assert decoded.tensors[name].dtype == tensor.dtype
        assert torch.equal(decoded.tensors[name], tensor)
        assert tensor.numel() == 0 or decoded.tensors[name].data_ptr() != tensor.data_ptr()
    body = sum(t.numel() * t.element_size() for t in message.tensors.values())
    assert len(payload) == header_length(payload) + body


@given(st.binary(max_size=200))
@settings(deadline=None, max_examples=100)
def test_garbage_is_refused_with_a_message_error(payload: bytes) -> None:
    with pytest.raises(MessageError):
        deserialise(payload)


def test_payload_bytes_do_not_vary_between_calls() -> None:
    message = Message("adapter", {"b": torch.ones(3), "a": torch.zeros(2)}, {"y": 1, "x": "2", "z": True})
    assert len({serialise(message) for _ in range(20)}) == 1
    other = Message("adapter", dict(reversed(message.tensors.items())), {"z": True, "x": "2", "y": 1})
    assert serialise(other) == serialise(message), "whatever the order of names"
    assert json.loads(serialise(message)[8 : header_length(serialise(message))])["__metadata__"] == {
        "fedbench": '{"kind":"adapter","meta":{"x":"2","y":1,"z":true}}'
    }


def test_ledger_bytes_are_the_payloads_bytes_by_round_direction_and_kind() -> None:
    setup = Message("sub_fm", {"w": torch.zeros(300_000)})
    adapter = Message("adapter", {"a": torch.zeros(4)}, {"num_examples": 3})
    transport = Transport()
    inboxes = dict(transport.download(0, {1: [setup, adapter], 2: [setup, adapter]}))
    up = transport.upload(0, 1, [adapter], {"adapter": {"a": TensorSpec((4,), torch.float32)}})
    transport.close_round()
    assert up is not None and set(inboxes) == {1, 2}
    sizes = len(serialise(setup)), len(serialise(adapter))
    assert transport.ledger.total("down") == 2 * sum(sizes)
    assert transport.ledger.total("down", ["sub_fm"]) == 2 * sizes[0]
    assert transport.ledger.total("up", round=0) == sizes[1]
    assert transport.ledger.by_kind("down")["sub_fm"] == {"bytes": 2 * sizes[0], "elements": 600_000, "messages": 2}
    assert Ledger.from_json(json.loads(json.dumps([e.to_json() for e in transport.ledger.entries]))) == transport.ledger
    # Large messages are decoded once for all recipients, small ones for each.
    assert inboxes[1][0] is inboxes[2][0]
    assert inboxes[1][1].tensors["a"].data_ptr() != inboxes[2][1].tensors["a"].data_ptr()


def test_every_entry_names_its_round_direction_and_client() -> None:
    adapter = Message("adapter", {"a": torch.zeros(4)}, {"num_examples": 3})
    transport, size = Transport(), len(serialise(adapter))
    list(transport.download(3, {5: [adapter], 6: [adapter]}))
    transport.upload(4, 6, [adapter], {"adapter": {"a": TensorSpec((4,), torch.float32)}})
    assert [entry.to_json() for entry in transport.ledger.entries] == [
        [3, "down", 5, "adapter", size, 4],
        [3, "down", 6, "adapter", size, 4],
        [4, "up", 6, "adapter", size, 4],
    ]


LARGE = {"w": torch.zeros(300_000), "b": torch.zeros(4)}


@pytest.mark.parametrize(
    "other",
    [
        Message("sub_fm", {**LARGE, "b": torch.tensor([0.0, 0.0, 0.0, 1.0])}),
        Message("sub_fm", {**LARGE, "w": torch.zeros(300_000, 1)}),
        Message("sub_fm", {**LARGE, "b": torch.zeros(4, dtype=torch.int32)}),
        Message("sub_fm", {"w": LARGE["w"]}),
        Message("sub_fm", {**LARGE, "c": torch.zeros(1)}),
        Message("sub_fm", {"w": LARGE["w"], "c": LARGE["b"]}),
        Message("sub_fm", LARGE, {"spec": "another"}),
        Message("fm", LARGE),
    ],
    ids=["value", "shape", "dtype", "fewer", "more", "name", "meta", "kind"],
)
def test_a_large_message_is_kept_between_rounds_and_any_change_of_it_is_sent(other: Message) -> None:
    transport, first = Transport(), Message("sub_fm", LARGE)

    def arrives(round: int, message: Message) -> Message:
        [(_, [arrived])] = transport.download(round, {0: [message]})
        return arrived

    kept = arrives(0, first)
    assert arrives(1, Message("sub_fm", {n: t.clone() for n, t in LARGE.items()})) is kept
    arrived = arrives(2, other)
    assert (arrived.kind, dict(arrived.meta), set(arrived.tensors)) == (other.kind, other.meta, set(other.tensors))
    for name, tensor in other.tensors.items():
        assert arrived.tensors[name].dtype == tensor.dtype
        assert torch.equal(arrived.tensors[name], tensor)
    sizes = [len(serialise(first))] * 2 + [len(serialise(other))]
    assert [entry.bytes for entry in transport.ledger.entries] == sizes


def test_what_is_no_dense_tensor_is_refused() -> None:
    for value in (torch.eye(2).to_sparse(), [1.0]):
        with pytest.raises(MessageError, match="'a' is not a dense tensor"):
            serialise(Message("adapter", {"a": value}))  # type: ignore[dict-item]


GOOD = {"a": torch.zeros(2, 3)}
EXPECTED = {"adapter": {"a": TensorSpec((2, 3), torch.float32)}}


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([Message("statistics", GOOD)], "not expected"),
        ([Message("adapter", {})], "missing"),
        ([Message("adapter", {**GOOD, "b": torch.zeros(1)})], "not asked for"),
        ([Message("adapter", {"a": torch.zeros(3, 2)})], r"\[3, 2\]"),
        ([Message("adapter", {"a": torch.zeros(2, 3).double()})], "float64"),
        ([Message("adapter", {"a": torch.full((2, 3), float("nan"))})], "not finite"),
        ([Message("adapter", {"a": torch.full((2, 3), float("inf"))})], "not finite"),
        ([Message("adapter", GOOD, {"x": [1]})], "meta 'x' is a list"),  # type: ignore[dict-item]
        ([Message("nonsense", GOOD)], "unknown"),  # type: ignore[arg-type]
        ([Message("adapter", GOOD), Message("adapter", GOOD)], "two messages"),
        ([], "missing from the upload"),
    ],
)
def test_a_bad_upload_is_refused_and_recorded(messages: list[Message], reason: str) -> None:
    transport = Transport()
    assert transport.upload(3, 7, messages, EXPECTED) is None
    [(round, client, why)] = transport.refused
    assert (round, client) == (3, 7)
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(why)


@pytest.mark.parametrize(
    ("message", "what"),
    [
        (Message("adapter", GOOD, {"note": "x" * 200_000}), "bytes, where its tensors explain"),
        (Message("adapter", {**GOOD, "n" * 200_000: torch.zeros(1)}), "bytes, where its tensors explain"),
        (Message("adapter", {**GOOD, "b": torch.zeros(10**6)}), "4000.* bytes, where its tensors explain"),
    ],
)
def test_an_upload_longer_than_its_tensors_explain_is_refused_unread_and_still_charged(
    message: Message, what: str
) -> None:
    transport = Transport()
    assert transport.upload(0, 0, [message], EXPECTED) is None
    [(_, _, why)] = transport.refused
    assert re.search(what, why)
    assert transport.ledger.total("up") == len(serialise(message))
    assert len(serialise(Message("adapter", GOOD))) < size_limit(EXPECTED["adapter"]) < 70_000


def test_the_size_limit_by_hand() -> None:
    specs = {"a": TensorSpec((2, 3), torch.float32), "bc": TensorSpec((4,), torch.float16)}
    # Values, 64 KiB, and 200 bytes and its quoted name for each tensor.
    assert size_limit(specs) == (24 + 8) + 65_536 + (3 + 200) + (4 + 200)
    kinds = {"adapter": {"a": TensorSpec((50_000,), torch.float32)}, "statistics": {}}
    messages = [Message("adapter", {"a": torch.zeros(50_000)}), Message("statistics", {})]
    assert Transport().upload(0, 0, messages, kinds) is not None, "each kind has the limit of its own tensors"


def test_whole_numbers_of_64_bits_are_let_in() -> None:
    meta = {"most": 2**63 - 1, "least": -(2**63)}
    assert deserialise(serialise(Message("adapter", GOOD, meta))).meta == meta


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 10**400, float("nan"), float("inf")])
def test_plain_values_beyond_64_bits_or_not_finite_are_refused(value: float) -> None:
    transport = Transport()
    assert transport.upload(0, 0, [Message("adapter", GOOD, {"num_examples": value})], EXPECTED) is None
    assert re.search("more than 64 bits|not a finite number", transport.refused[0][2])
    forged = serialise(Message("adapter", GOOD, {"v": 12345})).replace(b"12345", b"1e999")
    with pytest.raises(MessageError, match="not a finite number"):
        deserialise(forged)


def test_a_reason_is_one_printable_line_of_limited_length() -> None:
    transport = Transport()
    name = "\x1b[2J\n" + "n" * 1000
    assert transport.upload(0, 0, [Message("adapter", {**GOOD, name: torch.zeros(1)})], EXPECTED) is None
    why = transport.refused[0][2]
    assert len(why) == 300
    assert why.isprintable()
    assert why.endswith("…")


@pytest.mark.parametrize(
    ("said", "line"),
    [("a\x00\t\n b\u202e", r"a\x00   b\u202e"), ("n" * 300, "n" * 300), ("n" * 301, "n" * 299 + "…")],
    ids=["unprintable", "whole", "cut"],
)
def test_a_reason_by_hand(said: str, line: str) -> None:
    def accept(round: int, messages: Sequence[Message]) -> None:
        raise MessageError(said)

    transport = Transport()
    assert transport.upload(0, 0, [Message("adapter", GOOD)], EXPECTED, accept) is None
    assert transport.refused == [(0, 0, line)]


def test_a_client_cannot_claim_more_rows_or_tokens_than_it_has() -> None:
    bounds = Bounds({"num_examples": 50, "tokens": 400})
    for meta, refused in (
        ({"num_examples": 50}, None),
        ({"num_examples": 51}, "num_examples is 51, but the client has no more than 50"),
        ({"num_examples": 5, "tokens": 401}, "tokens is 401, but the client has no more than 400"),
        ({}, None),
        ({"num_examples": "many"}, None),
    ):
        transport = Transport()
        arrived = transport.upload(0, 0, [Message("adapter", GOOD, meta)], EXPECTED, None, bounds)
        assert (arrived is None) == (refused is not None)
        assert [why for _, _, why in transport.refused] == ([f"adapter: {refused}"] if refused else [])


def test_an_update_of_more_than_the_largest_norm_is_refused() -> None:
    # Sent is all 1; the upload is off by 2 in each of 6 elements: a norm of sqrt(24) = 4.899.
    message = Message("adapter", {"a": torch.full((2, 3), 3.0)})
    for most, refused in ((4.8, True), (4.9, False), (24**0.5, False), (None, False)):
        transport = Transport()
        bounds = Bounds({}, {"a": torch.ones(2, 3)}, most)
        assert (transport.upload(0, 0, [message], EXPECTED, None, bounds) is None) is refused
    assert update_norm(message.tensors, {"a": torch.ones(2, 3)}) == pytest.approx(24**0.5)
    assert update_norm(message.tensors, {}) == pytest.approx(54**0.5), "what was not sent counts whole"
    assert update_norm({"a": torch.full((9,), 1.0), "b": torch.full((4,), 2.0)}, {}) == 5, "over all tensors"
    assert update_norm({"a": torch.full((2, 3), 3e38)}, {}) == pytest.approx(3e38 * 6**0.5), "no overflow"


def test_the_server_may_refuse_what_looks_right() -> None:
    def accept(round: int, messages: Sequence[Message]) -> None:
        assert [m.kind for m in messages] == ["adapter"]
        if round == 3:
            raise MessageError("not today")

    transport = Transport()
    assert transport.upload(3, 5, [Message("adapter", GOOD)], EXPECTED, accept) is None
    assert transport.refused == [(3, 5, "not today")]
    assert transport.upload(4, 5, [Message("adapter", GOOD)], EXPECTED, accept) is not None


def test_changing_a_received_tensor_in_place_is_an_error() -> None:
    transport = Transport()
    [(_, inbox)] = transport.download(0, {0: [Message("adapter", GOOD), Message("statistics", {"s": torch.ones(1)})]})
    inbox[0].tensors["a"].add_(1)
    with pytest.raises(MessageError, match="changed in place"):
        transport.close_round()
    assert torch.equal(GOOD["a"], torch.zeros(2, 3))


def test_views_and_tied_tensors_are_sent_whole() -> None:
    base = torch.arange(6.0)
    decoded = deserialise(serialise(Message("adapter", {"a": base[:2], "b": base, "c": base})))
    assert torch.equal(decoded.tensors["a"], base[:2]) and torch.equal(decoded.tensors["c"], base)


def test_a_payload_without_our_header_is_refused() -> None:
    with pytest.raises(MessageError):
        deserialise(save({"a": torch.zeros(1)}))
