"""fedbench: the benchmark suite for federated fine-tuning of foundation models."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("fedbench")
except PackageNotFoundError:  # running from a source tree that was never installed
    __version__ = "0.0.0"
