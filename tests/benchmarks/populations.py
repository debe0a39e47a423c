"""A synthetic scenario of many clients, and a run on it: what a population costs is seen where the model costs nothing.

`python tests/benchmarks/populations.py FOLDER CLIENTS [ROUNDS]` makes one run and prints seconds, memory and sizes.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers import WORDS, save_tiny_bert

from fedbench.run.request import RunRequest

ROWS, COHORT, ROUNDS = 200_000, 10, 50

SCENARIO = """title = "synthetic"
fm = "minilm-l6"

[dataset]
name = "synthetic"
kind = "text"
train = "train.csv"
test = "test.csv"
validation = 200
max_length = 16

[federation]
batch_size = 16
max_steps = 1

[splits.iid]
kind = "iid"
clients = 100

[splits.dirichlet]
kind = "dirichlet-clients"
clients = 100
alpha = 0.5
"""


def save_population(folder: Path, rows: int = ROWS) -> None:
    """A scenario `synthetic.toml` of so many training rows, its files, and a tiny BERT, all in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "synthetic.toml").write_text(SCENARIO)
    rng = np.random.default_rng(0)
    for name, count in (("train", rows), ("test", 500)):
        words, labels = rng.integers(0, len(WORDS), (count, 6)), rng.integers(0, 4, count)
        lines = [
            f"{name} {i} " + " ".join(WORDS[w] for w in row) + f",{label}"
            for i, (row, label) in enumerate(zip(words.tolist(), labels.tolist(), strict=True))
        ]
        (folder / f"{name}.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    save_tiny_bert(folder / "bert")


def population_request(
    folder: Path, clients: int, rounds: int = ROUNDS, method: str = "fedavg-lora", split: str = "iid",
    settings: Mapping[str, str] | None = None, cohort: int = COHORT,
) -> RunRequest:  # fmt: skip
    """A run of `cohort` clients a round of so many, on what `save_population` left in `folder`."""
    chosen = {
        "split.clients": str(clients), "split.min_size": "1", "federation.fraction": str(cohort / clients),
        "federation.rounds": str(rounds), "evaluation.every": str(max(1, rounds // 2)),
    }  # fmt: skip
    return RunRequest(
        method, f"{folder / 'synthetic.toml'}:{split}", fm=str(folder / "bert"), device="cpu",
        settings=chosen | dict(settings or {}), results=folder / f"runs-{clients}", cache=folder / "cache",
    )  # fmt: skip
