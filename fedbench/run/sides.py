"""What each side of a federation reads where it is started by hand, with one scenario for both.

A scenario is one data set, which both sides read. They do so in a process that ends: the one that goes on, and talks to
the network, holds nothing but what is its own.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from fedbench.api.messages import ClientId
from fedbench.data.examples import Examples
from fedbench.errors import FedbenchError
from fedbench.run.brief import Brief
from fedbench.run.hosts.apart import Named
from fedbench.run.hosts.fedml import check_number, silo_folder
from fedbench.run.hosts.silo import silo_of
from fedbench.run.prepare import Prepared, prepare
from fedbench.run.request import RunRequest

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class SiloPart:
    """What a silo starts with: the run as it knows it, without the FM, and the rows of its clients.

    key: of its identity. memory: the folder where it keeps what its clients hold.
    """

    identity: Mapping[str, Any]
    key: str
    brief: Brief
    method: Named
    rows: Mapping[ClientId, Examples]
    memory: Path


def in_a_process(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """What `function` returns, computed in a process that then ends. Raises what it raises."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *args, **kwargs).result()
        except BrokenProcessPool:
            raise FedbenchError("the process that reads the data ended, most likely for want of memory") from None


def server_part(request: RunRequest) -> Prepared:
    """The run without any client's rows."""
    return prepare(request).without_rows()


def silo_part(request: RunRequest, silo: int, silos: int) -> SiloPart:
    """What silo `silo` of that many starts with; the weights of the FM are not read."""
    p = prepare(request, weights=False)
    rows = p.rows()
    check_number(silos, len(rows))
    own = rows.only([cid for cid in rows if silo_of(cid, silos) == silo])
    method = Named(p.method.name, p.method.model_dump(mode="json"), request.plugins)
    return SiloPart(dict(p.identity), p.key, p.brief, method, own, silo_folder(p, silo))
