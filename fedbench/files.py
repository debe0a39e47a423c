"""Files that are written whole or not at all, and files that installed packages bring along."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedbench.errors import FedbenchError

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file to write to in place of `path`, which it becomes at the end of the block; folders are made.

    At any moment, power cuts included, `path` holds the old content, the new one, or is not there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".tmp")
    os.close(handle)
    try:
        yield Path(name)
        with open(name, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp's 0600 would hide a committed record from other readers
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the platform can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows cannot open folders
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, atomically; its folder is made."""
    with _replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, atomically; its folder is made."""
    from safetensors.torch import save_file

    with _replacing(path) as partial:
        save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, partial, dict(metadata))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        # `keys` is a method of the file, which is no mapping.
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def packaged_file(package: str, name: str, purpose: str, sha256: str | None = None, otherwise: str = "") -> Path:
    """The file called `name` in an installed distribution, which is not imported.

    `otherwise`: what else its user could do. Raises FedbenchError where it is missing, or not the one of `sha256`.
    """
    try:
        files: Any = distribution(package).files or []
    except PackageNotFoundError:
        raise FedbenchError(f"{purpose}: not installed; install fedbench with the extra 'bundled'{otherwise}") from None
    path = next((Path(str(f.locate())) for f in files if f.name == name), None)
    if path is None or not path.exists():
        raise FedbenchError(f"{purpose}: the installed {package} holds no {name}; reinstall it")
    if sha256 is not None and (found := hashlib.sha256(path.read_bytes()).hexdigest()) != sha256:
        raise FedbenchError(f"{purpose}: {path} has SHA-256 {found[:12]}…, expected {sha256[:12]}…; reinstall it")
    return path
