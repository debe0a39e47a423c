"""Where the server and the silos of a federation listen: a CSV file of FedML's form, read and checked."""

from __future__ import annotations

import csv
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from fedbench.errors import FedbenchError
from fedbench.files import write_text

COLUMNS = ("eid", "rank", "grpc_server_ip", "grpc_server_port")
EXAMPLE = f"{','.join(COLUMNS)}, then a line each like 0,0,192.168.0.1,8890"


@dataclass(frozen=True)
class Address:
    """Where one process listens. rank: 0 for the server, 1 to N for the silos."""

    rank: int
    ip: str
    port: int

    @property
    def who(self) -> str:
        """What messages call the process."""
        return f"silo {self.rank}" if self.rank else "the server"


def read_addresses(path: Path) -> list[Address]:
    """The addresses in a file, server first, then every silo.

    Raises FedbenchError, naming the line, for a file that is not one address each of the server (rank 0) and of silos 1
    to N.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FedbenchError(f"--addresses {path}: cannot be read: {error}") from None
    found: dict[int, Address] = {}
    for line, row in enumerate(rows, start=2):
        try:
            eid, rank, port = (int(row[name]) for name in ("eid", "rank", "grpc_server_port"))
            ip = row["grpc_server_ip"].strip()
        except (KeyError, TypeError, ValueError, AttributeError):
            raise FedbenchError(f"--addresses {path}, line {line}: not an address; write {EXAMPLE}") from None
        if eid != rank or rank < 0 or not ip or not 1 <= port <= 65535:
            raise FedbenchError(
                f"--addresses {path}, line {line}: eid and rank have to be the same number, 0 for the server, and the "
                "port one from 1 to 65535"
            )
        if rank in found:
            raise FedbenchError(f"--addresses {path}, line {line}: rank {rank} is there twice; give each silo its own")
        found[rank] = Address(rank, ip, port)
    if len(found) < 2 or sorted(found) != list(range(len(found))):
        ranks = ", ".join(map(str, sorted(found))) or "none"
        raise FedbenchError(
            f"--addresses {path}: has ranks {ranks}; it needs 0, the server, and silos from 1 on without a gap; write "
            f"{EXAMPLE}"
        )
    if len({(address.ip, address.port) for address in found.values()}) < len(found):
        raise FedbenchError(f"--addresses {path}: two of them listen on one port; give each its own")
    return [found[rank] for rank in sorted(found)]


def write_addresses(path: Path, addresses: Sequence[Address]) -> None:
    """Write the file that `read_addresses` reads."""
    lines = [f"{a.rank},{a.rank},{a.ip},{a.port}" for a in addresses]
    write_text(path, "\n".join([",".join(COLUMNS), *lines]) + "\n")


def loopback(silos: int) -> list[Address]:
    """Addresses of a server and that many silos on this machine, at ports that are free now."""
    with ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(silos + 1)]
        for each in held:
            each.bind(("127.0.0.1", 0))
        return [Address(rank, "127.0.0.1", each.getsockname()[1]) for rank, each in enumerate(held)]


def try_to_listen(address: Address) -> None:
    """Raises FedbenchError where nobody can listen at `address`: it is taken, or another machine's."""
    with socket.socket() as trial:
        # Without this a port is taken for a while after whoever listened there has ended.
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((address.ip, address.port))
            trial.listen()
        except OSError as error:
            raise FedbenchError(
                f"{address.who} cannot listen at {address.ip}:{address.port}: {error.strerror or error}; is it running "
                "already, or is that the address of another machine?"
            ) from None
