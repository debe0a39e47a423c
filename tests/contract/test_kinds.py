"""A method on an encoder, a ViT and a decoder: names agree, everything is trained, and the loss falls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from fedbench.check.kinds import KINDS, tiny_model
from fedbench.check.suite import check_method
from fedbench.errors import FedbenchError


@pytest.fixture(scope="module")
def fms() -> Iterator[dict[str, str]]:
    with ExitStack() as stack:
        yield {kind: str(stack.enter_context(tiny_model(kind))) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_fedavg_trains_every_kind_of_model(kind: str, fms: dict[str, str]) -> None:
    results = check_method("fedavg-lora", scenario=KINDS[kind], fm=fms[kind], whole=False)
    assert all(r.ok for r in results), [f"{r.name}: {r.detail}" for r in results if not r.ok]
    assert [r.name for r in results] == ["proxy and FM agree on names", "every tunable is trained", "the method learns"]


def test_a_kind_that_there_is_not_is_named() -> None:
    with pytest.raises(FedbenchError, match="--model rnn: there is no such kind; give encoder, vit, decoder or all"):
        tiny_model("rnn").__enter__()
