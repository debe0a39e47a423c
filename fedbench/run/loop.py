"""The loop over rounds: who takes part, what passes between the sides, and when it is kept.

It talks to both sides through a host, wherever that has put them, and measures nothing but what crosses.
"""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedbench.api.messages import ClientId
from fedbench.errors import DamagedFileError, FedbenchError
from fedbench.machine.stopwatch import Stopwatch
from fedbench.run.checkpoint import Checkpoint, read_checkpoint
from fedbench.run.hosts.side import Host, Kept
from fedbench.run.ledger import Ledger
from fedbench.run.prepare import Prepared
from fedbench.run.progress import Progress


class Run:
    """One run between rounds: what came of them so far, and the sides as they are now."""

    def __init__(self, prepared: Prepared, progress: Progress, host: Callable[..., Host] | None = None) -> None:
        """`host`: where the sides live, if not where the request says."""
        p = self.p = prepared
        self.progress = progress
        self.streams = p.brief.streams
        self.federation, self.evaluation = p.scenario.federation, p.scenario.evaluation
        self.partition, self.label_counts = p.division.partition, p.division.label_counts
        self.rows = p.rows()
        self.ledger = Ledger()
        self.refused: list[tuple[int, ClientId, str]] = []
        self.rounds: list[dict[str, Any]] = []
        self.notes: list[Mapping[str, Any]] = []  # what observers noted, by round
        self.steps = 0
        self.step_flops: int | None = None
        self.time = Stopwatch()
        self._saved: Checkpoint | None = None
        self._changed: set[ClientId] = set()  # clients who have taken part since the last checkpoint
        progress.phase("set-up", detail=f"{p.method.name}: building the server's side")
        self.host = (host or p.host)(p, self.rows, self.label_counts)

    def cohort(self, round: int) -> tuple[list[ClientId], list[ClientId]]:
        """Clients sampled for `round`, in order, and those of them that stay until the upload."""
        n = len(self.partition.clients)
        sampled = self.streams.numpy("cohort", round).choice(n, self.federation.cohort_size(n), replace=False)
        cohort = sorted(int(c) for c in sampled)
        stays = self.streams.numpy("client-dropout", round).random(len(cohort)) >= self.federation.dropout
        return cohort, [c for c, stay in zip(cohort, stays, strict=True) if stay]

    def round(self, round: int) -> None:
        """One federated round: broadcast, local training, upload, aggregation with alignment, measures."""
        server, clients = self.host.server, self.host.clients
        cohort, staying = self.cohort(round)
        outbox = server.broadcast(round, cohort)
        for cid, parcels in outbox.items():
            self.ledger.charge(round, "down", cid, parcels)
        self._changed |= set(outbox)
        trained = clients.train(
            round, outbox, staying, lambda loss: self.progress.advance(1, round=round + 1, loss=loss)
        )
        arrived, refused = [], []
        for cid, result in trained.items():
            self.ledger.charge(round, "up", cid, result.upload)
            why = result.refused or server.receive(round, cid, result.upload, result.most)
            if why is None:
                arrived.append(cid)
            else:
                refused.append((round, cid, why))
        self.refused += refused
        self.steps += sum(result.steps for result in trained.values())
        self.progress.advance(len(cohort) - len(trained))
        server.aggregate(round)
        due = (round + 1) % self.evaluation.every == 0 or round + 1 == self.federation.rounds
        seen = server.ended(round, due)
        scores = [seen[name] for name in ("plug_in_validation", "proxy_validation") if seen.get(name) is not None]
        if scores:
            self.progress.advance(0, accuracy=scores[0])
        losses = [result.loss for result in trained.values()]
        lost = [cid for cid in staying if cid not in trained]  # with the silo that held them
        self.rounds.append(
            {
                "round": round,
                "cohort": cohort,
                "arrived": sorted(arrived),
                "refused": [{"client": c, "reason": why} for _, c, why in refused],
                "loss": float(np.mean(losses)) if losses else None,
                "bytes_up": self.ledger.total("up", round=round),
                "bytes_down": self.ledger.total("down", round=round),
                "bytes_up_by_client": [sum(p.size for p in trained[c].upload) if c in trained else 0 for c in cohort],
                "bytes_down_by_client": [sum(p.size for p in outbox.get(c, ())) for c in cohort],
                "flops_by_client": [trained[c].flops if c in trained else None for c in cohort],
                **({"lost": lost} if lost else {}),
                **seen,
            }
        )

    def loop(self, checkpoints: Path | None, until: int | None = None) -> None:
        """All rounds that are left, or those up to `until`, with a checkpoint after each but the last of all."""
        start = len(self.rounds)
        if start == 0 and self.federation.rounds:
            self.host.server.start()
        size = self.federation.cohort_size(len(self.partition.clients))
        self.progress.phase(
            "federated rounds", total=(self.federation.rounds - start) * size, detail=self.p.method.name
        )
        # Looking through what is there by now for garbage takes long each time, and workers copy what they look at.
        gc.freeze()
        try:
            for round in range(start, self.federation.rounds if until is None else until):
                self.round(round)
                if self.step_flops is None:
                    with self.time("flops"):
                        self.step_flops = self.host.clients.step_flops()
                if checkpoints is not None and round + 1 < self.federation.rounds:
                    with self.time("checkpoint"):
                        self.checkpoint(checkpoints)
        finally:
            gc.unfreeze()

    def seconds(self) -> dict[str, float]:
        """Seconds by phase, of the loop and of both sides."""
        total: dict[str, float] = defaultdict(float)
        for found in (self.host.server.seconds(), self.host.clients.seconds(), self.time.seconds):
            for phase, seconds in found.items():
                total[phase] += seconds
        return dict(total)

    def checkpoint(self, folder: Path) -> None:
        """Write everything needed to go on after this round; at any moment `folder` holds one whole checkpoint."""
        if self._saved is None or self._saved.folder != folder:
            self._saved = Checkpoint(folder, self.p.key)
        kept = self.host.server.kept()
        if len(self.notes) < len(self.rounds):
            self.notes += [{}] * (len(self.rounds) - 1 - len(self.notes)) + [kept.notes]
        values = {
            "steps": self.steps,
            "step_flops": self.step_flops,
            "seconds": self.seconds(),
            "kept": self.host.keeps,
            "run": self._told(),
        }
        self._saved.write(kept.parts, self.host.clients.states(), self._changed, self._history, values)
        self._changed = set()

    def _told(self) -> dict[str, Any]:
        """Which run this is, for whoever looks on."""
        p = self.p
        return {
            "method": p.method.name,
            "scenario": p.scenario.name,
            "fm": p.fm_name,
            "seed": p.request.seed,
            "rounds": self.federation.rounds,
        }

    def _history(self, start: int) -> list[dict[str, Any]]:
        """What each round from `start` on has added to what this run knows; the first also has what came before it."""
        return [
            {"round": entry, "notes": self.notes[r], "ledger": [e.to_json() for e in self.ledger.rounds[r]]}
            for r, entry in enumerate(self.rounds[start:], start=start)
        ]

    def resume(self, folder: Path) -> bool:
        """Become the run that wrote the checkpoint in `folder`; False where there is none for this key.

        Raises FedbenchError for one whose clients' states another host keeps, and DamagedFileError for one that cannot
        be trusted or does not fit this code; this run may have taken up a part of it by then, and is of no further use.
        """
        saved = read_checkpoint(folder, self.p.key)
        if saved is None:
            return False
        if (kept := saved.values.get("kept", "")) != self.host.keeps:
            raise FedbenchError(
                f"{folder}: was begun with {kept or '--host here or apart'}, and what its clients keep lies there; go "
                "on with that, or delete the folder"
            )
        try:
            self.notes = [entry["notes"] for entry in saved.history]
            names = {name for notes in self.notes for name in notes}
            notes = {name: [note for each in self.notes for note in each.get(name, ())] for name in names}
            self.host.server.restore(Kept(saved.parts, notes))
            self.host.clients.restore(saved.clients)
            self.rounds = [entry["round"] for entry in saved.history]
            self.ledger = Ledger.from_json([row for entry in saved.history for row in entry["ledger"]])
            self.refused = [(r["round"], e["client"], e["reason"]) for r in self.rounds for e in r["refused"]]
            self.steps, self.step_flops = saved.values["steps"], saved.values["step_flops"]
            self.time = Stopwatch(saved.values["seconds"])
        except Exception as error:  # a method may raise anything over a state that another version of it wrote
            raise DamagedFileError(
                f"{folder}: its checkpoint does not fit this run: {type(error).__name__}: {error}; delete the folder"
            ) from None
        return True
