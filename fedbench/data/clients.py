"""The training rows of clients, each client's taken from those of all when they are asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from fedbench.data.examples import Examples


class ClientRows(Mapping[int, Examples]):
    """Rows by client. What they take is memory for the rows and their numbers, however many clients share them."""

    def __init__(self, rows: Examples, clients: Mapping[int, np.ndarray]) -> None:
        """clients: which of `rows` are whose, indices [n] by client."""
        self._rows, self._clients = rows, clients

    @classmethod
    def of(cls, rows: Examples, clients: Sequence[np.ndarray]) -> ClientRows:
        """Those of clients 0, 1, ..."""
        return cls(rows, dict(enumerate(clients)))

    def only(self, clients: Collection[int]) -> ClientRows:
        """The rows of some clients, with none of the others' beside them."""
        own = {client: self._clients[client] for client in clients}
        kept = self._rows.select([row for rows in own.values() for row in rows.tolist()])
        ends = np.cumsum([len(rows) for rows in own.values()], dtype=np.int64).tolist()
        return ClientRows(kept, {c: np.arange(end - len(own[c]), end) for c, end in zip(own, ends, strict=True)})

    def __getitem__(self, client: int) -> Examples:
        _ = self._rows.lengths  # counted once for all clients and rounds
        return self._rows.select(self._clients[client])

    def __iter__(self) -> Iterator[int]:
        return iter(self._clients)

    def __len__(self) -> int:
        return len(self._clients)
