"""The boundary: payload sizes to the byte, checks on arrival, no aliasing."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from fedbench.api import Message, TensorSpec
from fedbench.errors import MessageError
from fedbench.transport import Ledger, Transport, deserialise, header_length, serialise

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
plain = st.one_of(st.integers(-(2**31), 2**31), st.text(max_size=8), st.booleans(), st.floats(allow_nan=False))


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


def test_an_upload_over_the_limit_is_refused_and_still_charged() -> None:
    transport = Transport(limit_bytes=100)
    assert transport.upload(0, 0, [Message("adapter", GOOD)], EXPECTED) is None
    assert "over the limit" in transport.refused[0][2]
    assert transport.ledger.total("up") > 100


def test_the_server_may_refuse_what_looks_right() -> None:
    def accept(round: int, messages: object) -> None:
        raise MessageError("not today")

    transport = Transport()
    assert transport.upload(0, 5, [Message("adapter", GOOD)], EXPECTED, accept) is None
    assert transport.refused == [(0, 5, "not today")]


def test_changing_a_received_tensor_in_place_is_an_error() -> None:
    transport = Transport()
    [(_, inbox)] = transport.download(0, {0: [Message("adapter", GOOD)]})
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
