"""Files out of an archive, without unpacking it."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path

from fedbench.errors import FedbenchError


def archived(path: Path, wanted: Callable[[str], bool], folder: str) -> dict[str, bytes]:
    """Contents of an archive's wanted files by name, without the leading folder."""
    try:
        with tarfile.open(path) as archive:
            contents = {
                member.name.removeprefix("./").removeprefix(f"{folder}/"): file.read()
                for member in archive
                if wanted(member.name.removeprefix("./")) and (file := archive.extractfile(member)) is not None
            }
            # The checksum of the whole stands at the end, which a reader of members does not come to.
            while archive.fileobj is not None and archive.fileobj.read(2**20):
                pass
            return contents
    except Exception as error:  # a damaged archive raises almost anything, zlib's own errors among them
        reason = " ".join(str(error).split())[:160]
        raise FedbenchError(f"{path}: cannot be read as an archive: {reason}; fetch it again") from None
