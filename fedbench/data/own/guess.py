"""What the columns of a user's table are likely to be: texts, labels, clients. Only ever proposed, never assumed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedbench.data.own.chats import recognised
from fedbench.data.own.choices import CHOICES, QUESTIONS, RIGHT
from fedbench.data.own.table import Table, missing


def _names(text: str) -> list[str]:
    return text.split()


TEXTS = _names(
    "text sentence content review body message tweet headline title document utterance comment description x"
)
PAIRS = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "context"),
    ("query", "passage"),
    ("text1", "text2"),
    ("text_a", "text_b"),
)
LABELS = _names("label labels gold_label is_duplicate class category target sentiment topic genre y stars rating")
CLIENTS = _names(
    "client user username author speaker writer annotator hospital site institution bank customer device source domain "
    "language lang region country shop store publisher paper subreddit group"
)
"""What such columns are called, the likeliest first; of clients, words in their names."""


@dataclass(frozen=True)
class Column:
    """A column: how many cells hold something, how many different ones, and how many words a cell has, sorted."""

    name: str
    filled: int
    counts: Counter[str]
    words: Sequence[int]

    @property
    def mean_words(self) -> float:
        return sum(self.words) / max(1, len(self.words))


def look(table: Table) -> list[Column]:
    """All columns of a table that hold anything but nested values."""
    found = []
    for name, cells in table.columns.items():
        held = [cell for cell in cells if not missing(cell)]
        if held and not any(isinstance(cell, (dict, list, bytes, Path)) for cell in held[:50]):
            said = [" ".join(str(cell).split()) for cell in held]
            found.append(Column(name, len(held), Counter(said), sorted(len(text.split()) for text in said)))
    return found


def has_header(table: Table) -> bool:
    """Whether the first row of a table in CSV or TSV names its columns: nothing in it is a number or long."""
    return not any(re.fullmatch(r"[-+]?[\d.,]+", name) or len(name) > 60 or not name for name in table.columns)


def text_columns(columns: Sequence[Column]) -> tuple[str, ...]:
    """The column of texts, or the two of pairs; empty where there is none."""
    texts = [c for c in columns if any(re.search(r"[^\W\d]", value) for value in [*c.counts][:20])]
    known = {column.name.lower(): column.name for column in texts}
    for first, second in PAIRS:
        if first in known and second in known:
            return known[first], known[second]
    if not texts:
        return ()
    most = max(column.mean_words for column in texts)
    named = [known[name] for name in TEXTS if name in known]
    prose = {column.name for column in texts if column.mean_words >= 0.5 * most}
    return (next((name for name in named if name in prose), max(texts, key=lambda c: c.mean_words).name),)


def label_column(columns: Sequence[Column], texts: Sequence[str]) -> str | None:
    """The column of labels: few different values, called like one where there are several."""
    rest = [column for column in columns if column.name not in texts and 2 <= len(column.counts) <= 200]
    rest = [column for column in rest if len(column.counts) <= max(20, column.filled // 2)]
    known = {column.name.lower(): column.name for column in rest}
    named = next((known[name] for name in LABELS if name in known), None)
    others = [column for column in rest if column.name.lower() not in CLIENTS]
    return named or (min(others, key=lambda column: len(column.counts)).name if others else None)


def client_columns(columns: Sequence[Column], taken: Sequence[str]) -> list[Column]:
    """The columns that could say whose a row is, the likeliest first: values that come back, of words or of numbers."""
    likely = []
    for column in columns:
        rows = column.filled / len(column.counts)
        if column.name in taken or len(column.counts) < 2 or rows < 4 or column.mean_words > 5:
            continue
        parts = re.split(r"[\W_]+", column.name.lower())
        called = any(part in CLIENTS for part in parts)
        if called or (len(column.counts) >= 4 and not re.fullmatch(r"(?i)split|fold|year|date|lang_?id", column.name)):
            likely.append((not called, -len(column.counts), column))
    return [column for *_, column in sorted(likely, key=lambda item: item[:2])]


def image_column(columns: dict[str, Sequence[Any]]) -> str | None:
    """The column of images: files' bytes, paths, or called like one."""
    for name, cells in columns.items():
        first = next((cell for cell in cells if not missing(cell)), None)
        if isinstance(first, (bytes, Path)) or (isinstance(first, dict) and "bytes" in first):
            return name
        if isinstance(first, str) and re.search(r"(?i)\.(png|jpe?g|webp|bmp|tiff?|ppm|pgm)$", first):
            return name
        if isinstance(first, list) and len(first) > 8 and all(isinstance(value, (int, float)) for value in first):
            return name
    return None


def called_label(table: Table) -> str | None:
    """A column that is called a label, whatever is in it."""
    return next((name for name in table.columns if name.strip().lower() in ("label", "labels", "gold_label")), None)


def language_rows(table: Table, columns: Sequence[Column]) -> tuple[dict[str, Any], str, list[int]] | None:
    """Settings of rows of conversations or of multiple choice, what was recognised, and the words of each row, sorted.

    None for other rows; a table of prompts and answers with a column called a label is one of labels.
    """
    known = {name.strip().lower(): name for name in table.columns}
    question, choices, right = (
        next((known[n] for n in names if n in known), None) for names in (QUESTIONS, CHOICES, RIGHT)
    )
    if question and choices and right:
        rows = zip(table.columns[question], table.columns[choices], strict=True)
        return (
            {"kind": "choices", "text": question, "choices": choices, "label": right},
            "multiple choice",
            _words(rows),
        )
    layout = recognised(table)
    if layout is None or (not layout.turns and called_label(table)):
        return None
    if layout.turns:
        turns = _words((cell,) for cell in table.columns[layout.turns])
        return {"kind": "chat", "text": layout.turns}, f"conversations: {layout.said()}", turns
    prompt = layout.prompt[0] if len(layout.prompt) == 1 else [*layout.prompt]
    said = _words(zip(*(table.columns[name] for name in (*layout.prompt, layout.answer)), strict=True))
    return {"kind": "chat", "text": prompt, "answer": layout.answer}, f"conversations: {layout.said()}", said


def _words(rows: Iterable[Sequence[Any]]) -> list[int]:
    """How many words each row has, sorted; of nested cells all texts."""
    return sorted(sum(_count(cell) for cell in row) for row in rows)


def _count(cell: Any) -> int:
    if isinstance(cell, dict):
        return sum(map(_count, cell.values()))
    return sum(map(_count, cell)) if isinstance(cell, list) else len(str(cell or "").split())
