"""`fedbench server`: the server of a run over FedML, started by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedbench.cli.console import loading, make_console
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
    SiloTimeout,
    Workers,
    asked,
    known,
)


def server_command(
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
    silo_timeout: SiloTimeout = 600.0,
) -> None:
    """Start the server of a run over FedML; its silos are started with `fedbench silo`.

    It waits for all silos, makes the run with them, and writes the record. FedML's channel is neither encrypted nor
    authenticated: for trusted networks only.
    """
    registry = known(plugin, [method], [scenario])
    console = make_console()
    with loading(console):
        from dataclasses import replace
        from functools import partial

        from fedbench.cli.run import make_record
        from fedbench.run.hosts.addresses import read_addresses
        from fedbench.run.hosts.fedml import Line, Served, check_fedml
        from fedbench.run.sides import in_a_process, server_part

        table = read_addresses(addresses)
        check_fedml()
        request = asked(
            method=method, scenario=scenario, fm=fm, seed=seed, rounds=rounds, settings=settings, profile=profile,
            device=device, data_dir=data_dir, results=results, cache=cache, plugins=plugin,
            executor=executor.value, precision=precision.value, workers=workers, host="fedml",
            silos=len(table) - 1, silo_timeout=silo_timeout,
        )  # fmt: skip
        # What the other process answers with is of classes that a plugin may have brought.
        registry.load_method(method)
        registry.add_families()
        prepared = in_a_process(server_part, request)
    line = Line(prepared.identity, tuple(table), addresses, silo_timeout)

    def wait(missing: Sequence[int]) -> None:
        console.print(f"waiting for silo {', '.join(map(str, missing))}", highlight=False)

    make_record(replace(prepared, host=partial(Served, line=line, wait=wait)), console)
