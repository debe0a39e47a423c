"""Runs that have no record yet: what their checkpoints say of them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedbench.errors import FedbenchError
from fedbench.run.journal import INDEX, read_journal
from fedbench.tables.formats import MEGA


@dataclass(frozen=True)
class Live:
    """A run under way, or one that was stopped: where it is, and how the rounds so far went.

    written: when its last checkpoint was. points: model, round, MB that had crossed, accuracy on the validation rows in
    per cent, as of a finished run.
    """

    key: str
    method: str
    scenario: str
    fm: str
    seed: int
    done: int
    rounds: int
    loss: float | None
    accuracy: float | None
    written: str
    points: list[list[Any]]


def live_runs(results: Path) -> list[Live]:
    """Every run with a checkpoint in the results folder, the latest first.

    A checkpoint that cannot be read is left out: the next round writes another.
    """
    found = []
    for path in (results / "checkpoints").glob(f"*/{INDEX}"):
        try:
            live = _live(path.parent)
        except (FedbenchError, OSError, KeyError, TypeError, ValueError):
            continue
        if live is not None:
            found.append(live)
    return sorted(found, key=lambda live: (live.written, live.key), reverse=True)


def _live(folder: Path) -> Live | None:
    read = read_journal(folder)
    if read is None:
        return None
    index, lines = read
    told = index["values"].get("run")
    if not told:
        return None  # of a silo, or from before checkpoints said so
    rounds = [entry["round"] for line in lines for entry in line["history"]]
    written = datetime.fromtimestamp((folder / INDEX).stat().st_mtime, UTC)
    scores: dict[str, list[list[Any]]] = {"plug-in": [], "proxy": []}
    crossed = 0
    for entry in rounds:
        crossed += entry["bytes_up"] + entry["bytes_down"]
        for model, name in (("plug-in", "plug_in_validation"), ("proxy", "proxy_validation")):
            if (share := entry.get(name)) is not None:
                scores[model].append([model, entry["round"] + 1, crossed / MEGA, 100 * share])
    last = next((points[-1][-1] for points in scores.values() if points), None)
    return Live(
        str(index["key"]),
        str(told["method"]),
        str(told["scenario"]),
        str(told["fm"]),
        int(told["seed"]),
        len(rounds),
        int(told["rounds"]),
        rounds[-1]["loss"] if rounds else None,
        last,
        written.isoformat(timespec="seconds"),
        scores["plug-in"] + scores["proxy"],
    )
