"""Files that are written whole or not at all, and files that installed packages bring along."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedbench.errors import DamagedFileError, FedbenchError

if TYPE_CHECKING:
    from torch import Tensor

_log = logging.getLogger(__name__)  # what is not configured otherwise goes to standard error


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file to write to in place of `path`, which it becomes at the end of the block; folders are made.

    At any moment, power cuts included, `path` holds the old content, the new one, or is not there. Raises FedbenchError
    where it cannot be written, for want of space or permission.
    """
    name: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".tmp")
        os.close(handle)
        yield Path(name)
        with open(name, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp's 0600 would hide a committed record from other readers
        os.replace(name, path)
    except BaseException as error:
        if name is not None:
            Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _unwritable(path, error) from None
        raise
    _sync_folder(path.parent)


def _unwritable(path: Path, error: OSError) -> FedbenchError:
    return FedbenchError(
        f"{path}: cannot be written: {error.strerror or error}; free space or permit it, or name another folder"
    )


def try_folder(folder: Path, option: str) -> None:
    """Make `folder` and see that files can be written there, before anything is computed that would go there.

    Raises FedbenchError that names the command line's `option` for it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))  # an empty file can be made on a full disk
    except OSError as error:
        raise FedbenchError(
            f"{option} {folder}: cannot be written to: {error.strerror or error}; name a folder that can"
        ) from None


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


def append_text(path: Path, text: str, at: int) -> None:
    """Write `text` in UTF-8 behind the first `at` bytes of a file, which is made; what stood there is dropped."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "r+b" if at else "wb") as file:
            file.seek(at)
            file.truncate()
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _unwritable(path, error) from None


CHECKSUM = "sha256"
"""The entry of a file's metadata that holds the checksum of everything else in it."""


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes."""
    import torch

    data = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{data.dtype}{list(data.shape)}".encode())
    digest.update(data.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def state_digest(state: Mapping[str, Tensor], digest: Callable[[Tensor], str] = tensor_digest) -> str:
    """SHA-256 over names and contents."""
    return hashlib.sha256("".join(f"{n}={digest(state[n])};" for n in sorted(state)).encode()).hexdigest()


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    about = json.dumps(dict(metadata), sort_keys=True)
    return hashlib.sha256((about + state_digest(tensors)).encode()).hexdigest()


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Write a safetensors file, atomically, with a checksum of all it holds, which is returned; its folder is made."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    checksum = _checksum(tensors, metadata)
    with _replacing(path) as partial:
        try:
            content = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
            save_file(content, partial, {**metadata, CHECKSUM: checksum})
        except SafetensorError as error:  # what the library makes of a full disk
            raise OSError(str(error)) from None
    return checksum


def load_tensors(path: Path, checksum: str | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file that `save_tensors` wrote; with the `checksum` it gave, if one is named.

    Raises DamagedFileError for a file that is cut, changed, missing, or another than that.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            # `keys` is a method of the file, which is no mapping.
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except (OSError, SafetensorError, ValueError) as error:
        raise DamagedFileError(f"{path}: cannot be read: {str(error).splitlines()[0]}; delete it") from None
    found = metadata.pop(CHECKSUM, None)
    if found != _checksum(tensors, metadata) or checksum not in (None, found):
        raise DamagedFileError(f"{path}: does not hold what was written: its checksum is another; delete it")
    return tensors, metadata


def cached_tensors(
    path: Path, make: Callable[[], tuple[Mapping[str, Tensor], Mapping[str, str]]]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of the file at `path`, which is made where it is missing or damaged; the latter is said.

    Raises FedbenchError where it cannot be written.
    """
    if path.exists():
        try:
            return load_tensors(path)
        except DamagedFileError as error:
            _log.warning("fedbench: a file of the cache is damaged and made anew: %s", error)
    save_tensors(path, *make())
    return load_tensors(path)


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
