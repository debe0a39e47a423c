"""The page on adding a method names every hook of the interface, and methods that use it."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from fedbench.api.local import LocalTask
from fedbench.api.messages import KINDS
from fedbench.api.sides import Client, Method, Server
from fedbench.registry import Registry

PAGE = (Path(__file__).parents[2] / "docs" / "adding-a-method.md").read_text(encoding="utf-8")


def rows() -> dict[str, str]:
    """Names in the first cell of a row of the page's tables -> its last cell."""
    found = {}
    for line in PAGE.splitlines():
        if line.startswith("| `"):
            first, *_, last = (cell.strip() for cell in line.strip("|").split("|"))
            found |= dict.fromkeys(re.findall(r"`([^`]+)`", first), last)
    return found


@pytest.mark.parametrize("side", [Server, Client, Method])
def test_every_hook_of_a_side_is_in_a_table(side: type) -> None:
    own = {n for n in vars(side) if not n.startswith("_") and n not in ("model_config", "name", "version")}
    hooks = {n for n in own if callable(getattr(side, n)) or isinstance(vars(side)[n], property)} - {"model_post_init"}
    if side is Method:
        hooks |= {"needs", "personal"}
    assert {f"{side.__name__}.{n}" for n in hooks} <= set(rows())


def test_every_field_of_a_task_and_every_kind_of_message_is_in_a_table() -> None:
    assert {f.name for f in fields(LocalTask)} | set(KINDS) <= set(rows())


def test_the_methods_that_are_said_to_use_a_hook_exist() -> None:
    methods = set(Registry(()).methods)
    for hook, used in rows().items():
        named = set(re.findall(r"`([^`]+)`", used))
        assert named or re.search(r"\b(all|none built in)\b", used), hook
        assert named <= methods, hook
