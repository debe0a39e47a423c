"""Where data sets come from: folders of the user's, and the hub or its cache."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedbench.errors import FedbenchError

COMMIT = re.compile(r"[0-9a-f]{40}")


def data_folder(given: Path | None) -> Path | None:
    """The user's folder of data sets: as given, else $FEDBENCH_DATA, else none."""
    named = given or os.environ.get("FEDBENCH_DATA")
    return Path(named).expanduser() if named else None


def set_folders(root: Path, names: Sequence[str]) -> Iterator[Path]:
    """The folders under `root` that go by one of `names`; `root` itself where it is called so.

    Raises FedbenchError where there is no `root`.
    """
    if not root.is_dir():
        raise FedbenchError(f"--data-dir {root}: no such folder")
    # `.` has a name only once it is resolved.
    for folder in (*(root / name for name in names), *([root] if root.resolve().name in names else [])):
        if folder.is_dir():
            yield folder


def find_files(folder: Path, stems: Sequence[str], suffixes: Sequence[str] = (".parquet",)) -> list[Path]:
    """The file of the first stem that exists, or the shards of its parquet split, as the hub lays them out.

    Raises FedbenchError where a shard is missing.
    """
    for stem in stems:
        for suffix in suffixes:
            if (path := folder / f"{stem}{suffix}").exists():
                return [path]
        # The hub keeps shards in `data` or in a folder called like the configuration.
        for place in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
            if shards := sorted(place.glob(f"{stem}-*.parquet")):
                found = [re.search(r"-(\d+)-of-(\d+)", path.name) for path in shards]
                counts = {int(shard[2]) for shard in found if shard}
                if len(counts) > 1 or (counts and None in found):
                    raise FedbenchError(f"{place}: the shards of {stem} are of several downloads; keep those of one")
                count = next(iter(counts), len(shards))
                if count != len(shards):
                    raise FedbenchError(f"{place}: {len(shards)} of {count} shards of {stem}; fetch the rest")
                if counts and {int(shard[1]) for shard in found if shard} != {*range(count)}:
                    raise FedbenchError(f"{place}: the shards of {stem} are not 0 to {count - 1}; fetch them again")
                return shards
    return []


def listing(folder: Path) -> str:
    """What a folder holds, for a message that says that something is not among it."""
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    if not names:
        return "the folder is empty"
    return f"the folder holds {', '.join(names[:6])}{f' and {len(names) - 6} more' if len(names) > 6 else ''}"


def read_bytes(path: Path, most: int = -1) -> bytes:
    """The content of a file, or the first `most` bytes. Raises FedbenchError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(most)
    except OSError as error:
        raise FedbenchError(f"{path}: cannot be read: {error.strerror or error}") from None


PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}


def cure(content: bytes) -> str:
    """What to do about a file that begins with `content` and is not what its name says."""
    if content.startswith(b"version https://git-lfs"):
        return "it is a pointer of git-lfs; run git lfs pull"
    if content[:100].lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "it is a web page; fetch the file itself"
    packer = next((name for start, name in PACKED.items() if content.startswith(start)), None)
    return f"it is packed with {packer}; unpack it" if packer else "fetch it again"


def checked_text(path: Path, content: bytes, text: str, nul: str) -> str:
    """The decoded `content` of a file with line ends as `\\n`.

    Raises FedbenchError where it is empty, is no table, or holds a NUL byte, of which `nul` says what it means.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if (zero := text.find("\0")) >= 0:
        line = text.count("\n", 0, zero) + 1
        raise FedbenchError(f"{path}: line {line} holds a NUL byte, so it is {nul}")
    if not text.strip():
        raise FedbenchError(f"{path}: is empty")
    if (fix := cure(content)) != cure(b""):
        raise FedbenchError(f"{path}: is no table; {fix}")
    return text


def read_parquet(path: Path) -> Any:
    """A parquet file as a pandas table. Raises FedbenchError for a damaged one."""
    import pandas as pd

    head = read_bytes(path, 200)
    try:
        return pd.read_parquet(path)
    except Exception as error:  # a damaged file makes pyarrow raise almost anything
        reason = " ".join(str(error).split())[:200]
        raise FedbenchError(f"{path}: cannot be read as parquet: {reason}; {cure(head)}") from None


def not_at_hand(name: str, folders: Sequence[str]) -> FedbenchError:
    """The error about a data set that is on no hub and not in the user's folder."""
    return FedbenchError(
        f"data set {name}: not found; give --data-dir DIR (or FEDBENCH_DATA) with DIR/{' or '.join(folders[:2])} "
        "holding its files"
    )


@dataclass(frozen=True)
class HubState:
    """Whether the model hub answers, and a line that says how it stands."""

    answers: bool
    about: str


def hub_state(timeout: float = 5.0) -> HubState:
    """Ask the model hub, at most `timeout` seconds; never where HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return HubState(False, "not asked: HF_HUB_OFFLINE is set")
    try:
        answer = get_session().head(constants.ENDPOINT, timeout=timeout)
    except Exception as error:  # whatever the network and the HTTP library of the day come up with
        why = type(error).__name__
        return HubState(False, f"{constants.ENDPOINT} cannot be reached ({why}); embedded and local data still work")
    return HubState(True, f"{constants.ENDPOINT} answers ({answer.status_code})")


@contextmanager
def _offline() -> Iterator[None]:
    """Go straight to the hub's cache inside the block, without minutes of retries and a warning for each."""
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def load_from_hub(
    name: str, repository: str, configuration: str | None, revision: str, folders: Sequence[str]
) -> tuple[Any, str]:
    """All splits of a data set on the hub or in its cache, and a note that names the commit they are of.

    Raises FedbenchError that says how else to supply the set, in a folder called like one of `folders`.
    """
    try:
        from datasets import load_dataset

        with _offline() if not hub_state().answers else nullcontext():
            loaded = load_dataset(repository, configuration, revision=revision)
    except Exception as error:  # the hub client raises many kinds, all of which mean: not to be had
        raise FedbenchError(
            f"data set {name}: not found ({type(error).__name__}). Supply it in one of three ways: connect to the hub "
            f"({repository}), fill the hub's cache beforehand, or give --data-dir DIR (or FEDBENCH_DATA) with "
            f"DIR/{' or '.join(folders[:2])} holding its files"
        ) from None
    return loaded, f"{name}: {repository} at revision {_commit(loaded, revision)} from the hub or its cache"


def _commit(loaded: Any, revision: str) -> str:
    """The commit that was loaded: `revision` itself, or what a branch or tag stood for then."""
    if COMMIT.fullmatch(revision):
        return revision[:12]
    for split in loaded.values():
        # The files' addresses hold the commit; the cache's folders are called after it.
        sources = (split.info.download_checksums or {}, (file["filename"] for file in split.cache_files))
        for text in (text for source in sources for text in source):
            if found := COMMIT.search(text):
                return f"{found[0][:12]} ({revision})"
    return revision
