"""`fedbench gradient`: how far gradients through a proxy are from those of the foundation model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from fedbench.cli.console import loading, make_console, stoppable
from fedbench.cli.options import (
    FM,
    CacheDir,
    DataDir,
    Device,
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
from fedbench.errors import printable


def gradient_command(
    method: Annotated[list[str], typer.Option(help="A method with a proxy; may be repeated.")],
    scenario: ScenarioName,
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
    workers: Workers = None,
) -> None:
    """Study gradient error: of gradients, of updates and of the aggregate, against a run on the FM itself.

    The run on the FM is `fedavg-lora` with the same seed, cohorts, batches and local optimiser. A setting of one method
    alone is written as [bold]--set methods.fedpft.t=2[/bold].
    """
    known(plugin, method, [scenario])
    console = make_console()
    with loading(console):
        from fedbench.cli.progress import ConsoleProgress
        from fedbench.run.prepare import prepare
        from fedbench.study import report as study_report
        from fedbench.study import study

        ask = partial(
            asked,
            scenario=scenario, fm=fm, seed=seed, rounds=rounds, settings=settings, profile=profile, device=device,
            data_dir=data_dir, results=results, cache=cache, plugins=plugin, precision=precision.value,
            workers=workers,
        )  # fmt: skip
        prepared = [prepare(ask(method=name)) for name in dict.fromkeys(method)]
    for note in prepared[0].notes:
        console.print(printable(note), style="dim", highlight=False, markup=False)
    with stoppable(console, "a study starts from the beginning"), ConsoleProgress(console) as progress:
        studies = study.study(prepared, progress)
    path = study_report.save(studies, results)
    console.print(study_report.terminal(studies))
    about = printable(f"tables: {path}; picture: {path.with_suffix('.png').name}")
    console.print(about, highlight=False, markup=False, soft_wrap=True)
