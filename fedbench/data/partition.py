"""Partitioners: which client holds which training rows. They move indices, never data."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedbench.errors import FedbenchError
from fedbench.scenario.tables import SplitSettings

TRIES = 1000
"""Draws of a random split before its minimum size is called unreachable."""

HOPELESS = ((16, 60.0), (64, 36.0), (200, 30.0))
"""(draws, clients left too small in the mean of those): where the draws that are left to try cannot help.

Sizes that sum to a constant are negatively associated, so where m clients are too small on average, a draw leaves none
with a probability of at most exp(-m) (Joag-Dev & Proschan 1983), and the count varies by at most sqrt(m). With m
estimated from that many draws, less four deviations of the estimate, all TRIES together have a chance below 1e-9.
"""


SHARDS_PER_ROW = 10
"""Most shards for each row: beyond that nearly all are empty, and drawing them takes the machine's memory."""


@dataclass(frozen=True)
class Partition:
    """Row indices of each client, sorted; every row belongs to exactly one client.

    attempts: draws it took until every client had its minimum size.
    """

    clients: tuple[np.ndarray, ...]
    attempts: int

    def sizes(self) -> list[int]:
        return [len(rows) for rows in self.clients]

    def hash(self) -> str:
        """SHA-256 of who holds what."""
        digest = hashlib.sha256()
        for rows in self.clients:
            digest.update(np.int64(len(rows)).tobytes() + rows.astype(np.int64).tobytes())
        return digest.hexdigest()

    def label_counts(self, labels: np.ndarray, classes: int) -> list[list[int]]:
        """Rows of each class at each client, [clients][classes]."""
        owner = np.repeat(np.arange(len(self.clients)), self.sizes())
        place = owner * classes + labels[np.concatenate(self.clients)]
        found: list[list[int]] = np.bincount(place, minlength=len(self.clients) * classes).reshape(-1, classes).tolist()
        return found

    def skew(self, labels: np.ndarray, classes: int) -> dict[str, float]:
        """The realised skew, whatever alpha promised.

        mean_total_variation: distance of a client's label distribution from the overall one, averaged over clients;
        0 is none, 1 the most. gini: of client sizes, 0 is equal.
        """
        counts = np.asarray(self.label_counts(labels, classes), dtype=np.float64)
        totals = counts.sum(axis=1)
        held = totals > 0
        prior = counts.sum(axis=0) / counts.sum()
        distance = 0.5 * np.abs(counts[held] / totals[held, None] - prior).sum(axis=1)
        sizes = np.sort(totals)
        n = len(sizes)
        gini = float((2 * np.arange(1, n + 1) - n - 1) @ sizes / (n * sizes.sum()))
        return {"mean_total_variation": float(distance.mean()), "gini": gini}


def natural_partition(clients: np.ndarray) -> Partition:
    """The partition in which row i belongs to client clients[i], [n]; every client from 0 on has a row."""
    order = np.argsort(clients, kind="stable")
    return Partition(tuple(np.split(order, np.cumsum(np.bincount(clients))[:-1])), 1)


def partition(labels: np.ndarray, split: SplitSettings, rng: np.random.Generator) -> Partition:
    """Divide rows with these labels [n] as `split` says.

    Random kinds are drawn anew until every client has `min_size` rows. Raises FedbenchError if that cannot be, was not
    reached in TRIES draws, or is out of reach as the first draws went.
    """
    n, clients = len(labels), split.clients
    if n < clients * split.min_size:
        raise FedbenchError(
            f"split: {clients} clients with at least {split.min_size} rows each need {clients * split.min_size} rows, "
            f"there are {n}; lower split.clients or split.min_size"
        )
    shards = clients * split.shards_per_client
    if split.kind == "shards" and shards > SHARDS_PER_ROW * n:
        raise FedbenchError(
            f"split: {clients} clients with {split.shards_per_client} shards each need {shards} shards, there are {n} "
            "rows to cut; lower split.shards_per_client"
        )
    lacking = 0
    for attempt in range(1, TRIES + 1):
        owner = _KINDS[split.kind](labels, split, rng)
        short = int((np.bincount(owner, minlength=clients) < split.min_size).sum())
        if not short:
            order = np.argsort(owner, kind="stable")
            bounds = np.searchsorted(owner[order], np.arange(1, clients))
            return Partition(tuple(np.split(order, bounds)), attempt)
        lacking += short
        if any(attempt == draws and lacking / attempt > most for draws, most in HOPELESS):
            break
    about, fix = (
        (f"{split.shards_per_client} shards a client", "change split.shards_per_client")
        if split.kind == "shards"
        else (f"alpha {split.alpha}", "raise split.alpha")
    )
    raise FedbenchError(
        f"split: {attempt} draws of {split.kind} ({about}) over {clients} clients never gave every client "
        f"{split.min_size} rows, {lacking / attempt:.0f} had fewer on average; {fix}, or lower split.clients or "
        "split.min_size"
    )


