"""Where reusable files lie."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_cache_path


def cache_folder(given: Path | None = None) -> Path:
    """Where reusable files lie: as given, else $FEDBENCH_CACHE, else the user's cache folder."""
    return Path(given or os.environ.get("FEDBENCH_CACHE") or user_cache_path("fedbench"))
