"""`fedbench silo`: a silo of a run over FedML, started by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedbench.cli.console import loading, make_console, stoppable
from fedbench.cli.options import (
    FM,
    Addresses,
    CacheDir,
    DataDir,
    Device,
    Executor,
    ExecutorOption,
    MethodName,
    Plugins,
    Precision,
    PrecisionOption,
    Profile,
    Results,
    Rounds,
    ScenarioName,
    Seed,
    Settings,
    Workers,
    asked,
    known,
)
from fedbench.errors import FedbenchError


def silo_command(
    number: Annotated[int, typer.Argument(min=1, help="Which silo this is: its rank in the address file.")],
    method: MethodName,
    scenario: ScenarioName,
    addresses: Addresses,
    fm: FM = None,
    seed: Seed = 0,
    rounds: Rounds = None,
    settings: Settings = None,
    profile: Profile = None,
    device: Device = "auto",
    precision: PrecisionOption = Precision.auto,
    data_dir: DataDir = None,
    results: Results = Path("runs"),
    cache: CacheDir = None,
    plugin: Plugins = None,
    executor: ExecutorOption = Executor.auto,
    workers: Workers = None,
) -> None:
    """Start a silo of a run over FedML: it holds the rows of its clients, and trains them for `fedbench server`.

    Of the FM it reads configuration and tokenizer alone. What its clients keep lies under --results; the same command
    after Ctrl-C or a crash joins again. FedML's channel is neither encrypted nor authenticated: for trusted networks
    only.
    """
    known(plugin, [method], [scenario])
    console = make_console()
    with loading(console):
        from functools import partial

        from fedbench.run.hosts.addresses import read_addresses
        from fedbench.run.hosts.fedml import Line, check_fedml, make_silo
        from fedbench.run.sides import in_a_process, silo_part

        table = read_addresses(addresses)
        if number >= len(table):
            raise FedbenchError(f"{addresses}: has no silo {number}; it has silos 1 to {len(table) - 1}")
        check_fedml()
        request = asked(
            method=method, scenario=scenario, fm=fm, seed=seed, rounds=rounds, settings=settings, profile=profile,
            device=device, data_dir=data_dir, results=results, cache=cache, plugins=plugin,
            executor=executor.value, precision=precision.value, workers=workers, host="fedml", silos=len(table) - 1,
        )  # fmt: skip
        part = in_a_process(silo_part, request, number, len(table) - 1)
    rows = sum(map(len, part.rows.values()))
    console.print(f"silo {number}: {len(part.rows)} clients with {rows} rows", highlight=False)
    make = partial(make_silo, number, part.key, part.brief, part.method, part.rows, part.memory)
    with stoppable(console, "the same command joins the run again"):
        Line(part.identity, tuple(table), addresses, 0).answer(
            number, make, lambda what: console.print(f"silo {number}: {what}", highlight=False)
        )
