"""The text of a user's file: unpacked, and decoded with what its encoding is said in words."""

from __future__ import annotations

import codecs
from pathlib import Path

from fedbench.data.sources import checked_text, cure, read_bytes
from fedbench.errors import FedbenchError

PACKED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
"""What the last suffix of a packed file says, as pyarrow calls it."""

MOSTLY = 0.2
"""Most non-ASCII characters, of the letters in lines that are not UTF-8, that a text in a Western language has."""


def suffix_of(path: Path) -> str:
    """The suffix that says what a file holds, without that of its packing: `.csv` of `a.csv.gz`."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() in PACKED else path.suffix.lower()


def unpacked(path: Path) -> bytes:
    """The content of a file, unpacked where its name ends like that. Raises FedbenchError where that fails."""
    if path.suffix.lower() not in PACKED:
        return read_bytes(path)
    import pyarrow as pa

    head = read_bytes(path, 200)
    try:
        with pa.OSFile(str(path)) as file, pa.CompressedInputStream(file, PACKED[path.suffix.lower()]) as stream:
            return bytes(stream.read())
    except Exception as error:  # a damaged file makes pyarrow raise almost anything
        reason = " ".join(str(error).split())[:160]
        raise FedbenchError(f"{path}: cannot be unpacked: {reason}; {cure(head)}") from None


def text_of(path: Path, encoding: str | None) -> tuple[str, str]:
    """The text of a file with line ends as `\\n`, and what its encoding was found to be ("" for UTF-8).

    A file that is not UTF-8 is taken for UTF-16 by its mark, else for cp1252 line by line: what is not UTF-8 in a
    Western text is that. Raises FedbenchError where neither can be, and for a file that holds no text.
    """
    content = unpacked(path)
    text, found = _as_named(path, content, encoding) if encoding else _recognised(path, content)
    return checked_text(path, content, text, "UTF-16 without its mark, or damaged"), found


def _as_named(path: Path, content: bytes, encoding: str) -> tuple[str, str]:
    try:
        codecs.lookup(encoding)
    except LookupError:
        raise FedbenchError(f"dataset.encoding {encoding!r}: Python knows no such encoding") from None
    try:
        return content.decode(encoding).removeprefix("\ufeff"), encoding
    except UnicodeError as error:
        reason = getattr(error, "start", None)
        at = f" at byte {reason}" if reason is not None else ""
        raise FedbenchError(
            f"{path}: is not {encoding}{at}; leave dataset.encoding out, or name the right one"
        ) from None


def _recognised(path: Path, content: bytes) -> tuple[str, str]:
    for mark, name in ((codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32")):
        if content.startswith(mark):
            return _as_named(path, content, name)
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return _as_named(path, content, "UTF-16")
    try:
        return content.decode("utf-8-sig"), ""
    except UnicodeDecodeError as error:
        start = error.start
    if (fix := cure(content)) != cure(b""):
        raise FedbenchError(f"{path}: is no table; {fix}")
    lines, other, foreign, letters, utf8 = [], 0, 0, 0, 0
    for line in content.removeprefix(codecs.BOM_UTF8).split(b"\n"):
        try:
            text = line.decode()
            utf8 += not text.isascii()
        except UnicodeDecodeError:
            try:
                text = line.decode("cp1252")
            except UnicodeDecodeError:
                raise _unknown(path, start) from None
            other += 1
            foreign += sum(not c.isascii() for c in text)
            letters += sum(c.isalpha() for c in text)
        lines.append(text)
    if b"\0" in content or foreign > MOSTLY * letters:
        raise _unknown(path, start)
    found = "cp1252" if not utf8 else f"UTF-8, {other} of its lines cp1252"
    return "\n".join(lines), f"{found}, since it is not UTF-8 at byte {start}"


def _unknown(path: Path, start: int) -> FedbenchError:
    return FedbenchError(
        f"{path}: is not UTF-8 at byte {start}, and not text in cp1252 either; save it as UTF-8, or name its "
        "encoding in dataset.encoding"
    )
