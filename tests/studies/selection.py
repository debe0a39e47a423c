"""Which round's model should the test set score? Rules compared on validation rows alone, and in simulation.

    python tests/studies/selection.py run --data-dir DIR --out FOLDER       # trajectories of runs, some minutes each
    python tests/studies/selection.py compare FOLDER                        # rules on those, and in simulation

Under label skew a round's cohort pulls the model towards its own classes, so accuracy swings from round to round. A
rule is good if what it picks is good on rows it has not seen, and if that varies little from seed to seed, since that
is what differences between methods are made of. Nothing here reads a test row.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]
Rule = Callable[[Scores], NDArray[np.float64]]
"""Scores by round [R] -> weight of each round [R], which sum to 1: one round, or a mean over several."""


def single(round: int, rounds: int) -> NDArray[np.float64]:
    return np.eye(rounds)[round]


def best_of_every(k: int) -> Rule:
    """The best of every k-th round."""

    def rule(scores: Scores) -> NDArray[np.float64]:
        seen = np.full(len(scores), -np.inf)
        seen[k - 1 :: k] = scores[k - 1 :: k]
        return single(int(seen.argmax()), len(scores))

    return rule


def smoothed(scores: Scores) -> NDArray[np.float64]:
    """The round in the middle of the best three."""
    padded = np.pad(scores, 1, mode="edge")
    return single(int(np.convolve(padded, np.ones(3) / 3, mode="valid").argmax()), len(scores))


def last(scores: Scores) -> NDArray[np.float64]:
    return single(len(scores) - 1, len(scores))


RULES: dict[str, Rule] = {
    "last round": last,
    "best of every 4th": best_of_every(4),
    "best of every 3rd": best_of_every(3),
    "best of all": best_of_every(1),
    "best smoothed over 3": smoothed,
}


def trajectories(data_dir: Path, folder: Path, methods: list[str], seeds: list[int]) -> None:
    """Which validation rows plug-in and proxy answer rightly after every round, and with the last K rounds' mean."""
    from fedbench.measures.accuracy import evaluate
    from fedbench.models.weights import get_tensors, set_tensors, tunable_names
    from fedbench.run.loop import Run
    from fedbench.run.prepare import prepare
    from fedbench.run.progress import Silent
    from fedbench.run.request import RunRequest

    class Watched(Run):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.seen: list[dict[str, Any]] = []
            self.values: list[dict[str, Any]] = []

        def score(self) -> dict[str, Any]:
            rows, p = self.p.loaded.validation, self.p
            models = {"plug_in": self.host.server.server.put_in_fm(), "proxy": self.host.server.server.put_in_proxy()}
            return {
                name: evaluate(model, rows, 64, p.execution).correct.astype(int).tolist()
                for name, model in models.items()
                if model is not None
            }

        def round(self, round: int) -> None:
            super().round(round)
            model = self.host.server.server.put_in_fm()
            self.values.append(get_tensors(model, tunable_names(model)))
            self.seen.append(self.score())

        def averaged(self, k: int) -> list[int]:
            model, p = self.host.server.server.put_in_fm(), self.p
            chosen = self.values[-k:]
            set_tensors(model, {n: sum(v[n] for v in chosen) / k for n in chosen[0]})
            return [int(c) for c in evaluate(model, p.loaded.validation, 64, p.execution).correct]

    for method in methods:
        for seed in seeds:
            request = RunRequest(
                method=method,
                scenario="agnews-noniid",
                seed=seed,
                settings={"evaluation.every": "100", "evaluation.probe_size": "0"},
                data_dir=data_dir,
                results=folder / "runs",
                workers=1,
            )
            this = Watched(prepare(request), Silent())
            this.loop(None)
            content = {
                "method": method,
                "seed": seed,
                "rounds": this.seen,
                "labels": this.p.loaded.validation.labels.tolist(),
                "averaged": {str(k): this.averaged(k) for k in (2, 3, 4, 6)},
            }
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{method}-{seed}.json").write_text(json.dumps(content))
            print(method, seed, [round(float(np.mean(r["plug_in"])), 3) for r in this.seen], flush=True)


def on_trajectory(path: Path, splits: int = 2000) -> dict[str, tuple[float, float]]:
    """Of each rule: mean accuracy and deviation on the half of the validation rows that it did not choose on."""
    content = json.loads(path.read_text())
    plug_in = np.array([r["plug_in"] for r in content["rounds"]], dtype=float)  # [rounds, rows]
    seen = np.array([r.get("proxy", r["plug_in"]) for r in content["rounds"]], dtype=float)
    rng = np.random.default_rng(0)
    found: dict[str, list[float]] = {name: [] for name in RULES}
    means = {f"mean of last {k}": np.array(bits, dtype=float) for k, bits in content["averaged"].items()}
    found |= {name: [] for name in means}
    for _ in range(splits):
        order = rng.permutation(plug_in.shape[1])
        half, other = order[: len(order) // 2], order[len(order) // 2 :]
        for name, rule in RULES.items():
            found[name].append(float(rule(seen[:, half].mean(1)) @ plug_in[:, other].mean(1)))
        for name, bits in means.items():
            found[name].append(float(bits[other].mean()))
    return {name: (float(np.mean(v)), float(np.std(v))) for name, v in found.items()}


def simulated(swing: float, rows: int = 400, rounds: int = 12, runs: int = 4000) -> dict[str, tuple[float, float]]:
    """Of each rule: mean and deviation over seeds of the true accuracy of what it picks.

    Accuracy rises to 88% and falls in each round by |N(0, swing)| of that cohort's pull, proxy and plug-in alike but
    for a point; rules see a sample of `rows` validation rows of it.
    """
    rng = np.random.default_rng(1)
    found: dict[str, list[float]] = {name: [] for name in RULES}
    for _ in range(runs):
        level = 0.88 - 0.3 * np.exp(-np.arange(1, rounds + 1) / 3) + rng.normal(0, 0.01)
        plug_in = np.clip(level - np.abs(rng.normal(0, swing, rounds)), 0.25, 0.99)
        proxy = np.clip(plug_in + rng.normal(0, 0.01, rounds), 0, 1)
        seen = rng.binomial(rows, proxy) / rows
        for name, rule in RULES.items():
            found[name].append(float(rule(seen) @ plug_in))
    return {name: (float(np.mean(v)), float(np.std(v))) for name, v in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("--data-dir", type=Path, required=True)
    run.add_argument("--out", type=Path, required=True)
    run.add_argument("--methods", default="fedpft,fedot")
    run.add_argument("--seeds", default="0")
    compare = commands.add_parser("compare")
    compare.add_argument("folder", type=Path)
    asked = parser.parse_args()
    if asked.command == "run":
        trajectories(asked.data_dir, asked.out, asked.methods.split(","), [int(s) for s in asked.seeds.split(",")])
        return
    tables = {path.stem: on_trajectory(path) for path in sorted(asked.folder.glob("*.json"))}
    tables |= {f"simulated, swings of {100 * swing:.0f} points": simulated(swing) for swing in (0.01, 0.05, 0.10)}
    for title, table in tables.items():
        print(f"\n{title}")
        for name, (mean, deviation) in table.items():
            print(f"  {name:24} {100 * mean:5.1f} ± {100 * deviation:.1f}")


if __name__ == "__main__":
    main()
