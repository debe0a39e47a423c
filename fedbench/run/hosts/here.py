"""Both sides of a run in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedbench.api.messages import ClientId
from fedbench.data.examples import Examples
from fedbench.run.hosts.make import make_clients, make_server
from fedbench.run.hosts.side import ClientSide, Host, ServerSide
from fedbench.run.prepare import Prepared


class Here(Host):
    """Both sides in this process; what a large message holds is shared between its recipients."""

    name = "here"
    client_side: type[ClientSide] = ClientSide
    """What holds the clients; a study that looks closer puts its own here."""
    server: ServerSide
    clients: ClientSide

    def __init__(
        self, prepared: Prepared, rows: Mapping[ClientId, Examples], label_counts: Sequence[Sequence[int]]
    ) -> None:
        p = prepared
        self.server = make_server(p.brief, p.method, p.loaded.fm, p.loaded.public, p.held_out, label_counts)
        self.clients = make_clients(p.brief, p.method, rows, self.client_side)

    def close(self) -> None:
        pass
