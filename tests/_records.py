"""Hand-made records for the tests of records, tables and grids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fedbench.records.record import Record
from fedbench.records.store import record_key
from fedbench.records.text import pack_correct


def make_record(
    method: str = "fedpft",
    seed: int = 0,
    accuracy: float | None = 0.8,
    *,
    scenario: str = "agnews-noniid",
    status: str = "complete",
    rows: int = 10,
    correct: np.ndarray | None = None,
    proxy: float | None = None,
    settings: dict[str, Any] | None = None,
    federation: dict[str, Any] | None = None,
    data_hash: str = "d" * 64,
    fm: str = "minilm-l6",
    planned: list[str] | None = None,
    unavailable: str | None = None,
    arrived: list[list[int]] | None = None,
    loss: float | None = 0.5,
) -> Record:
    """A record; without `correct` the first rows are the ones answered rightly. `accuracy` None: nothing to score.

    In every round clients 1 to 4 are sampled, and three arrive unless `arrived` says which did by round.
    """
    if correct is None and accuracy is not None:
        correct = np.arange(rows) < round(accuracy * rows)
    settings = settings or {"lr": 0.001}
    federation = federation or {"rounds": 15}
    count = federation.get("rounds", 15) if correct is not None else 1
    refused = [{"client": 4, "reason": "x"}]
    arrivals = [[1, 2, 3]] * count if arrived is None else arrived
    totals = {"up": 2_000_000, "down": 62_500_000} if count else {"up": 0, "down": 0}
    # The first round carries what is left over when bytes are divided.
    per_round = [
        {"round": i, **{way: n // count + (n % count if i == 0 else 0) for way, n in totals.items()}}
        for i in range(count)
    ]
    block: dict[str, Any] | None = None
    if correct is not None:
        share = float(correct.mean())
        block = {
            "accuracy": share, "macro_f1": share, "loss": loss, "rows": len(correct), "correct": pack_correct(correct)
        }  # fmt: skip
    second = (
        {"accuracy": proxy, "macro_f1": proxy, "loss": 0.6, "rows": rows if correct is None else len(correct)}
        if proxy is not None
        else None
    )
    points = [{"round": i - 1, "zero_filled": {"error": error}} for i, error in enumerate((0.5, 0.85, 0.9))]
    method_block: dict[str, Any] = {"name": method, "version": 1, "settings": settings}
    if planned:
        method_block["planned"] = planned
    content = {
        "schema": 1,
        "status": status,
        "error": {"type": "ValueError", "message": "no", "traceback": "..."} if status == "failed" else None,
        "identity": {
            "key": record_key([method, seed, scenario, settings, federation, data_hash, fm]),
            "method": method, "method_version": 1, "scenario": scenario, "seed": seed, "fm": fm,
            "data_hash": data_hash, "fm_hash": record_key(fm), "precision": "fp32",
        },
        "scenario": {"name": scenario, "title": "A title", "federation": federation, "split": {"clients": 50}},
        "method": method_block,
        "accuracy": {} if status == "failed" else {
            "plug_in": block,
            "proxy": second,
            "untouched": None,
            "gap": block["accuracy"] - proxy if block and proxy is not None else None,
            "selection": {"rule": "last", "round": count - 1},
            "validation": {"plug_in": 0.79, "proxy": proxy},
            "per_client": {"mean": 0.79, "std": 0.03, "worst_tenth": 0.7, "values": [0.7, *[0.8] * 9]},
            "unavailable": unavailable,
        },
        "communication": {
            "up": {
                "bytes": totals["up"],
                "by_kind": {"adapter": {"bytes": totals["up"], "elements": 9, "messages": 4}},
            },
            "down": {
                "bytes": totals["down"],
                "by_kind": {
                    "sub_fm": {"bytes": totals["down"] * 24 // 25, "elements": 9, "messages": 2},
                    "adapter": {"bytes": totals["down"] // 25, "elements": 9, "messages": 4},
                },
            },
            "setup_bytes": totals["down"] * 24 // 25,
            "refused": [],
            "per_round": per_round,
        },
        "gradient_error": {"points": points, "start": 0.5, "mean": 0.75, "final": 0.9} if proxy is not None else None,
        "exposure": {
            "verbatim": {"all": 0.7, "without_embeddings": 0.5},
            "within_1_percent": {"all": 0.72, "without_embeddings": 0.52},
        },
        "compute": {
            "trainable_parameters": 150_000, "resident_parameters": 16_400_000, "local_steps": 750,
            "peak_memory_bytes": 900_000_000, "seconds": {"local": 61.5, "evaluate": 12.25, "setup": 30.0},
        },
        "rounds": [
            {"round": i, "cohort": [1, 2, 3, 4], "arrived": those, "refused": refused if those else []}
            for i, those in enumerate(arrivals)
        ],
        "partition": {
            "hash": "p" * 64, "sizes": [10, 20], "label_counts": [[5, 5], [10, 10]],
            "skew": {"mean_total_variation": 0.45, "gini": 0.3}, "attempts": 1,
        },
        "provenance": {"fedbench": "0.1.0", "device": "cpu", "finished": "2026-01-01T00:00:00+00:00"},
    }  # fmt: skip
    return Record.model_validate(content)


def altered(record: Record, changes: Mapping[str, Any]) -> Record:
    """The record with other values at dotted fields, a place in a list being a number."""
    content = record.to_json()
    for field, value in changes.items():
        *parents, last = field.split(".")
        block: Any = content
        for parent in parents:
            block = block[int(parent)] if isinstance(block, list) else block.setdefault(parent, {})
        block[int(last) if isinstance(block, list) else last] = value
    return Record.model_validate(content)
