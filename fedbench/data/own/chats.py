"""Conversations in a user's tables: a column of turns, or columns of prompts and answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fedbench.data.labels import shown
from fedbench.data.own.table import BadRow, Table, column, missing, text_of_cell
from fedbench.data.rows import Chat
from fedbench.errors import FedbenchError
from fedbench.scenario.tables import DatasetSettings

TURNS = ("messages", "conversations", "conversation")
PROMPTS = (
    ("instruction", "input"),
    ("instruction", "context"),
    ("instruction",),
    ("prompt",),
    ("question",),
    ("query",),
    ("inputs",),
    ("input",),
)
ANSWERS = ("output", "response", "completion", "answer", "targets", "target")
"""What such columns are called, the likeliest first."""

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
"""Roles as OpenAI, ShareGPT and others write them, and what they are here."""


@dataclass(frozen=True)
class Layout:
    """Where conversations lie: in a column of `turns`, or in the columns of `prompt` and in that of the `answer`."""

    turns: str = ""
    prompt: tuple[str, ...] = ()
    answer: str = ""

    def said(self) -> str:
        """The layout in words."""
        if self.turns:
            return f"turns in the column {self.turns!r}"
        return f"prompts in {' and '.join(map(repr, self.prompt))}, answers in {self.answer!r}"


def recognised(table: Table) -> Layout | None:
    """The layout that the names of the columns speak for; None where none does."""
    known = {name.strip().lower(): name for name in table.columns}
    for name in TURNS:
        if name in known:
            return Layout(turns=known[name])
    for prompt in PROMPTS:
        for answer in ANSWERS:
            if answer in known and all(name in known for name in prompt):
                return Layout(prompt=tuple(known[name] for name in prompt), answer=known[answer])
    return None


def layout_of(table: Table, settings: DatasetSettings) -> Layout:
    """The layout that the scenario names, or, where it names none, what is recognised. Raises FedbenchError."""
    if settings.answer is not None:
        return Layout(prompt=settings.segments, answer=settings.answer)
    if settings.segments != ("text",) or "text" in table.columns:
        if len(settings.segments) > 1:
            raise FedbenchError("dataset.text: several columns of a prompt need dataset.answer, the column of answers")
        return Layout(turns=settings.segments[0])
    found = recognised(table)
    if found is None:
        raise FedbenchError(
            f"{table.where}: no conversations were recognised in the columns {', '.join(table.columns)}; name the "
            "column of turns in dataset.text, or those of prompts and answers in dataset.text and dataset.answer"
        )
    return found


def chats_of(table: Table, settings: DatasetSettings) -> Callable[[int], Chat]:
    """What takes a row's number for its conversation, or raises BadRow. Raises FedbenchError for a column not there."""
    layout = layout_of(table, settings)
    if layout.turns:
        turns = column(table, layout.turns, "text")
        return lambda i: chat_of(turns[i])
    prompts = [column(table, name, "text") for name in layout.prompt]
    answers = column(table, layout.answer, "answer")

    def chat(i: int) -> Chat:
        first = text_of_cell(prompts[0][i])
        rest = [text_of_cell(more[i]) for more in prompts[1:] if not missing(more[i])]
        if missing(answers[i]):
            raise BadRow("has no answer")
        return ("user", "\n\n".join([first, *rest])), ("assistant", text_of_cell(answers[i]))

    return chat


def chat_of(cell: Any) -> Chat:
    """A conversation from a list of turns, each with `role` and `content` (OpenAI), or `from` and `value` (ShareGPT).

    Turns of user and assistant take turns, after one of the system where there is one, and end with an answer. Raises
    BadRow for any other.
    """
    turns = _parsed(cell) if isinstance(cell, str) else cell
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise BadRow("has no conversation", "" if missing(cell) else f", but {shown(cell)}")
    chat = []
    for number, turn in enumerate(turns, start=1):
        said = turn.get("role") if turn.get("role") is not None else turn.get("from")
        role = ROLES.get(said.strip().lower()) if isinstance(said, str) else None
        if role is None:
            raise BadRow("has a turn of an unknown role", f", turn {number} of {shown(said)}")
        words = _words(turn.get("content") if turn.get("content") is not None else turn.get("value"))
        if words is None:
            raise BadRow("has a turn without text", f", turn {number}")
        chat.append((role, words))
    roles = [role for role, _ in chat]
    start = roles[0] == "system"
    if any(role != ("user", "assistant")[i % 2] for i, role in enumerate(roles[start:])):
        raise BadRow("has turns that do not alternate", f", but are of {', '.join(roles[:6])}")
    if roles[-1] != "assistant":
        raise BadRow("has no answer at its end")
    return tuple(chat)


def _parsed(cell: str) -> Any:
    """What a cell of a table without nested values holds as JSON."""
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        return None


def _words(content: Any) -> str | None:
    """The text of a turn: as it is, or in parts of type text alone."""
    if isinstance(content, list) and content and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        content = "".join(str(part.get("text", "")) for part in content)
    return content if isinstance(content, str) and content.strip() else None


def words_of(chat: Chat) -> str:
    """All words of a conversation, a turn a line."""
    return "\n".join(words for _, words in chat)