def _cut(rows: np.ndarray, shares: np.ndarray, owner: np.ndarray) -> None:
    """Give consecutive pieces of `rows`, in these shares, to clients 0, 1, ...

    Cuts are rounded down, as is usual: on average the first client gets half a row less than its share, the last half
    a row more. Over a hundred classes that adds up, so sets with few rows a class use `dirichlet-clients`.
    """
    bounds = (np.cumsum(shares)[:-1] * len(rows)).astype(np.int64)
    owner[rows] = np.repeat(np.arange(len(shares)), np.diff(bounds, prepend=0, append=len(rows)))


def _iid(labels: np.ndarray, split: SplitSettings, rng: np.random.Generator) -> np.ndarray:
    owner = np.empty(len(labels), dtype=np.int64)
    owner[rng.permutation(len(labels))] = np.arange(len(labels)) % split.clients
    return owner


def _dirichlet(labels: np.ndarray, split: SplitSettings, rng: np.random.Generator) -> np.ndarray:
    """Each class is cut over all clients by one Dirichlet draw (Yurochkin et al. 2019)."""
    owner = np.empty(len(labels), dtype=np.int64)
    for label in np.flatnonzero(np.bincount(labels)):
        rows = rng.permutation(np.flatnonzero(labels == label))
        _cut(rows, rng.dirichlet(np.full(split.clients, split.alpha)), owner)
    return owner


def _dirichlet_clients(labels: np.ndarray, split: SplitSettings, rng: np.random.Generator) -> np.ndarray:
    """Clients of equal size, each with a class distribution drawn around the prior (Hsu et al. 2019).

    Where a client's wish exceeds what is left of a class, the rest of its rows come from the classes left over.
    """
    classes, counts = np.unique(labels, return_counts=True)
    pools = [list(rng.permutation(np.flatnonzero(labels == c))) for c in classes]
    owner = np.empty(len(labels), dtype=np.int64)
    wishes = rng.dirichlet(split.alpha * counts / counts.sum() + 1e-12, split.clients)
    sizes = np.full(split.clients, len(labels) // split.clients)
    sizes[: len(labels) % split.clients] += 1
    for client in rng.permutation(split.clients):
        missing = int(sizes[client])
        while missing:
            left = np.array([len(pool) for pool in pools])
            wish = np.where(left > 0, wishes[client], 0.0)
            if wish.sum() <= 0:
                wish = left.astype(np.float64)
            take = np.minimum(rng.multinomial(missing, wish / wish.sum()), left)
            for pool, k in zip(pools, take, strict=True):
                for _ in range(int(k)):
                    owner[pool.pop()] = client
            missing -= int(take.sum())
    return owner


def _shards(labels: np.ndarray, split: SplitSettings, rng: np.random.Generator) -> np.ndarray:
    """Rows sorted by label, cut into equal shards, a few for each client (McMahan et al. 2017)."""
    shuffled = rng.permutation(len(labels))
    rows = shuffled[np.argsort(labels[shuffled], kind="stable")]
    shards = split.clients * split.shards_per_client
    holder = rng.permutation(shards) % split.clients
    owner = np.empty(len(labels), dtype=np.int64)
    owner[rows] = holder[np.arange(len(rows)) * shards // len(rows)]
    return owner


def _quantity(labels: np.ndarray, split: SplitSettings, rng: np.random.Generator) -> np.ndarray:
    """Label-blind; sizes follow a Dirichlet draw."""
    owner = np.empty(len(labels), dtype=np.int64)
    _cut(rng.permutation(len(labels)), rng.dirichlet(np.full(split.clients, split.alpha)), owner)
    return owner


_KINDS: dict[str, Callable[[np.ndarray, SplitSettings, np.random.Generator], np.ndarray]] = {
    "iid": _iid,
    "dirichlet": _dirichlet,
    "dirichlet-clients": _dirichlet_clients,
    "shards": _shards,
    "quantity": _quantity,
}
