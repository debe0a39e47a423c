"""fedbench: the benchmark suite for federated fine-tuning of foundation models."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    __version__ = version("fedbench")
except PackageNotFoundError:  # running from a source tree that was never installed
    __version__ = "0.0.0"

# In the root of a checkout Python finds the source folder before an installed package, and there `methods` and
# `scenarios` lie beside it.
_here = Path(__file__).resolve().parent
_beside = [_here.parent / name / "__init__.py" for name in ("methods", "scenarios")]
if not (_here / "methods").is_dir() and all(path.is_file() for path in _beside):
    __path__.append(str(_here.parent))
