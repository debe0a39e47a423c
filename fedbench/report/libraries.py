"""The libraries of JavaScript that a report carries: Vega-Lite for plots, DataTables for tables."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedbench.errors import FedbenchError

LICENCES = (
    ("Vega, Vega-Lite and Vega-Embed", "BSD-3-Clause"),
    ("DataTables and its extensions", "MIT"),
    ("jQuery", "MIT"),
    ("JSZip", "MIT"),
)
"""Of what the two bundles hold; their own comments name the authors."""


@dataclass(frozen=True)
class Libraries:
    """Sources to put into a page. plots: sets `vegaEmbed`; tables: a module that exports jQuery with DataTables."""

    plots: str
    tables: str
    versions: tuple[str, ...]


@lru_cache(maxsize=1)
def libraries() -> Libraries:
    """The bundles of the installed packages. Raises FedbenchError where these are not installed."""
    try:
        import vl_convert
        from itables.options import dt_bundle
    except ImportError as error:
        raise FedbenchError(f"fedbench report: {error.name} is not installed; pip install 'fedbench[report]'") from None
    plots: Any = vl_convert.javascript_bundle  # whose types ask for a snippet, which it does without
    return Libraries(
        plots(),
        Path(dt_bundle).read_text(encoding="utf-8"),
        tuple(f"{name} {version(name)}" for name in ("vl-convert-python", "itables")),
    )
