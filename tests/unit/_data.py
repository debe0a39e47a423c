"""Rows of data sets by their names, as a run loads them."""

from __future__ import annotations

from pathlib import Path

from fedbench.data import load
from fedbench.data.rows import RawData
from fedbench.registry import Registry
from fedbench.scenario.tables import DatasetSettings, PublicSettings


def load_data(dataset: DatasetSettings, public: PublicSettings | None, data_dir: Path | None, *plugins: str) -> RawData:
    """What a run loads for these tables of its scenario."""
    registry = Registry(plugins)
    corpus = registry.load_dataset(public.name) if public else None
    return load.load_data(registry.load_dataset(dataset.name), corpus, dataset, public, data_dir)
