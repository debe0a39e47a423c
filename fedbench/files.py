"""Files of tensors, written whole or not at all, and files that installed packages bring along."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedbench.errors import FedbenchError


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, its folder included; at any moment `path` holds the old file, the new one, or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial, dict(metadata))
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        # `keys` is a method of the file, which is no mapping.
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


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
